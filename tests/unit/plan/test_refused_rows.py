"""`plan` refuses the rows that `train` refuses, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import build_sum_rows, write_rows
from tunesmith.cli.app import main

LONG = {
    "messages": [
        {"role": "user", "content": "long " * 30},
        {"role": "assistant", "content": "yes"},
    ]
}
Change = Callable[[Path], dict[str, Any]]


def write_recipe(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "data": str(write_rows(tmp_path / "train.jsonl", build_sum_rows(0, 10))),
        "eval_data": str(write_rows(tmp_path / "eval.jsonl", build_sum_rows(200, 16))),
        "output_dir": str(tmp_path / "run"),
    }


REFUSED: dict[str, Change] = {
    "all rows over max_length": lambda _: {"max_length": 30},
    "half of the rows over max_length": lambda path: {
        "data": str(write_rows(path / "a.jsonl", [*build_sum_rows(0, 5), *[LONG] * 5])),
        "max_length": 60,
    },
    "an invalid row": lambda path: {
        "data": str(write_rows(path / "b.jsonl", [*build_sum_rows(0, 5), {"messages": 3}]))
    },
    "test rows are trained": lambda path: {
        "test_data": str(write_rows(path / "e.jsonl", build_sum_rows(0, 4)))
    },
}


def run_command(tmp_path: Path, recipe: dict[str, Any], *command: str) -> int | None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    verb, *flags = command
    with pytest.raises(SystemExit) as stop:
        main([verb, str(tmp_path / "recipe.yaml"), *flags, "--json"])
    assert stop.value.code is None or isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_the_rows_that_train_refuses(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe = write_recipe(tiny_folder, tmp_path) | REFUSED[name](tmp_path)
    messages: list[str] = []
    for command in (["train"], ["plan"], ["plan", "--compare"]):
        assert run_command(tmp_path, recipe, *command) == 2
        messages.append(json.loads(capsys.readouterr().out)["error"]["message"])
    assert len(set(messages)) == 1, messages


def test_plan_accepts_what_a_run_accepts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*build_sum_rows(0, 9), {"messages": 3}]
    data = str(write_rows(tmp_path / "f.jsonl", rows))
    recipe = write_recipe(tiny_folder, tmp_path) | {"data": data, "skip_invalid": True}
    assert not run_command(tmp_path, recipe, "plan")
    assert json.loads(capsys.readouterr().out)["data"]["data"]["rejected"]
