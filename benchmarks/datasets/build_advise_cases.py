"""Build the measured cases of docs/results/advise.md from the package records of a Debian machine.

    python benchmarks/datasets/build_advise_cases.py FOLDER
    tunesmith advise --measure FOLDER/link.yaml
    tunesmith advise --measure FOLDER/section.yaml
    tunesmith advise --measure FOLDER/homepages.yaml --documents FOLDER/records
    tunesmith advise --measure FOLDER/capitals.yaml

link       the homepage of a package, copied from its record in the question
section    the section of a package, copied from its record in the question
homepages  the homepage of a package by name: a model knows few, the records hold all
capitals   capitals of countries, from capitals.txt: facts that a small model knows in part

Rows are ordered by a hash of their name; held-out rows are about other packages or countries.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

NUM_TRAIN = 400
NUM_EVAL = 80
NUM_TEST = 20
NUM_CAPITALS_EVAL = 24
NUM_CAPITALS_TEST = 6
FIELDS = (
    *("Package", "Version", "Section", "Priority", "Installed-Size", "Maintainer"),
    *("Homepage", "Description"),
)
RECIPE = """\
model: smollm2-135m-instruct
data: {name}.train.jsonl
eval_data: {name}.eval.jsonl
test_data: {name}.test.jsonl
metrics: [{metric}]
"""


def load_records() -> list[dict[str, str]]:
    """Return the fields of the newest version of each package, in the order of a hash."""
    command = ["apt-cache", "dumpavail"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records: dict[str, dict[str, str]] = {}
    for block in output.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(" ")]
        fields = {key: value for key, _, value in lines if value}
        if {"Package", "Homepage", "Section", "Description"} <= fields.keys():
            records[fields["Package"]] = fields
    return sorted(records.values(), key=lambda record: hash_name(record["Package"]))


def hash_name(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def make_capital_rows() -> list[str]:
    lines = Path(__file__).with_name("capitals.txt").read_text(encoding="utf-8").splitlines()
    pairs = sorted((line.split(": ") for line in lines), key=lambda pair: hash_name(pair[0]))
    return [make_row(f"What is the capital of {country}?", capital) for country, capital in pairs]


def format_record(record: dict[str, str]) -> str:
    return "\n".join(f"{key}: {record[key]}" for key in FIELDS if key in record)


def make_row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def write_case(
    folder: Path, name: str, rows: list[str], *, num_eval: int, num_test: int, metric: str
) -> None:
    """Write the recipe of a case and its three data files."""
    recipe = RECIPE.format(name=name, metric=metric)
    (folder / f"{name}.yaml").write_text(recipe, encoding="utf-8")
    num_train = len(rows) - num_eval - num_test
    splits = {
        "train": rows[:num_train],
        "eval": rows[num_train : num_train + num_eval],
        "test": rows[num_train + num_eval :],
    }
    for split, split_rows in splits.items():
        (folder / f"{name}.{split}.jsonl").write_text("".join(split_rows), encoding="utf-8")


def main(folder: Path) -> None:
    links: list[str] = []
    sections: list[str] = []
    homepages: list[str] = []
    records = load_records()[: NUM_TRAIN + NUM_EVAL + NUM_TEST]
    for record in records:
        text = format_record(record)
        homepage = record["Homepage"]
        links.append(make_row(f"{text}\n\nWhat is the homepage?", homepage))
        sections.append(make_row(f"{text}\n\nWhich section?", record["Section"]))
        question = f"What is the homepage of the Debian package {record['Package']}?"
        homepages.append(make_row(question, homepage))
    (folder / "records").mkdir(parents=True, exist_ok=True)
    texts = "\n\n".join(map(format_record, records)) + "\n"
    (folder / "records" / "records.txt").write_text(texts, encoding="utf-8")
    sizes = {"num_eval": NUM_EVAL, "num_test": NUM_TEST}
    write_case(folder, "link", links, **sizes, metric="contains")
    write_case(folder, "section", sections, **sizes, metric="exact_match")
    write_case(folder, "homepages", homepages, **sizes, metric="contains")
    sizes = {"num_eval": NUM_CAPITALS_EVAL, "num_test": NUM_CAPITALS_TEST}
    write_case(folder, "capitals", make_capital_rows(), **sizes, metric="contains")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
