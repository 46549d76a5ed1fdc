"""The cases of docs/advise.md that are measured, from the package records of this Debian machine.

    python benchmarks/build_advise_cases.py FOLDER
    tunesmith advise --measure FOLDER/link.yaml
    tunesmith advise --measure FOLDER/section.yaml
    tunesmith advise --measure FOLDER/homepages.yaml --documents FOLDER/records

link       the homepage of a package, read off its record: the answer stands in the question, whatever is around it
section    the section of a package, read off its record: the answer stands in the question, in exactly that word
homepages  the homepage of a package by its name: few are known to a model, and the records hold them

Rows are packages drawn by a hash of their name; held-out ones are other packages. The records are those of all of them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

TRAIN, HELD_OUT, TEST = 400, 80, 20
KEPT = ("Package", "Version", "Section", "Priority", "Installed-Size", "Maintainer", "Homepage", "Description")
RECIPE = "model: smollm2-135m-instruct\ndata: {0}.train.jsonl\neval_data: {0}.eval.jsonl\ntest_data: {0}.test.jsonl\n"


def records() -> list[dict[str, str]]:
    """Of the newest version of each package, in an order by chance."""
    printed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, str]] = {}
    for block in printed.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(" ")]
        fields = {key: value for key, _, value in lines if value}
        if {"Package", "Homepage", "Section", "Description"} <= fields.keys():
            found[fields["Package"]] = fields
    return sorted(found.values(), key=lambda one: hashlib.sha256(one["Package"].encode()).hexdigest())


def written(record: dict[str, str]) -> str:
    return "\n".join(f"{key}: {record[key]}" for key in KEPT if key in record)


def row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def main(folder: Path) -> None:
    chosen = records()[: TRAIN + HELD_OUT + TEST]
    asked = {
        "link": [row(f"{written(one)}\n\nWhat is the homepage?", one["Homepage"]) for one in chosen],
        "section": [row(f"{written(one)}\n\nWhich section?", one["Section"]) for one in chosen],
        "homepages": [
            row(f"What is the homepage of the Debian package {one['Package']}?", one["Homepage"]) for one in chosen
        ],
    }
    (folder / "records").mkdir(parents=True, exist_ok=True)
    (folder / "records" / "records.txt").write_text("\n\n".join(map(written, chosen)) + "\n", encoding="utf-8")
    parts = {"train": slice(0, TRAIN), "eval": slice(TRAIN, TRAIN + HELD_OUT), "test": slice(TRAIN + HELD_OUT, None)}
    for name, rows in asked.items():
        metric = "exact_match" if name == "section" else "contains"
        (folder / f"{name}.yaml").write_text(f"{RECIPE.format(name)}metrics: [{metric}]\n", encoding="utf-8")
        for part, places in parts.items():
            (folder / f"{name}.{part}.jsonl").write_text("".join(rows[places]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
