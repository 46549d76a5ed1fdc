"""A run whose model and rows are on the hub reads the same ones when it is resumed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_server
from hub_server import HubServer
from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    read_adapter_bytes,
    run_until_saved,
    train,
)
from tunesmith import api
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import read_run_record
from tunesmith.recipe.load import load_recipe, read_recipe
from tunesmith.session import inputs, planner
from tunesmith.session.run_list import summarize_run
from tunesmith.train import run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path) -> Iterator[HubServer]:
    with hub_server.serve(monkeypatch, tmp_path / "home") as server:
        files = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
        server.add("model", "org/tiny", files)
        server.add("dataset", "org/rows", {"train.jsonl": encode(1, 6), "test.jsonl": encode(9, 4)})
        yield server


def encode(first: int, count: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in build_sum_rows(first, count)).encode()


@pytest.mark.promise
def test_a_resumed_run_reads_the_same_commit_without_network(
    hub: HubServer, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_tiny_recipe(tiny_folder, tmp_path / "local")
    train(local)

    path = tmp_path / "hub" / "run"
    recipe = make_tiny_recipe(
        Path("org/tiny"), tmp_path / "hub", data="hf://org/rows", save_steps=1
    )
    run_inputs = inputs.load_inputs(recipe)
    plan = planner.make_plan(run_inputs)
    rows = hub.repos["dataset", "org/rows"].refs["main"]
    weights = hub.repos["model", "org/tiny"].refs["main"]
    assert plan.model.name == "org/tiny"
    assert plan.data["data"].path == f"hf://org/rows@{rows[:12]}/train.jsonl"
    run_until_saved(iter(run.train(plan, run_inputs)), 1)

    hub.repos["dataset", "org/rows"].commit({"train.jsonl": encode(50, 6)})
    hub.repos["model", "org/tiny"].commit({"config.json": b"{}"})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for _ in run.resume(path):
        pass
    assert read_adapter_bytes(recipe) == read_adapter_bytes(local)
    stored = load_recipe(path / "recipe.yaml")
    assert stored.model == f"org/tiny@{weights}"  # type: ignore[union-attr]
    source = stored.data[0]  # type: ignore[union-attr]
    assert (source.revision, source.data_files) == (rows, ("train.jsonl",))
    fingerprint = read_json(path / "fingerprint.json")
    assert fingerprint["recipe"]["data"][0]["revision"] == rows
    assert read_run_record(path).plan.model.name == "org/tiny"
    assert summarize_run(path).model == "tiny"


def test_the_plan_says_that_the_hub_was_not_reached(
    hub: HubServer, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_tiny_recipe(tiny_folder, tmp_path, data="hf://org/rows")
    first = planner.make_plan(inputs.load_inputs(recipe))
    assert not any("hub" in warning for warning in first.warnings)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    second = planner.make_plan(inputs.load_inputs(recipe))
    assert any("the hub cannot be reached" in warning for warning in second.warnings)
    assert second.data == first.data
    assert hub.requests


def test_a_plan_needs_no_weights_and_says_that_a_run_downloads_them(
    hub: HubServer, tmp_path: Path
) -> None:
    recipe = make_tiny_recipe(Path("org/tiny"), tmp_path, data="hf://org/rows")
    plan = planner.make_plan(inputs.load_inputs(recipe, needs_weights=False))
    assert "model: the weights of org/tiny are downloaded when a run starts" in plan.warnings
    assert not any("model.safetensors" in request for request in hub.requests)


def test_nothing_is_written_into_the_cache_of_the_hub(hub: HubServer, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="a data set of the hub cannot be locked"):
        api.data_lock(model=str(tiny_folder), data="hf://org/rows")
    assert hub.requests


def test_one_limit_for_all_files_of_a_source(
    hub: HubServer, tiny_folder: Path, tmp_path: Path
) -> None:
    source = {"path": "hf://org/rows", "data_files": "*.jsonl", "max_examples": 5}
    recipe = make_tiny_recipe(tiny_folder, tmp_path, data=[source])
    rows = inputs.load_inputs(recipe).datasets["data"]
    ids = [rows.get_id(index) for index in range(len(rows))]
    assert ids == [*(f"test.jsonl:{line}" for line in range(1, 5)), "train.jsonl:1"]
    assert hub.requests


@pytest.mark.promise
@pytest.mark.usefixtures("hub")
def test_a_run_is_evaluated_on_rows_of_the_hub(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_tiny_recipe(tiny_folder, tmp_path / "local"))
    run_path = tmp_path / "local" / "run"
    file = tmp_path / "test.jsonl"
    file.write_bytes(encode(9, 4))
    expected = api.evaluate(run_path, data=file)
    assert api.evaluate(run_path, data="org/rows").scores == expected.scores
    assert expected.scores
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="'org/other' is not in its cache"):
        api.evaluate(run_path, data="org/other")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data sets of the hub are not read here"):
        read_recipe(model=str(tiny_folder), data=str(file), retention_data="org/rows")
