"""Build the folders of the ten tasks from packages of Debian.

    python -m benchmarks.tasks.build [NAME ...] [--out build/tasks] [--cache build/packages]

Out: OUT/NAME/ with train.jsonl, test.jsonl, eval.jsonl where a user would have one, and recipe.yaml
with what a first user writes; table.md. Rows are divided by group, in an order by hash: no group is
in two files, and the same packages give the same bytes. The id of a row begins with its group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from benchmarks.tasks.make import TASKS, Row, Task
from benchmarks.tasks.sources import fetch

ROOT = Path(__file__).parents[2]
OUT, CACHE = ROOT / "build" / "tasks", ROOT / "build" / "packages"
MODEL = "smollm2-135m-instruct"
Part = list[tuple[str, Row]]


def build(name: str, task: Task, cache: Path, out: Path) -> Path:
    """Write the folder of one task. Raises ValueError if the packages have too few rows."""
    folder = out / name
    parts = split_rows(name, task, cache)
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = [json.dumps({"id": key, **row}, ensure_ascii=False) + "\n" for key, row in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = [f"model: {MODEL}\n", "data: train.jsonl\n"]
    recipe += ["eval_data: eval.jsonl\n"] * ("eval" in parts) + ["test_data: test.jsonl\n"]
    (folder / "recipe.yaml").write_text("".join(recipe) + task.recipe, encoding="utf-8")
    return folder


def split_rows(name: str, task: Task, cache: Path) -> dict[str, Part]:
    """Return the rows of each file: whole groups, in an order by hash."""
    groups: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for group, row in task.make(cache):
        prompt = _get_prompt(row)
        if prompt not in seen:
            seen.add(prompt)
            groups.setdefault(group, []).append(row)
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{name} {group}".encode()).digest())
    sizes = {"test": task.test, "eval": task.eval, "train": task.train}
    parts: dict[str, Part] = {part: [] for part, size in sizes.items() if size}
    remaining = iter(order)
    for part, rows in parts.items():
        answers: Counter[str] = Counter()
        most = max(1, task.per_label * sizes[part] // task.train)
        for group in remaining:
            for row in groups[group][: task.per_group]:
                answer = str(row.get("completion"))
                answers[answer] += 1
                if answers[answer] <= most and len(rows) < sizes[part]:
                    rows.append((f"{group}/{len(rows)}", row))
            if len(rows) == sizes[part]:
                break
        if len(rows) < sizes[part]:
            raise ValueError(f"{name}: {len(rows)} rows for {part}, {sizes[part]} are needed")
    return parts


def _get_prompt(row: Row) -> str:
    messages = row.get("messages")
    if isinstance(messages, list):
        return json.dumps(messages[:-1])
    return str(row.get("input") or row.get("prompt") or row.get("text"))


def describe(folder: Path) -> str:
    """Return the line of a task in the table."""
    task = TASKS[folder.name]
    counts, groups = [], []
    for part in ("train", "eval", "test"):
        path = folder / f"{part}.jsonl"
        if path.exists():
            ids = [json.loads(line)["id"] for line in path.read_text("utf-8").splitlines()]
            counts.append(str(len(ids)))
            groups.append(str(len({key.rpartition("/")[0] for key in ids})))
    cells = (folder.name, task.kind, ", ".join(task.packages), task.licence)
    return f"| {' | '.join((*cells, ' + '.join(counts), ' + '.join(groups), task.metric))} |"


HEAD = "| task | kind | packages | license | rows | groups | metric |\n" + "|---" * 7 + "|\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the folders of the ten tasks.")
    parser.add_argument("names", nargs="*", choices=[[], *TASKS], metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    lines = []
    for name in args.names or TASKS:
        fetch(TASKS[name].packages, args.cache)
        lines.append(describe(build(name, TASKS[name], args.cache, args.out)) + "\n")
        print(lines[-1], end="", flush=True)
    if not args.names:
        (args.out / "table.md").write_text(HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
