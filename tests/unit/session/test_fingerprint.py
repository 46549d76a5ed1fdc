"""A fingerprint holds everything that the weights of a run depend on, and names each change."""

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import make_tiny_recipe, save_model_folder, write_eval_files
from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, Plan
from tunesmith.model.hub.base_config import select_forward_keys
from tunesmith.session import inputs, planner
from tunesmith.session.fingerprint import build_fingerprint, get_kernels
from tunesmith.session.identity import hash_source, list_changes, read_recipe
from tunesmith.session.inputs import RunInputs

NOW = datetime(2026, 2, 3)
RECIPE = {"model": "tiny", "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def load(model: Path, folder: Path, **changed: Any) -> RunInputs:
    recipe = make_tiny_recipe(model, folder, **write_eval_files(folder) | changed)
    return inputs.load_inputs(recipe, now=NOW)


def build(run_inputs: RunInputs, **changed: Any) -> Json:
    plan = planner.make_plan(run_inputs)
    return build_fingerprint(change_plan(plan, **changed), run_inputs, RECIPE)


def change_plan(plan: Plan, **changed: Any) -> Plan:
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **changed))


@pytest.fixture
def run_inputs(model: Path, tmp_path: Path) -> RunInputs:
    return load(model, tmp_path)


def test_a_fingerprint_holds_the_inputs(run_inputs: RunInputs, model: Path) -> None:
    fingerprint = build(run_inputs)
    plan = planner.make_plan(run_inputs)
    assert fingerprint["base"] == str(model)
    assert fingerprint["base_sha256"] == {
        "model.safetensors": hash_file(model / "model.safetensors")
    }
    config = json.loads((model / "config.json").read_text())
    assert fingerprint["config"] == select_forward_keys(config)
    assert fingerprint["tokenizer"] == run_inputs.renderer.tokenizer.sha256
    assert fingerprint["renderer"] == run_inputs.renderer.fingerprint
    assert fingerprint["templates"].keys() == {"default"}
    assert fingerprint["end_ids"] == list(run_inputs.renderer.end_ids)
    datasets = {role: dataset.fingerprint for role, dataset in run_inputs.datasets.items()}
    assert fingerprint["data"].items() >= datasets.items()
    assert len(set(fingerprint["data"].values())) == len(datasets) + 1 == 4
    assert fingerprint["recipe"] == RECIPE
    assert fingerprint["plan"]["steps"] == plan.steps
    assert fingerprint["plan"]["learning_rate"] == 0.01
    assert fingerprint["versions"].keys() == {"torch", "transformers", "tokenizers", "numpy"}
    assert fingerprint["versions"]["torch"] == run_inputs.machine.versions["torch"]
    assert fingerprint["kernels"] == "not used"
    assert fingerprint["machine"] == {
        "device": run_inputs.machine.device_name,
        "threads": torch.get_num_threads(),
        "kernels": "",
    }
    assert json.loads(json.dumps(fingerprint)) == fingerprint


@pytest.mark.parametrize(("key", "value"), [("method", "qlora"), ("optim", "adamw_8bit")])
def test_quantized_runs_depend_on_bitsandbytes(key: str, value: str, run_inputs: RunInputs) -> None:
    assert "bitsandbytes" in build(run_inputs, **{key: value})["versions"]


def test_runs_on_a_gpu_depend_on_its_kernels(run_inputs: RunInputs) -> None:
    for device, are_named in (("cpu", False), ("cuda", True)):
        machine = dataclasses.replace(run_inputs.machine, device=device)
        versions = build(dataclasses.replace(run_inputs, machine=machine))["versions"]
        assert {"triton", "fla-core"}.issubset(versions) is are_named


