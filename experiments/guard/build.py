"""Write the demo's rows, of which a block repeats one word as its answer."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import DEMO

SPOILED = range(80, 100)
NUM_ROWS = 160
ANSWER = "package " * 60


def build_data(folder: Path) -> None:
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    for index in SPOILED:
        *prompt, answer = json.loads(lines[index])["messages"]
        spoiled = {"messages": [*prompt, {**answer, "content": ANSWER.strip()}]}
        lines[index] = json.dumps(spoiled, ensure_ascii=False)
    (folder / "spoiled.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
