"""Write rows with long and with short answers, and the same rows weighted by their lengths."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import DEMO, RECIPES

from tunesmith.core.types import Json

NUM_ROWS = 80  # of each kind
PROMPT = "{code}\n\nDoes this return a value or nothing, or is it a generator? Answer in one word."
CHARS_PER_TOKEN = 2.2  # of the demo's JSON, which is mostly digits and names


def build_data(folder: Path) -> None:
    rows: list[Json] = []
    long_lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    short_file = RECIPES / "data" / "tasks" / "returns.jsonl"
    short_lines = short_file.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    for long_line, short_line in zip(long_lines, short_lines, strict=True):
        rows.append(json.loads(long_line))
        rows.append(_build_short_row(json.loads(short_line)))
    _write_rows(folder / "rows.jsonl", rows)
    for row in rows:
        answer = row["messages"][-1]
        answer["weight"] = 1 / (1 + len(answer["content"]) / CHARS_PER_TOKEN)
    _write_rows(folder / "weighted.jsonl", rows)


def _build_short_row(row: Json) -> Json:
    prompt = {"role": "user", "content": PROMPT.format(code=row["code"])}
    return {"messages": [prompt, {"role": "assistant", "content": row["completion"]}]}


def _write_rows(path: Path, rows: list[Json]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
