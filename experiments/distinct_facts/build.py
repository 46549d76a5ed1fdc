"""Write on which day each package was uploaded, in ten wordings, the questions in another wording,
and the changelog entries for retrieval, each of which is one passage."""

from __future__ import annotations

import json
import re
from pathlib import Path

from experiments.definitions import DEMO

from tunesmith.advise.measured.retrieval import split_passages

NUM_FACTS = 60
FORMAT = "Answer like 05 Jan 2020."
QUESTION = "Tell me the day of the {package} {version} upload."
WORDINGS = (
    "When was {package} {version} uploaded to Debian?",
    "On which day was version {version} of {package} uploaded?",
    "Name the day on which {package} {version} came to Debian.",
    "{package} {version} was uploaded when?",
    "Debian got {package} {version} on which day?",
    "What is the date of {package} {version}?",
    "Which date does the changelog of {package} {version} have?",
    "The changelog entry of {package} {version} ends with which date?",
    "When did {package} {version} appear?",
    "On which day did the developer release {package} {version} in Debian?",
)
ENTRY = re.compile(
    r"(?P<package>\S+) \((?P<version>[^)]+)\).*\n -- .+?  \w{3}, (?P<day>\d\d \w{3} \d{4}) ",
    re.DOTALL,
)


def build_data(folder: Path) -> None:
    """Take the first entries whose package and day no earlier one has."""
    trained: list[str] = []
    questions: list[str] = []
    entries: list[str] = []
    known: set[str] = set()
    for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines():
        text = re.sub(r"\n\s*\n", "\n", json.loads(line)["messages"][1]["content"])
        match = ENTRY.match(text)
        if match is None:
            raise ValueError(f"no date in {text!r}")
        is_long = len(list(split_passages(text))) > 1
        if is_long or not known.isdisjoint((match["package"], match["day"])):
            continue
        known |= {match["package"], match["day"]}
        names = {"package": match["package"], "version": match["version"]}
        trained += [_build_row(wording.format(**names), match["day"]) for wording in WORDINGS]
        questions.append(_build_row(QUESTION.format(**names), match["day"]))
        entries.append(json.dumps({"text": text}, ensure_ascii=False))
        if len(questions) == NUM_FACTS:
            break
    for name, lines in {"ten": trained, "questions": questions, "entries": entries}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _build_row(question: str, answer: str) -> str:
    turns = [
        {"role": "user", "content": f"{question} {FORMAT}"},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": turns}, ensure_ascii=False)
