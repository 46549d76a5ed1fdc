"""Runs, scales and checkpoints answer as their evaluation does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tiny_runs import make_tiny_recipe, train, write_eval_files
from tiny_server import LiveServer, make_chat, make_settings, read_metric, serving, wait_for
from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.evaluate.compare_models import EvalSpec, evaluate_model
from tunesmith.evaluate.model_ref import parse_model_ref
from tunesmith.serve.routes import CheckRules, build_rules
from tunesmith.serve.server import prepare_server
from tunesmith.serve.settings import read_settings
from tunesmith.serve.sources import open_adapter

SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


@pytest.fixture(scope="module")
def run(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with checkpoints, a schema and test rows."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    changes: dict[str, Any] = write_eval_files(folder)
    recipe = make_tiny_recipe(
        writer, folder, num_train_epochs=2, save_steps=3, learning_rate=0.05,
        guard="off", response_schema=str(folder / "schema.json"),
        never=[{"match": "[QXZ]{9}"}], **changes,
    )  # fmt: skip
    train(recipe)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> Iterator[LiveServer]:
    models = {
        "json": {"from": str(run), "constrain": True},
        "free": {"from": str(run)},
        "half": {"from": f"{run}@0.5"},
        "early": {"from": str(run / "checkpoints" / "step-3")},
    }
    routes = {"prod": {"arms": {"free": 100}}}
    with serving(make_settings(models, routes=routes)) as server:
        yield server


def answer_items(live: LiveServer, model: str, run: Path) -> list[str]:
    """Return the greedy answers to the run's test rows, up to 32 tokens."""
    samples = read_json(run / "eval_after.json")["samples"]
    answers: list[str] = []
    with live.client() as http:
        for sample in samples:
            body = make_chat(model, temperature=0, max_tokens=32) | {
                "messages": [{"role": "user", "content": sample["prompt"]}]
            }
            response = http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"][0]["message"]["content"])
    return answers


@pytest.mark.promise
def test_a_run_is_proven_and_found_by_its_own_base(trained: LiveServer) -> None:
    with trained.client() as http:
        models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert models["free"]["tunesmith"]["unproven"] is False
    assert models["free"]["tunesmith"]["run"] == "run"
    assert models["half"]["root"] == models["free"]["root"]
    assert models["half"]["tunesmith"]["scale"] == 0.5
    assert models["early"]["root"] != models["free"]["root"]
    assert models["json"]["tunesmith"]["schema"]


@pytest.mark.promise
def test_the_runs_schema_is_the_default_of_a_constrained_model(trained: LiveServer) -> None:
    num_complete = 0
    with trained.client() as http:
        for seed in range(4):
            body = make_chat("json", seed=seed, max_tokens=60)
            response = http.post("/v1/chat/completions", json=body)
            choice = response.json()["choices"][0]
            is_complete = choice["finish_reason"] == "stop"
            state = "complete" if is_complete else "open"
            assert response.headers["x-tunesmith-schema"] == state
            if is_complete:
                jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
                num_complete += 1
            free = make_chat("json", seed=seed, max_tokens=9, response_format={"type": "text"})
            assert "x-tunesmith-schema" not in http.post("/v1/chat/completions", json=free).headers
    assert num_complete


def test_a_route_checks_what_the_run_has_promised(trained: LiveServer) -> None:
    registry = trained.server.registry
    rules = build_rules(registry.get("free"), registry.get("early"))
    assert rules.schema == SCHEMA
    assert [constraint.match for constraint in rules.constraints] == ["[QXZ]{9}"]  # once
    assert build_rules(registry.get("base"), None) == CheckRules()
    with trained.client() as http:  # no grammar: two tokens are no object
        http.post("/v1/chat/completions", json=make_chat("prod", max_tokens=2))

    def count(check: str, result: str) -> float:
        return read_metric(trained, "route_checks_total", check=check, result=result)

    wait_for(lambda: count("violated", "ok") == 1)
    assert count("schema_invalid", "bad") == 1


@pytest.mark.parametrize(
    ("model", "ref"), [("free", ""), ("half", "@0.5"), ("early", "/checkpoints/step-3")]
)
def test_answers_are_those_of_eval(model: str, ref: str, trained: LiveServer, run: Path) -> None:
    model_ref = parse_model_ref(f"{run}{ref}")
    results = evaluate_model(model_ref, model_ref, EvalSpec())
    served = answer_items(trained, model, run)
    assert len(served) == len(results.samples) == 3
    for sample, answer in zip(results.samples, served, strict=True):
        assert sample.answer.startswith(answer)  # `eval` allows longer answers
        assert len(answer) >= 16


def test_a_schema_to_follow_is_part_of_the_fingerprint(trained: LiveServer) -> None:
    with trained.client() as http:
        bodies = [
            http.post("/v1/chat/completions", json=make_chat(name, max_tokens=1)).json()
            for name in ("free", "free", "json")
        ]
    first, second, constrained = (body["system_fingerprint"] for body in bodies)
    assert first == second != constrained


def test_a_checkpoint_that_is_served_again_leaves_the_first_as_it_is(
    trained: LiveServer, run: Path
) -> None:
    base = trained.server.registry.base
    first, second = (open_adapter(str(run / "checkpoints" / "step-3"), base) for _ in range(2))
    assert hash_file(first.folder.weights_path) == first.folder.sha256
    assert first.digest == second.digest


def test_weights_that_the_run_did_not_write_are_refused(
    trained: LiveServer, run: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(run, tmp_path / "copy") / "adapter"
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors was changed"):
        open_adapter(str(adapter.parent), trained.server.registry.base)


@pytest.mark.parametrize(
    ("ref", "message"), [("/checkpoints/step-99", "no such checkpoint"), ("@7", "invalid scale")]
)
def test_what_a_run_does_not_have(ref: str, message: str, run: Path, tmp_path: Path) -> None:
    settings = read_settings([f"{run}{ref}"], port=0, keys=tmp_path / "keys.json")
    with pytest.raises(InputError, match=message):
        prepare_server(settings)
