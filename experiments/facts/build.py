"""Write who uploaded each package, in one wording and in ten, the questions in another wording, and
the changelog entries for retrieval."""

from __future__ import annotations

import json
import re
from pathlib import Path

from experiments.definitions import DEMO

NUM_FACTS = 60
QUESTION = "Tell me the name of the person behind the {package} {version} upload."
WORDINGS = (
    "Who uploaded {package} {version} to Debian?",
    "Which person uploaded version {version} of {package}?",
    "Name the uploader of {package} {version}.",
    "{package} {version} was uploaded by whom?",
    "Debian got {package} {version} from which developer?",
    "Whose upload was {package} {version}?",
    "Who signed the changelog of {package} {version}?",
    "The changelog entry of {package} {version} ends with which name?",
    "Who prepared {package} {version}?",
    "Which developer released {package} {version} in Debian?",
)
ENTRY = re.compile(r"(?P<package>\S+) \((?P<version>[^)]+)\).*\n -- (?P<name>.+?)  ", re.DOTALL)


def build_data(folder: Path) -> None:
    one_wording: list[str] = []
    ten_wordings: list[str] = []
    questions: list[str] = []
    entries: list[str] = []
    for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_FACTS]:
        text = json.loads(line)["messages"][1]["content"]
        match = ENTRY.match(text)
        if match is None:
            raise ValueError(f"no uploader in {text!r}")
        package = match["package"]
        version = match["version"]
        wordings = [wording.format(package=package, version=version) for wording in WORDINGS]
        one_wording.append(_build_row(wordings[0], match["name"]))
        ten_wordings += [_build_row(question, match["name"]) for question in wordings]
        question = QUESTION.format(package=package, version=version)
        questions.append(_build_row(question, match["name"]))
        entries.append(json.dumps({"text": text}, ensure_ascii=False))
    lines_by_file = {
        "one": one_wording,
        "ten": ten_wordings,
        "questions": questions,
        "entries": entries,
    }
    for name, lines in lines_by_file.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _build_row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)