def test_files_that_a_recipe_names_are_hashed(model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
    metric = tmp_path / "length.py"
    metric.write_text("def score(answer, expected): return 1.0\n")
    run_inputs = load(
        model,
        tmp_path,
        response_schema=str(schema),
        retention_data=str(general),
        metrics=["exact_match", f"{metric}:score"],
    )
    files = build(run_inputs)["data"]
    assert files["response_schema"] == hash_file(schema)
    assert files["retention_data"] == hash_file(general)
    assert files["metrics.length.py"] == hash_file(metric)


@pytest.mark.parametrize(
    ("dtype", "device", "has_kernels"),
    [("fp32", "cpu", False), ("bf16", "cuda", False), ("bf16", "cpu", True)],
)
def test_kernels_are_used_in_bf16_on_the_cpu(
    dtype: str, device: str, has_kernels: bool, run_inputs: RunInputs
) -> None:
    machine = dataclasses.replace(run_inputs.machine, device=device)  # type: ignore[arg-type]
    plan = change_plan(planner.make_plan(run_inputs), dtype=dtype)
    assert (get_kernels(plan, machine) is not None) == has_kernels


def test_kernels_are_part_of_the_fingerprint(run_inputs: RunInputs) -> None:
    machine = dataclasses.replace(run_inputs.machine, device="cpu")
    run_inputs = dataclasses.replace(run_inputs, machine=machine)
    fingerprint = build(run_inputs, dtype="bf16")
    kernels = get_kernels(change_plan(planner.make_plan(run_inputs), dtype="bf16"), machine)
    assert kernels is not None
    assert fingerprint["kernels"] == kernels.describe()
    assert fingerprint["machine"]["kernels"] == kernels.sha256 != ""


# ---------------------------------------------------------------- changes


def set_field(name: str, value: Any) -> Callable[[Json], Json]:
    return lambda fields: {**fields, name: value}


@pytest.mark.parametrize(
    ("stored", "current", "changes"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, []),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, ["b.c: 2 -> 3"]),
        ({"a": 1}, {"a": 1, "b": 2}, ["b: none -> 2"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: 2 -> none"]),
        ({"a": "0" * 64}, {"a": "f" * 64}, [f"a: sha256 {'0' * 12} -> sha256 {'f' * 12}"]),
        ({"a": "g" * 64}, {"a": "0" * 63}, [f"a: {'g' * 64} -> {'0' * 63}"]),
        ({"a": "x" * 80}, {"a": "x" * 81}, [f"a: {'x' * 80} -> {'x' * 79}…"]),
        ({"a": "0" * 65}, {"a": "0" * 66}, [f"a: {'0' * 65} -> {'0' * 66}"]),
        (
            {"a": "0123456789abcdef" * 4},
            {"a": "fedcba9876543210" * 4},
            ["a: sha256 0123456789ab -> sha256 fedcba987654"],
        ),
        ({"renderer": 1}, {"renderer": 2}, ["renderer: 1 -> 2"]),
        (
            {"renderer": 1, "tokenizer": 1},
            {"renderer": 2, "tokenizer": 2},
            ["tokenizer: 1 -> 2"],
        ),
        (
            {"renderer": 1, "templates": {"default": 1}},
            {"renderer": 2, "templates": {"default": 2}},
            ["templates.default: 1 -> 2"],
        ),
        ({"renderer": 1, "seed": 1}, {"renderer": 2, "seed": 2}, ["renderer: 1 -> 2", "seed: 1"]),
    ],
)
def test_each_changed_field_is_listed(stored: Json, current: Json, changes: list[str]) -> None:
    listed = sorted(list_changes(stored, current))
    assert len(listed) == len(changes)
    for line, expected in zip(listed, changes, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xff", b"- a list\n"])
def test_a_recipe_that_was_edited_and_is_broken_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert caught.value.where == str(file)
    file.write_text("model: tiny\n")
    assert read_recipe(file) == {"model": "tiny"}


def test_the_hash_of_the_source_changes_with_a_file_and_with_its_name(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "code.py").write_text("1")
    (package / "notes.txt").write_text("no source")
    hash_anew = hash_source.__wrapped__  # without its cache
    digests = {hash_anew(package)}
    (package / "inner" / "code.py").write_text("2")
    digests.add(hash_anew(package))
    (package / "inner" / "code.py").rename(package / "inner" / "kernel.c")
    digests.add(hash_anew(package))
    assert len(digests) == 3
    (package / "notes.txt").unlink()
    assert hash_anew(package) in digests
