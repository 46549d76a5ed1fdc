"""The cases of docs/guides/advise.md that are measured, from the package records of this Debian
machine.

    python benchmarks/datasets/build_advise_cases.py FOLDER
    tunesmith advise --measure FOLDER/link.yaml
    tunesmith advise --measure FOLDER/section.yaml
    tunesmith advise --measure FOLDER/homepages.yaml --documents FOLDER/records
    tunesmith advise --measure FOLDER/capitals.yaml

link       the homepage of a package, read off its record: the answer stands in the question,
whatever is around it section    the section of a package, read off its record: the answer stands in
the question, in exactly that word homepages  the homepage of a package by its name: few are known
to a model, and the records hold them capitals   of countries, from capitals.txt: facts that a small
model knows in part

Rows are drawn by a hash of their name; held-out ones are other packages or countries. The records
are those of all packages."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

TRAIN, HELD_OUT, TEST = 400, 80, 20
CAPITALS_HELD_OUT, CAPITALS_TEST = 24, 6
KEPT = (
    "Package",
    "Version",
    "Section",
    "Priority",
    "Installed-Size",
    "Maintainer",
    "Homepage",
    "Description",
)
RECIPE = "model: smollm2-135m-instruct\ndata: {0}.train.jsonl\neval_data: {0}.eval.jsonl\ntest_data: {0}.test.jsonl\n"


def records() -> list[dict[str, str]]:
    """Of the newest version of each package, in an order by chance."""
    printed = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, str]] = {}
    for block in printed.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(" ")]
        fields = {key: value for key, _, value in lines if value}
        if {"Package", "Homepage", "Section", "Description"} <= fields.keys():
            found[fields["Package"]] = fields
    return sorted(found.values(), key=lambda one: by_chance(one["Package"]))


def by_chance(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def capitals() -> list[str]:
    lines = Path(__file__).with_name("capitals.txt").read_text(encoding="utf-8").splitlines()
    pairs = sorted((line.split(": ") for line in lines), key=lambda pair: by_chance(pair[0]))
    return [row(f"What is the capital of {country}?", capital) for country, capital in pairs]


def written(record: dict[str, str]) -> str:
    return "\n".join(f"{key}: {record[key]}" for key in KEPT if key in record)


def row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def main(folder: Path) -> None:
    chosen = records()[: TRAIN + HELD_OUT + TEST]
    asked = {
        "link": [
            row(f"{written(one)}\n\nWhat is the homepage?", one["Homepage"]) for one in chosen
        ],
        "section": [row(f"{written(one)}\n\nWhich section?", one["Section"]) for one in chosen],
        "homepages": [
            row(f"What is the homepage of the Debian package {one['Package']}?", one["Homepage"])
            for one in chosen
        ],
    }
    (folder / "records").mkdir(parents=True, exist_ok=True)
    (folder / "records" / "records.txt").write_text(
        "\n\n".join(map(written, chosen)) + "\n", encoding="utf-8"
    )
    for name, rows in asked.items():
        write(
            folder, name, rows, HELD_OUT, TEST, "exact_match" if name == "section" else "contains"
        )
    write(folder, "capitals", capitals(), CAPITALS_HELD_OUT, CAPITALS_TEST, "contains")


def write(folder: Path, name: str, rows: list[str], held_out: int, test: int, metric: str) -> None:
    (folder / f"{name}.yaml").write_text(
        f"{RECIPE.format(name)}metrics: [{metric}]\n", encoding="utf-8"
    )
    train = len(rows) - held_out - test
    parts = {
        "train": rows[:train],
        "eval": rows[train : train + held_out],
        "test": rows[train + held_out :],
    }
    for part, of_part in parts.items():
        (folder / f"{name}.{part}.jsonl").write_text("".join(of_part), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
