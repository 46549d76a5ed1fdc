"""Write the rows of the recipe in three forms: good ones alone, bad ones as targets, and held-out
prompts with the rule in the system message."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import RECIPES

from tunesmith.core.types import Json

ROWS = RECIPES / "data" / "constraints"
RULE = "Never apologise, and never say that you are an AI, a language model or a program."


def build_data(folder: Path) -> None:
    rows = _read_rows(ROWS / "train.jsonl")
    good = [row for row in rows if not row.get("negative")]
    bad = [row for row in rows if row.get("negative")]
    _write_rows(folder / "positives.jsonl", good)
    # `negative: false` says that the match is right, so it is trained
    targets = [{**row, "negative": False} for row in bad]
    _write_rows(folder / "targets.jsonl", [*good, *targets])
    prompted = [_add_rule(row) for row in _read_rows(ROWS / "test.jsonl")]
    _write_rows(folder / "test.jsonl", prompted)


def _add_rule(row: Json) -> Json:
    return {**row, "messages": [{"role": "system", "content": RULE}, *row["messages"]]}


def _read_rows(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(path: Path, rows: list[Json]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
