"""What the guard says to healthy runs, and to runs with a fault: which detector, at which step,
after how many probes.

    python -m benchmarks.train.guard [--cases CASE ...] [--seed 0] [--steps 24] [--every 6] [--values FILE]

Short runs of SmolLM2-135M-Instruct on three tasks: JSON from changelog entries (the demo), names in
CamelCase, one word of three about a function. No run goes back: all that would be said is listed.
`--values` keeps every number as a line of JSON, to fix bounds on other seeds than those reported.
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
from tunesmith.session import inputs
from tunesmith.session.session import open_session
from tunesmith.train.guard.detectors import TrainingGuard
from tunesmith.train.guard.probes import GenerationProbe, build_prompt_set
from tunesmith.train.loop import TrainingLoop

DEMO, TASKS = DEMO_RECIPE.parent, Path(__file__).parents[2] / "recipes" / "data" / "tasks"
BAD_STEPS = range(10, 13)  # of a corrupt block, and of a step that is no number
MODEL = "smollm2-135m-instruct"
ASKED = {
    "names": "Write the name {name} in CamelCase.",
    "returns": "What does a call of this Python function give: a value, nothing or a generator?\n\n{code}",
}


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(task: str) -> tuple[list[Json], list[Json]]:
    """Training rows and held-out ones, as conversations."""
    if task == "json":
        return lines(DEMO / "train.jsonl"), lines(DEMO / "eval.jsonl")
    return tuple(
        [
            {
                "messages": [
                    {"role": "user", "content": ASKED[task].format(**row)},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in lines(TASKS / name)
        ]
        for name in (f"{task}.jsonl", f"{task}-test.jsonl")
    )  # type: ignore[return-value]


# ---------------------------------------------------------------- faults

Change = Callable[[list[Json], random.Random], list[Json]]


def answered(row: Json, answer: str) -> Json:
    return {"messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}


def shuffled(rows: list[Json], chance: random.Random) -> list[Json]:
    """A fifth of the rows have each other's answers."""
    places = chance.sample(range(len(rows)), len(rows) // 5)
    given = [rows[place]["messages"][-1]["content"] for place in places]
    moved = dict(zip(places, given[1:] + given[:1], strict=True))
    return [answered(row, moved[i]) if i in moved else row for i, row in enumerate(rows)]


def one_answer(rows: list[Json], chance: random.Random) -> list[Json]:
    del chance
    return [answered(row, rows[0]["messages"][-1]["content"]) for row in rows]


def without_ends(documents: Sequence[Document]) -> list[Document]:
    """The last target of each document, which ends it, is not trained."""
    found: list[Document] = []
    for document in documents:
        weights_L = document.weights_L.copy()
        weights_L[np.flatnonzero(weights_L)[-1]] = 0
        found.append(dataclasses.replace(document, weights_L=weights_L))
    return found


def corrupt(documents: Sequence[Document], vocabulary: int) -> list[Document]:
    """Answers of random tokens."""
    chance = np.random.default_rng(0)
    found: list[Document] = []
    for document in documents:
        tokens_L = document.tokens_L.copy()
        places = np.flatnonzero(document.weights_L)[:-1]
        tokens_L[places] = chance.integers(1000, vocabulary, len(places))
        found.append(dataclasses.replace(document, tokens_L=tokens_L))
    return found


def no_number(training: TrainingLoop) -> None:
    """Hidden states of one step are NaN."""
    hidden = PackedCausalLM.compute_hidden

    def poisoned(model: PackedCausalLM, batch: Batch) -> Tensor:
        broken = model.network.training and training.step + 1 == BAD_STEPS[0]
        return hidden(model, batch) * (math.nan if broken else 1)

    training.model.compute_hidden = poisoned.__get__(training.model)  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Case:
    task: str
    method: str = "lora"
    times: float = 1.0  # the learning rate of the plan
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
CHANGES: dict[str, Change] = {"shuffled": shuffled, "one answer": one_answer}


# ---------------------------------------------------------------- one run


def recipe_of(case: Case, folder: Path, seed: int, steps: int, every: int, **more: Any) -> Recipe:
    trained, held_out = rows_of(case.task)
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


def followed(
    case: Case, seed: int, steps: int, every: int, keep: Callable[[Event], None]
) -> list[CheckResult]:
    """All that is said in a run of so many steps."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        known = inputs.load_inputs(recipe_of(case, folder, seed, steps, every))
        rate = min(1.0, case.times * inputs.make_plan(known).config.learning_rate)
        known = inputs.load_inputs(recipe_of(case, folder, seed, steps, every, learning_rate=rate))
        return said_in(case, known, every, keep)


def said_in(
    case: Case, known: inputs.RunInputs, every: int, keep: Callable[[Event], None]
) -> list[CheckResult]:
    plan = inputs.make_plan(known)
    bench = open_session(plan, known)
    chosen = build_prompt_set(plan, known, load_general_texts(known))
    assert chosen is not None
    guard, probes, said = (
        TrainingGuard.from_plan(plan, is_probing=True),
        GenerationProbe(bench, chosen),
        list[CheckResult](),
    )

    def documents_of(step: int) -> Sequence[Document]:
        documents = bench.load_documents(step)
        if case.fault == "no ends":
            return without_ends(documents)
        return (
            corrupt(documents, 40_000)
            if case.fault == "corrupt" and step in BAD_STEPS
            else documents
        )

    training = TrainingLoop(bench.model, documents_of, plan.config, steps=plan.steps)
    if case.fault == "nan":
        no_number(training)

    def probe(step: int) -> None:
        bench.model.network.eval()
        for event in (
            *(probes.measure_expected() if step == 0 else ()),
            *probes.run_probe(step, training.optimizer),
        ):
            keep(event)
            guard.observe_event(event)
        said.extend(guard.judge_probe(step))

    probe(0)
    for event in training:
        keep(event)
        said += [event] if isinstance(event, CheckResult) else guard.observe_event(event)
        if isinstance(event, TrainStep) and event.step % every == 0:
            probe(event.step)
    return said


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
    given = parser.parse_args()
    print("| run | said | at step | after probes |\n|---|---|---|---|")
    for name in given.cases:
        began = time.perf_counter()

        def keep(event: Event, name: str = name) -> None:
            if given.values:
                with given.values.open("a") as file:
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

        said = followed(CASES[name], given.seed, given.steps, given.every, keep)
        for one in said or [None]:
            shown = "nothing" if one is None else f"{one.kind} ({one.level}): {one.evidence}"
            at, after = ("", "") if one is None else (one.step, math.ceil(one.step / given.every))
            print(f"| {name} | {shown} | {at} | {after} |", flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
