"""Does the choice train better? Short runs on each subset from the same start, told apart on held-out rows.

    Plan, Facts, the folder of `data curate` -> try_subsets -> Trained ...; conclude -> Proof

The kept rows, random ones and the longest, of one size, and the whole: one base load, as many steps of as many rows
each, with the plan's values. A second seed draws other random rows and takes all in another order; values of a held-out
row are then means over the seeds. Nothing is measured on `test_data`, and rehearsal is left out. Intervals are of
held-out rows; how far seeds differ is told beside them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.advise.curate import SCORES
from tunesmith.advise.lr_finder import selecting_items, some_of
from tunesmith.core.atomic import read_manifest
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import StepResult
from tunesmith.core.types import Comparison, Document, Plan
from tunesmith.data.sampler import Schedule
from tunesmith.data.selection import ROLE, drawn
from tunesmith.evaluate.measure import Items, eval_measurement
from tunesmith.evaluate.results import Measurement, compare, score
from tunesmith.evaluate.significance import verdict
from tunesmith.model.adapters import put_back, weights_of
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench, set_up
from tunesmith.train.loop import Settings, Training

STEPS = 30
HELD_OUT_TOKENS = 16_000
KEPT, WHOLE = "kept", "whole"


@dataclass(frozen=True, eq=False)
class Trained:
    """One short run; `name` is empty for the model before any."""

    name: str
    seed: int
    rows: int
    tokens: int  # that were trained on, answers alone
    held_out: Measurement


@dataclass(frozen=True)
class Arm:
    """One subset, over all seeds. `against`: the kept rows beside it, by held-out row (`after` is the kept rows);
    `by_seed` their difference in each seed. None and empty for the kept rows themselves."""

    name: str
    rows: int
    tokens: int  # in a run
    loss: float
    low: float
    high: float
    against: Comparison | None
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Of the kept rows against these: better, worse, or no difference shown."""
        return "" if self.against is None else verdict(self.against)


@dataclass(frozen=True)
class Proof:
    steps: int
    batch_size: int
    seeds: int
    items: int  # held-out rows
    metric: str
    base: float  # before any training
    arms: tuple[Arm, ...]


def try_subsets(plan: Plan, facts: Facts, folder: Path, *, steps: int = STEPS, seeds: int = 1) -> Iterator[Trained]:
    """The untrained model first, then every subset with every seed. Raises InputError without held-out rows, and for a
    folder of other rows."""
    items = held_out_items(plan, facts)
    subsets = read_subsets(facts, folder)
    bench = set_up(plan, facts)
    start = weights_of(bench.model.network)
    yield Trained("", 0, 0, 0, eval_measurement(bench, items))
    settings = dataclasses.replace(Settings.of(plan), steps=steps, warmup_steps=steps // 10)
    for seed in range(plan["seed"], plan["seed"] + seeds):
        for name, rows in subsets.items():
            if name == "random" and seed > plan["seed"]:
                rows = drawn(subsets[WHOLE], len(rows), seed)
            put_back(bench.model.network, start)
            documents_of = _documents_of(bench, rows, steps, seed)
            tokens = _train(Training(bench.model, documents_of, settings), name)
            yield Trained(name, seed, len(rows), tokens, eval_measurement(bench, items))


def held_out_items(plan: Plan, facts: Facts) -> Items:
    """Raises InputError without any."""
    items = selecting_items(plan, facts)
    if not items.eval_documents:
        what = "no held-out rows to tell the subsets apart by; test_data is for the end"
        raise InputError(what, where="data curate --prove", fix="give eval_data, or --eval-split 0.1")
    return some_of(items, HELD_OUT_TOKENS)


def read_subsets(facts: Facts, folder: Path) -> dict[str, np.ndarray]:
    """Rows of each file that `data curate` wrote, and of the whole: what can be trained on."""
    data = facts.datasets[ROLE]
    if read_manifest(folder).get("source") != data.fingerprint:
        raise InputError("the folder was made of other rows", where=str(folder), fix="choose again")
    subsets: dict[str, list[int]] = {KEPT: [], "random": [], "longest": [], WHOLE: []}
    places = {data.id(row): row for row in range(len(data))}
    for line in (folder / SCORES).read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if told["id"] not in places:
            raise InputError(f"{told['id']} is not in the data", where=str(folder / SCORES), fix="choose again")
        for name in (*told["files"], *([WHOLE] if told["perplexity"] is not None else ())):
            subsets[name].append(places[told["id"]])
    return {name: np.array(rows, dtype=np.int64) for name, rows in subsets.items()}


def _documents_of(bench: Workbench, rows: np.ndarray, steps: int, seed: int) -> Callable[[int], Sequence[Document]]:
    batch = bench.plan["batch_size"]
    epochs = math.ceil(steps * batch / len(rows))
    schedule = Schedule(rows=len(rows), batch_size=batch, epochs=epochs, seed=seed, max_steps=steps)
    return lambda step: [one for place in schedule.rows_of(step) for one in bench.rows.documents(int(rows[place]))]


def _train(training: Training, name: str) -> int:
    """Tokens of the answers. Raises GateError where losses are no numbers."""
    try:
        return sum(event.supervised_tokens for event in training if isinstance(event, StepResult))
    except GateError as error:
        where, fix = f"data curate --prove, {name}", "lower learning_rate: `tunesmith tune lr` tries five"
        raise GateError(error.what, where=where, fix=fix) from error


# ---------------------------------------------------------------- what is concluded


def conclude(plan: Plan, trained: Sequence[Trained], steps: int) -> Proof:
    """`trained` as `try_subsets` gave them, after so many steps."""
    untrained, *runs = trained
    by_name: dict[str, list[Trained]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    base, seeds = score(untrained.held_out), len(by_name[KEPT])
    return Proof(
        steps=steps,
        batch_size=plan["batch_size"],
        seeds=seeds,
        items=base.n,
        metric=untrained.held_out.metric,
        base=base.value,
        arms=tuple(_arm(name, found, by_name) for name, found in by_name.items()),
    )


def _arm(name: str, runs: Sequence[Trained], by_name: Mapping[str, Sequence[Trained]]) -> Arm:
    own, kept = mean_of([run.held_out for run in runs]), by_name[KEPT]
    told = score(own)
    against, by_seed = None, ()
    if name != KEPT:
        against = compare(own, mean_of([run.held_out for run in kept]))
        pairs = zip(runs, kept, strict=True)
        by_seed = tuple(compare(run.held_out, of_kept.held_out).difference for run, of_kept in pairs)
    tokens = round(sum(run.tokens for run in runs) / len(runs))
    return Arm(name, runs[0].rows, tokens, told.value, told.low, told.high, against, by_seed)


def mean_of(measured: Sequence[Measurement]) -> Measurement:
    """Of one measure on the same items, item by item."""
    values = np.mean([one.values for one in measured], axis=0)
    return dataclasses.replace(measured[0], values=tuple(values.tolist()))
