"""Write the demo's rows one by one, and the same rows joined into conversations of four."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.definitions import DEMO

NUM_ROWS = 80
ROWS_PER_PACK = 4


def build_data(folder: Path) -> None:
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    (folder / "single.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [json.loads(line)["messages"] for line in lines]
    joined: list[str] = []
    for start in range(0, len(rows), ROWS_PER_PACK):
        messages = [message for row in rows[start : start + ROWS_PER_PACK] for message in row]
        joined.append(json.dumps({"messages": messages}, ensure_ascii=False))
    (folder / "joined.jsonl").write_text("\n".join(joined) + "\n", encoding="utf-8")
