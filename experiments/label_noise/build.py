"""Write the demo's rows with a third and with half of the answers taken from other rows."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import DEMO

SHIFT = 61  # rows between a prompt and the answer that it gets


def build_data(folder: Path) -> None:
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    for name, every in (("half", 2), ("third", 3)):
        noisy: list[str] = []
        for index, (*prompt, answer) in enumerate(rows):
            is_wrong = index % every == 0
            chosen = rows[(index + SHIFT) % len(rows)][-1] if is_wrong else answer
            noisy.append(json.dumps({"messages": [*prompt, chosen]}, ensure_ascii=False))
        (folder / f"{name}.jsonl").write_text("\n".join(noisy) + "\n", encoding="utf-8")
