"""Run the guard on healthy runs and on runs with an injected fault, and list its alarms.

    python -m benchmarks.train.guard [--cases CASE ...] [--seed 0] [--steps 24] [--every 6]

Out: detector, step and number of probes until the alarm (docs/results/guard.md). Short runs of
SmolLM2-135M-Instruct on three tasks: JSON from changelog entries (the demo), names in CamelCase, a
three-way label of a function. No run is rolled back, so that all alarms are listed. `--values FILE`
writes every event as a line of JSON, to calibrate thresholds on other seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.types import Batch, Document, Json
from tunesmith.evaluate.items import load_general_texts
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.session import open_session
from tunesmith.train.guard.probes import GenerationProbe, build_prompt_set
from tunesmith.train.guard.training_guard import TrainingGuard
from tunesmith.train.loop import TrainingLoop

DEMO, TASKS = DEMO_RECIPE.parent, Path(__file__).parents[2] / "recipes" / "data" / "tasks"
BAD_STEPS = range(10, 13)  # with randomize_answers rows; the first one is the NaN step
MODEL = "smollm2-135m-instruct"
QUESTIONS = {
    "names": "Write the name {name} in CamelCase.",
    "returns": "What does a call of this Python function give: "
    "a value, nothing or a generator?\n\n{code}",
}


def read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_rows(task: str) -> tuple[list[Json], list[Json]]:
    """Return training and held-out rows as conversations."""
    if task == "json":
        return read_lines(DEMO / "train.jsonl"), read_lines(DEMO / "eval.jsonl")
    return tuple(
        [
            {
                "messages": [
                    {"role": "user", "content": QUESTIONS[task].format(**row)},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in read_lines(TASKS / name)
        ]
        for name in (f"{task}.jsonl", f"{task}-test.jsonl")
    )  # type: ignore[return-value]


# ---------------------------------------------------------------- faults

Change = Callable[[list[Json], random.Random], list[Json]]


def replace_answer(row: Json, answer: str) -> Json:
    return {"messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}


def shuffle_answers(rows: list[Json], chance: random.Random) -> list[Json]:
    """Permute the answers of a fifth of the rows."""
    indices = chance.sample(range(len(rows)), len(rows) // 5)
    answers = [rows[index]["messages"][-1]["content"] for index in indices]
    moved = dict(zip(indices, answers[1:] + answers[:1], strict=True))
    return [replace_answer(row, moved[i]) if i in moved else row for i, row in enumerate(rows)]


def repeat_answer(rows: list[Json], chance: random.Random) -> list[Json]:
    del chance
    return [replace_answer(row, rows[0]["messages"][-1]["content"]) for row in rows]


def remove_ends(documents: Sequence[Document]) -> list[Document]:
    """Remove supervision from the end token of each document."""
    changed: list[Document] = []
    for document in documents:
        weights_L = document.weights_L.copy()
        weights_L[np.flatnonzero(weights_L)[-1]] = 0
        changed.append(dataclasses.replace(document, weights_L=weights_L))
    return changed


def randomize_answers(documents: Sequence[Document], vocabulary: int) -> list[Document]:
    """Replace the answers by random tokens."""
    chance = np.random.default_rng(0)
    changed: list[Document] = []
    for document in documents:
        tokens_L = document.tokens_L.copy()
        places = np.flatnonzero(document.weights_L)[:-1]
        tokens_L[places] = chance.integers(1000, vocabulary, len(places))
        changed.append(dataclasses.replace(document, tokens_L=tokens_L))
    return changed


def inject_nan(training: TrainingLoop) -> None:
    """Make the hidden states of a step NaN."""
    hidden = PackedCausalLM.compute_hidden

    def compute_nan_hidden(model: PackedCausalLM, batch: Batch) -> Tensor:
        broken = model.network.training and training.step + 1 == BAD_STEPS[0]
        return hidden(model, batch) * (math.nan if broken else 1)

    training.model.compute_hidden = compute_nan_hidden.__get__(training.model)  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Case:
    task: str
    method: str = "lora"
    times: float = 1.0  # factor of the planned learning rate
    fault: str = ""


HEALTHY = {
    f"{task}, {method}, {times:g}x": Case(task, method, times)
    for method in ("lora", "full")
    for task in ("json", "names", "returns")
    for times in (1.0, 2.0)
    if (method, task) != ("full", "json")
}
FAULTS = {
    "rate 30x": Case("names", times=30),
    "rate 30x, json": Case("json", times=30),
    "20% shuffled": Case("names", fault="shuffled"),
    "one answer": Case("names", fault="one answer"),
    "no ends": Case("names", fault="no ends"),
    "corrupt block": Case("names", fault="corrupt"),
    "NaN": Case("names", fault="nan"),
}
CASES = HEALTHY | FAULTS
CHANGES: dict[str, Change] = {"shuffled": shuffle_answers, "one answer": repeat_answer}


# ---------------------------------------------------------------- one run


def make_recipe(case: Case, folder: Path, seed: int, steps: int, every: int, **more: Any) -> Recipe:
    trained, held_out = load_rows(case.task)
    if case.fault in CHANGES:
        trained = CHANGES[case.fault](trained, random.Random(seed))
    files = {}
    for role, rows in (("data", trained), ("eval_data", held_out[: len(held_out) // 2 * 2])):
        files[role] = str(folder / f"{role}.jsonl")
        Path(files[role]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    values = {
        "model": MODEL,
        "method": case.method,
        "batch_size": 4,
        "max_steps": steps,
        "seed": seed,
    }
    values |= {
        "retention_data": str(DEMO / "general.jsonl"),
        "output_dir": str(folder / "run"),
        **files,
    }
    return Recipe.model_validate(
        values | {"guard": {"probe_steps": every}, "num_train_epochs": 3} | more
    )


def run_case(
    case: Case, seed: int, steps: int, every: int, keep: Callable[[Event], None]
) -> list[CheckResult]:
    """Run a case and return all alarms."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        run_inputs = inputs.load_inputs(make_recipe(case, folder, seed, steps, every))
        rate = min(1.0, case.times * planner.make_plan(run_inputs).config.learning_rate)
        run_inputs = inputs.load_inputs(
            make_recipe(case, folder, seed, steps, every, learning_rate=rate)
        )
        return collect_alarms(case, run_inputs, every, keep)


