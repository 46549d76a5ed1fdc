"""Each method lowers the loss of held-out answers in a few steps of SmolLM2 on the demo."""

import json
from pathlib import Path
from typing import Any

import pytest

from effect_seeds import SEEDS, Record
from tiny_runs import train, write_rows
from tunesmith.api import read_record
from tunesmith.core.types import Comparison, Json
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.recipe.schema import Recipe

METHODS: dict[str, Json] = {
    "qlora": {"method": "qlora"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_r": 64, "lora_alpha": 64},
    "full": {"method": "full", "optim": "adamw_8bit", "learning_rate": 3e-5},
}
SIZE = {"model": "smollm2-135m-instruct", "batch_size": 4, "max_steps": 8, "warmup_ratio": 0.1}


def load_demo_rows(role: str, count: int) -> list[Json]:
    lines = DEMO_RECIPE.with_name(f"{role}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def train_and_compare(
    folder: Path, train_rows: list[Json], test_rows: list[Json], **settings: Any
) -> dict[str, Comparison]:
    files = {
        "data": str(write_rows(folder / "train.jsonl", train_rows)),
        "test_data": str(write_rows(folder / "test.jsonl", test_rows)),
        "output_dir": str(folder / "run"),
    }
    train(Recipe.model_validate(SIZE | files | settings))
    return {comparison.metric: comparison for comparison in read_record(folder / "run").comparisons}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_held_out_answers_get_likelier(
    method: str, seed: int, tmp_path: Path, record: Record
) -> None:
    settings = METHODS[method] | {"seed": seed, "metrics": ["bits_per_byte"]}  # without answers
    loss = train_and_compare(
        tmp_path, load_demo_rows("train", 32), load_demo_rows("test", 12), **settings
    )["loss"]
    record(loss)
    assert loss.after.n == 12
    assert loss.high < 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_new_tokens_are_learned(seed: int, tmp_path: Path, record: Record) -> None:
    """New tokens enclose every answer; after training, held-out answers begin with one."""
    train_rows = [add_record_tokens(row) for row in load_demo_rows("train", 32)]
    test_rows = [add_record_tokens(row) for row in load_demo_rows("test", 12)]
    settings = {
        "add_tokens": ["[record]", "[/record]"],
        "metrics": [{"regex": r"^\[record\]"}],
        "max_steps": 16,
    }
    changes = train_and_compare(tmp_path, train_rows, test_rows, seed=seed, **settings)
    loss = changes["loss"]
    starts_right = next(change for name, change in changes.items() if name.startswith("regex"))
    record(loss)
    record(starts_right)
    assert loss.after.n == starts_right.after.n == 12
    assert loss.high < 0
    assert starts_right.low > 0


def add_record_tokens(row: Json) -> Json:
    *prompt, answer = row["messages"]
    return {"messages": [*prompt, {**answer, "content": f"[record]{answer['content']}[/record]"}]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_preferred_answers_are_told_apart(seed: int, tmp_path: Path, record: Record) -> None:
    """Of two forms of an answer, the one that is less likely under the base model is preferred."""
    settings = {"stage": "preference", "learning_rate": 1e-4, "seed": seed}
    margin = train_and_compare(
        tmp_path, build_pairs("train", 32), build_pairs("test", 12), **settings
    )["margin"]
    record(margin)
    assert margin.after.n == 12
    assert margin.low > 0


def build_pairs(role: str, count: int) -> list[Json]:
    rows = [row["messages"] for row in load_demo_rows(role, count)]
    return [
        {
            "prompt": row[:-1],
            "chosen": [{**row[-1], "content": format_plain(row[-1]["content"])}],
            "rejected": row[-1:],
        }
        for row in rows
    ]


def format_plain(answer: str) -> str:
    """Return one line per field instead of JSON."""
    return "\n".join(f"{key}: {value}" for key, value in json.loads(answer).items())
