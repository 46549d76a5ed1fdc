"""Write the demo's rows, and the same prompts with the answers of other rows."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import DEMO

NUM_ROWS = 160
SHIFT = 61  # rows between a prompt and the answer that it gets


def build_data(folder: Path) -> None:
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    (folder / "right.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [json.loads(line)["messages"] for line in lines]
    shuffled: list[str] = []
    for index, (*prompt, _) in enumerate(rows):
        answer = rows[(index + SHIFT) % NUM_ROWS][-1]
        shuffled.append(json.dumps({"messages": [*prompt, answer]}, ensure_ascii=False))
    (folder / "shuffled.jsonl").write_text("\n".join(shuffled) + "\n", encoding="utf-8")
