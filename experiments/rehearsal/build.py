"""Write topics of the Python reference, some held out, and the demo's general text in two parts."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from experiments.definitions import DEMO

MAX_CHARS = 6000
MIN_CHARS = 500
HELD_OUT = 5  # every so many topics
MEASURED = 4  # every so many general texts measure forgetting
DOMAIN = "reference"  # of the general texts: it is what is trained


def build_data(folder: Path) -> None:
    # some topics have two names
    texts = dict.fromkeys(text[:MAX_CHARS] for text in topics.values() if len(text) > MIN_CHARS)
    topic_rows = [json.dumps({"text": text}) for text in texts]
    lines = (DEMO / "general.jsonl").read_text(encoding="utf-8").splitlines()
    general = [line for line in lines if json.loads(line)["domain"] != DOMAIN]
    _write_lines(folder / "held-out.jsonl", topic_rows[::HELD_OUT])
    trained = [row for index, row in enumerate(topic_rows) if index % HELD_OUT]
    _write_lines(folder / "topics.jsonl", trained)
    _write_lines(folder / "general.jsonl", general[::MEASURED])
    rehearsed = [line for index, line in enumerate(general) if index % MEASURED]
    _write_lines(folder / "rehearsed.jsonl", rehearsed)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
