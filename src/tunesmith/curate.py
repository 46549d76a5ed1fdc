"""A candidate set of a few good rows, chosen by the base model itself, beside the subsets that it has to beat.

    Facts, how many -> curate -> a folder: kept.jsonl, random.jsonl, longest.jsonl, scores.jsonl

scores.jsonl has a line for each row of the data: its scores, whether it is kept, else why not. Which rows are chosen is
decided in data/choose.py. Left out: whether the choice trains better, which only training on each of them shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.atomic import new_folder
from tunesmith.data.choose import ROLE, Scores, baselines, choose, faults
from tunesmith.data.dataset import Dataset
from tunesmith.data.divide import line_of
from tunesmith.data.scan import batches
from tunesmith.errors import InputError
from tunesmith.evaluate.likelihood import negative_log_likelihoods
from tunesmith.facts import Facts
from tunesmith.jsonfile import json_bytes
from tunesmith.model.load import DTYPES, LanguageModel, adopt, load_network
from tunesmith.types import Document, Json

PACK = 2048  # tokens that are computed at once
SHOWN = 12  # kinds of reasons


@dataclass(frozen=True)
class Subset:
    """One file of rows, in numbers; of the scores the median."""

    name: str
    rows: int
    answer_tokens: float
    perplexity: float
    difficulty: float
    shared: int  # rows that are in kept.jsonl too


@dataclass(frozen=True)
class Curated:
    path: str
    subsets: tuple[Subset, ...]
    reasons: dict[str, int]  # kind of reason -> rows that are not kept for it


def curate(facts: Facts, keep: int, path: Path) -> Curated:
    """Raises InputError for a folder that is there already, rows without answers, and nothing to choose from."""
    data = facts.datasets[ROLE]
    _check(facts, keep, path)
    held_out = {role: rows for role, rows in facts.datasets.items() if role != ROLE}
    left_out = faults(data, held_out)
    dtype = DTYPES["bf16" if facts.machine.bf16_matmul else "fp32"]
    model = adopt(load_network(facts.model.path, dtype, facts.machine.device), dtype)
    scores = score(model, data)
    kept, reasons = choose(data, scores, left_out, keep)
    if not len(kept):
        what = f"no row is good enough: {_counted(reasons)}"
        raise InputError(what, where=data.path, fix="look at the rows with `tunesmith data check`")
    subsets = {"kept": kept, **baselines(scores, len(data), len(kept), facts.recipe.seed)}
    with new_folder(
        path, facts={"source": data.fingerprint, "model": facts.model.name, "keep": keep}, key="--to"
    ) as to:
        for name, rows in subsets.items():
            with (to / f"{name}.jsonl").open("wb") as file:
                file.writelines(line_of(data, int(row)) for row in rows)
        with (to / "scores.jsonl").open("wb") as file:
            file.writelines(json_bytes(line) for line in _lines(data, scores, kept, reasons))
    told = tuple(_told(name, rows, scores, kept) for name, rows in subsets.items())
    return Curated(str(path), told, dict(Counter(map(_kind, reasons.values())).most_common()))


def _check(facts: Facts, keep: int, path: Path) -> None:
    data = facts.datasets[ROLE]
    if facts.recipe.stage != "sft" or any(part.format == "text" for part in data.parts):
        fix = "give questions with answers, and `stage: sft`"
        raise InputError("rows are chosen by how questions help to answer, and these have none", where="data", fix=fix)
    if keep >= len(data):
        what = f"--keep {keep:,} of {len(data):,} rows leaves nothing to choose"
        raise InputError(what, where="data curate", fix="keep fewer")
    if path.exists():
        raise InputError("it is there already", where=str(path), fix="name another folder with --to, or remove it")


# ---------------------------------------------------------------- scores


def score(model: LanguageModel, data: Dataset) -> Scores:
    """The last answer of every row, behind its question and alone."""
    data = data.limited(model.context_length, "drop")
    nats_N2, tokens_N = np.full((len(data), 2), np.nan), np.zeros(len(data), dtype=np.int64)
    problems: dict[int, str] = {}
    for rows in batches(data, range(len(data))):
        documents: list[Document] = []
        places: list[tuple[int, int]] = []
        for row, draft in zip(rows, data.drafts(rows), strict=True):
            prepared = data.understand(row, draft)[1]
            if not prepared.documents:
                problems[row] = prepared.dropped
                continue
            document, first = last_answer(prepared.documents[-1])
            documents += [document, alone(document, first)]
            places += [(row, 0), (row, 1)]
            tokens_N[row] = np.count_nonzero(document.weights_L)
        for number, nats, _ in negative_log_likelihoods(model, documents, PACK):
            nats_N2[places[number]] = nats
    counts_N = np.maximum(1, tokens_N)
    return Scores(
        perplexity_N=np.exp(nats_N2[:, 0] / counts_N),
        difficulty_N=np.exp((nats_N2[:, 0] - nats_N2[:, 1]) / counts_N),
        answer_tokens_N=tokens_N,
        problems=problems,
    )


def last_answer(document: Document) -> tuple[Document, int]:
    """The document up to its last trained run, with that run alone as targets of equal weight; and where it begins."""
    trained = np.flatnonzero(document.weights_L > 0)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    first, last = int(trained[breaks[-1] + 1 if len(breaks) else 0]), int(trained[-1])
    weights_L = np.zeros(last + 1, dtype=np.float32)
    weights_L[first:] = 1
    return Document(document.id, document.tokens_L[: last + 1], weights_L), first


def alone(document: Document, first: int) -> Document:
    """The answer without its question: behind the one token before it, which the template wrote."""
    return dataclasses.replace(
        document, tokens_L=document.tokens_L[first - 1 :], weights_L=document.weights_L[first - 1 :]
    )


# ---------------------------------------------------------------- what is said of them


def _lines(data: Dataset, scores: Scores, kept: np.ndarray, reasons: dict[int, str]) -> Iterator[Json]:
    chosen = set(kept.tolist())
    for row in range(len(data)):
        numbers = {"perplexity": scores.perplexity_N[row], "difficulty": scores.difficulty_N[row]}
        yield {
            "id": data.id(row),
            "kept": row in chosen,
            "reason": reasons.get(row, ""),
            **{name: None if math.isnan(value) else round(float(value), 4) for name, value in numbers.items()},
            "answer_tokens": int(scores.answer_tokens_N[row]),
        }


def _told(name: str, rows: np.ndarray, scores: Scores, kept: np.ndarray) -> Subset:
    medians = (
        np.nanmedian(values[rows]) for values in (scores.answer_tokens_N, scores.perplexity_N, scores.difficulty_N)
    )
    return Subset(name, len(rows), *map(float, medians), shared=len(np.intersect1d(rows, kept)))


def _kind(reason: str) -> str:
    """A reason without what is of the one row."""
    if reason.startswith("says what "):
        return "says what another row says"
    return "like a row that is kept" if reason.startswith("like ") else reason.partition(":")[0]


def _counted(reasons: dict[int, str]) -> str:
    counts = Counter(map(_kind, reasons.values())).most_common(SHOWN)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)