def collect_alarms(
    case: Case, run_inputs: inputs.RunInputs, every: int, keep: Callable[[Event], None]
) -> list[CheckResult]:
    plan = planner.make_plan(run_inputs)
    session = open_session(plan, run_inputs)
    chosen = build_prompt_set(plan, run_inputs, load_general_texts(run_inputs))
    assert chosen is not None
    guard, probes, alarms = (
        TrainingGuard.from_plan(plan, is_probing=True),
        GenerationProbe(session, chosen),
        list[CheckResult](),
    )

    def load_documents(step: int) -> Sequence[Document]:
        documents = session.load_documents(step)
        if case.fault == "no ends":
            return remove_ends(documents)
        return (
            randomize_answers(documents, 40_000)
            if case.fault == "corrupt" and step in BAD_STEPS
            else documents
        )

    training = TrainingLoop(session.model, load_documents, plan.config, steps=plan.steps)
    if case.fault == "nan":
        inject_nan(training)

    def probe(step: int) -> None:
        session.model.network.eval()
        for event in (
            *(probes.measure_expected() if step == 0 else ()),
            *probes.run_probe(step, training.optimizer),
        ):
            keep(event)
            guard.observe_event(event)
        alarms.extend(guard.judge_probe(step))

    probe(0)
    for event in training:
        keep(event)
        alarms += [event] if isinstance(event, CheckResult) else guard.observe_event(event)
        if isinstance(event, TrainStep) and event.step % every == 0:
            probe(event.step)
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--values", type=Path)
    args = parser.parse_args()
    print("| run | alarm | step | probes |\n|---|---|---|---|")
    for name in args.cases:
        began = time.perf_counter()

        def keep(event: Event, name: str = name) -> None:
            if args.values:
                with args.values.open("a") as file:
                    file.write(
                        json.dumps(
                            {
                                "run": name,
                                "event": type(event).__name__,
                                **dataclasses.asdict(event),
                            }
                        )
                        + "\n"
                    )

        alarms = run_case(CASES[name], args.seed, args.steps, args.every, keep)
        for alarm in alarms or [None]:
            shown = "none" if alarm is None else f"{alarm.kind} ({alarm.level}): {alarm.evidence}"
            at, after = (
                ("", "") if alarm is None else (alarm.step, math.ceil(alarm.step / args.every))
            )
            print(f"| {name} | {shown} | {at} | {after} |", flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
