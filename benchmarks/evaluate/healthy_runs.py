"""Train the built-in model on small honest tasks, and count what the detectors say of it.

    python -m benchmarks.evaluate.healthy_runs [TASK ...]
    python -m benchmarks.evaluate.healthy_runs --guard ['names, lora, 2x' ...]

Out: a line per run for docs/results/shortcuts.md: the verdict, shortcuts after training, verdicts
of the guard other than ok, rollbacks, and the exact match before and after. Each task has 48
training rows of which every answer follows from the question; a run has 12 steps of 4 rows and
looks at 16 held-out rows after 6. With --guard, the runs are the ten healthy ones of
docs/results/guard.md, from their plan to their verdict. An alarm may be true, since a short run can
learn a constant: it prints its evidence.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.evaluate.shortcuts import WORDS
from benchmarks.train import guard

from tunesmith import api
from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.json_io import read_json
from tunesmith.recipe.schema import Recipe

MODEL = "smollm2-135m-instruct"
NUM_ROWS = {"train": 48, "eval": 16, "test": 24}
NUM_HELD_OUT = 20  # of the guard's runs: rows to evaluate on, and as many to test on
GENERAL_STRIDE = 5  # one of five general texts
Item = tuple[str, str]  # question, answer


def ask_sum(chance: random.Random) -> Item:
    first, second = chance.randrange(10), chance.randrange(10)
    return f"{first} + {second}", str(first + second)


def ask_parity(chance: random.Random) -> Item:
    number = chance.randrange(1000)
    return f"Is {number} even or odd?", "odd" if number % 2 else "even"


def ask_larger(chance: random.Random) -> Item:
    first, second = chance.sample(range(100), 2)
    return f"Which is larger, {first} or {second}?", str(max(first, second))


def ask_first_word(chance: random.Random) -> Item:
    words = chance.sample(WORDS, 5)
    return f"First word: {' '.join(words)}", words[0]


def ask_last_word(chance: random.Random) -> Item:
    words = chance.sample(WORDS, 5)
    return f"Last word: {' '.join(words)}", words[-1]


def ask_capitals(chance: random.Random) -> Item:
    words = " ".join(chance.sample(WORDS, 2))
    return f"In capitals: {words}", words.upper()


def ask_camel_case(chance: random.Random) -> Item:
    words = chance.sample(WORDS, 2)
    return f"Write {'_'.join(words)} in CamelCase.", "".join(map(str.title, words))


def ask_swap(chance: random.Random) -> Item:
    first, second = chance.sample(WORDS, 2)
    return f"Swap: {first} {second}", f"{second} {first}"


def ask_count(chance: random.Random) -> Item:
    words = chance.choices(WORDS, k=chance.randrange(2, 7))
    return f"How many words? {' '.join(words)}", str(len(words))


def ask_fields(chance: random.Random) -> Item:
    name, item = chance.sample(WORDS, 2)
    amount = chance.randrange(1, 6)
    is_urgent = chance.random() < 0.4
    question = f"{name} orders {amount} {item}{', at once' if is_urgent else ''}."
    return question, json.dumps({"name": name, "amount": amount, "urgent": is_urgent})


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "sum": ask_sum,
    "parity": ask_parity,
    "larger": ask_larger,
    "first word": ask_first_word,
    "last word": ask_last_word,
    "capitals": ask_capitals,
    "camel case": ask_camel_case,
    "swap": ask_swap,
    "count": ask_count,
    "fields": ask_fields,
}


def write_rows(folder: Path, task: str) -> None:
    chance = random.Random(task)
    seen: set[str] = set()
    for name, count in NUM_ROWS.items():
        rows: list[str] = []
        while len(rows) < count:
            question, answer = TASKS[task](chance)
            if question not in seen:
                seen.add(question)
                rows.append(json.dumps({"prompt": question, "completion": answer}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows))


def make_task_recipe(task: str, folder: Path) -> Recipe:
    write_rows(folder, task)
    return Recipe(
        model=MODEL,
        data=str(folder / "train.jsonl"),
        eval_data=str(folder / "eval.jsonl"),
        test_data=str(folder / "test.jsonl"),
        batch_size=4,
        max_steps=12,
        eval_steps=6,
        num_train_epochs=1,
        metrics=["exact_match"],
        output_dir=str(folder / "run"),
    )


def make_guard_recipe(name: str, folder: Path) -> Recipe:
    """Return a healthy run of benchmarks/train/guard.py; half of its held-out rows are tested."""
    case = guard.HEALTHY[name]
    _, held_out = guard.load_rows(case.task)
    files = {"eval_data": held_out[:NUM_HELD_OUT], "test_data": held_out[-NUM_HELD_OUT:]}
    files["retention_data"] = guard.read_lines(guard.DEMO / "general.jsonl")[::GENERAL_STRIDE]
    more: dict[str, object] = {"metrics": ["exact_match"], "eval_steps": 6}
    for role, rows in files.items():
        file = folder / f"{role}-half.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more[role] = str(file)
    recipe = guard.make_recipe(case, folder, seed=0, steps=24, every=6, **more)
    rate = case.times * api.plan(api.load_inputs(recipe)).config.learning_rate
    return recipe.model_copy(update={"learning_rate": rate})


def run_recipe(name: str, make_recipe: Callable[[str, Path], Recipe]) -> str:
    """Train a recipe and return its line of the table."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = api.plan(api.load_inputs(make_recipe(name, folder)))
        events = list(api.train(plan))
        record = read_json(folder / "run" / "record.json")
    alarms = [f"constant {shortcut['field']}" for shortcut in record["errors"]["shortcuts"]]
    alarms += [
        f"{event.kind}: {event.evidence}"
        for event in events
        if isinstance(event, CheckResult) and event.step and event.level != "ok"
    ]
    rollbacks = sum(isinstance(event, Rollback) for event in events)
    scores = [
        f"{comparison['before']['value']:.2f} -> {comparison['after']['value']:.2f}"
        for comparison in record["comparisons"]
        if comparison["metric"] == "exact_match"
    ]
    cells = [name, ", ".join(scores), record["verdict"]["name"], str(rollbacks)]
    return f"| {' | '.join([*cells, '; '.join(alarms) or 'none'])} |"


def main(words: list[str]) -> None:
    names = [word for word in words if word != "--guard"]
    make_recipe = make_guard_recipe if "--guard" in words else make_task_recipe
    print("| run | exact match | verdict | rollbacks | alarms |\n|---|---|---|---|---|", flush=True)
    for name in names or (guard.HEALTHY if "--guard" in words else TASKS):
        print(run_recipe(name, make_recipe), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
