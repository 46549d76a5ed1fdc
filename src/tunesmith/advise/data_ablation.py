"""Test whether the selected rows train better: short runs on each subset from the same start.

    plan, inputs, the folder of `data curate` -> train_subsets -> ShortRuns, ShortRunTable

The selected rows, random ones and the longest, equally many, and all rows: equally many steps and
rows per step, with the settings of the plan. A second seed draws other random rows and another
order; values of a held-out row are then means over the seeds. There is no rehearsal. Intervals are
over held-out rows; the differences by seed are reported next to them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tunesmith.advise.curate import SCORES_FILE, SELECTED
from tunesmith.advise.short_runs import ShortRun, ShortRuns, ShortRunTable, build_table
from tunesmith.core.atomic import read_manifest
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import parse_as
from tunesmith.core.types import Document, Plan, require
from tunesmith.data.readers.sources import open_source
from tunesmith.data.sampler import StepSampler
from tunesmith.data.selection import ROLE, sample_rows
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session

STEPS = 30
ALL_ROWS = "all"
AGAIN_FIX = "run `tunesmith data curate` again"
_FileName = Literal["selected", "random", "longest"]


@dataclass(frozen=True)
class _ScoreLine:
    """Hold what is read of a line of scores.jsonl."""

    id: str
    files: tuple[_FileName, ...]
    perplexity: float | None


def train_subsets(
    plan: Plan, inputs: RunInputs, folder: Path, *, steps: int = STEPS, seeds: int = 1
) -> Iterator[ShortRun | ShortRunTable]:
    """Yield the untrained model, every subset with every seed, and the table.

    Raises InputError without held-out rows, and for a folder made from other rows; GateError for a
    run that collapses.
    """
    subsets = read_subsets(inputs, folder)
    runs = ShortRuns(plan, inputs)
    untrained = runs.measure_start()
    yield untrained
    trained: list[ShortRun] = []
    for seed in range(plan.config.seed, plan.config.seed + seeds):
        for name, rows in subsets.items():
            if name == "random" and seed > plan.config.seed:
                rows = sample_rows(subsets[ALL_ROWS], len(rows), seed)
            load_documents = _make_document_loader(runs.session, rows, steps, seed)
            run = runs.train(name, plan.config, load_documents, steps)
            if run.problem:
                where = f"data curate --ablate, {name}"
                fix = "lower learning_rate: `tunesmith tune lr` tests five"
                raise GateError(run.problem, where=where, fix=fix)
            trained.append(dataclasses.replace(run, seed=seed, rows=len(rows)))
            yield trained[-1]
    yield build_table(plan, untrained, trained, SELECTED, steps)


def read_subsets(inputs: RunInputs, folder: Path) -> dict[str, np.ndarray]:
    """Return the trainable rows of each file that `data curate` wrote, and of all data."""
    data = inputs.datasets[ROLE]
    if read_manifest(folder).get("source") != data.fingerprint:
        message = "the folder was made from other rows"
        raise InputError(message, where=str(folder), fix=AGAIN_FIX)
    subsets: dict[str, list[int]] = {name: [] for name in (*get_args(_FileName), ALL_ROWS)}
    rows_by_id = {data.get_id(row): row for row in range(len(data))}
    lines = open_source(folder / SCORES_FILE)
    for index in range(len(lines)):
        where = lines.get_id(index)
        line = parse_as(_ScoreLine, lines.read_row(index).data, where=where, fix=AGAIN_FIX)
        row = rows_by_id.get(line.id)
        if row is None:
            raise InputError(f"{line.id:.80} is not in the data", where=where, fix=AGAIN_FIX)
        for name in line.files:
            subsets[name].append(row)
        if line.perplexity is not None:
            subsets[ALL_ROWS].append(row)
    return {name: np.array(rows, dtype=np.int64) for name, rows in subsets.items()}


def _make_document_loader(
    session: Session, rows: np.ndarray, steps: int, seed: int
) -> Callable[[int], Sequence[Document]]:
    batch_size = require(session.plan.config.batch_size)
    epochs = math.ceil(steps * batch_size / len(rows))
    sampler = StepSampler(
        num_rows=len(rows), batch_size=batch_size, epochs=epochs, seed=seed, max_steps=steps
    )

    def load_documents(step: int) -> list[Document]:
        documents: list[Document] = []
        for index in sampler.get_rows(step):
            documents += session.rows.render_documents(int(rows[index]))
        return documents

    return load_documents
