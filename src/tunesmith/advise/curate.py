"""A candidate set of a few good rows, chosen by the base model itself, beside the subsets that it has to beat.

    Facts, how many -> curate -> a folder: kept.jsonl, random.jsonl, longest.jsonl, scores.jsonl

scores.jsonl has a line for each row of the data: its scores, the files it is in, and why it is not kept. Which rows are
chosen is decided in data/choose.py. Left out: whether the choice trains better (tune/prove.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.core.atomic import new_folder
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import json_bytes
from tunesmith.core.types import Document, Json
from tunesmith.data.checks.text_stats import row_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.group_split import line_of
from tunesmith.data.length_stats import batches
from tunesmith.data.neighbors import neighbours, unit, word_vectors
from tunesmith.data.selection import ROLE, Scores, baselines, choose, faults
from tunesmith.evaluate.loglikelihood import mean_states, negative_log_likelihoods
from tunesmith.model.causal_lm import DTYPES, LanguageModel, adopt, load_network
from tunesmith.session.inputs import Facts

PACK = 2048  # tokens that are computed at once
SHOWN = 12  # kinds of reasons
SCORES = "scores.jsonl"

LIKENESS = ("states", "words")  # by what rows are alike: the model's hidden states of their questions, their words


@dataclass(frozen=True)
class Subset:
    """One file of rows, in numbers; of the scores the median."""

    name: str
    rows: int
    answer_tokens: float
    perplexity: float
    difficulty: float
    agreement: float | None  # with the answers to the nearest questions; none of too few rows
    shared: int  # rows that are in kept.jsonl too


@dataclass(frozen=True)
class Curated:
    path: str
    subsets: tuple[Subset, ...]
    reasons: dict[str, int]  # kind of reason -> rows that are not kept for it


def curate(facts: Facts, keep: int, path: Path, likeness: str = "states") -> Curated:
    """Raises InputError for a folder that is there already, rows without answers, and nothing to choose from."""
    data = facts.datasets[ROLE]
    _check(facts, keep, path, likeness)
    held_out = {role: rows for role, rows in facts.datasets.items() if role != ROLE}
    left_out = faults(data, held_out)
    dtype = DTYPES["bf16" if facts.machine.bf16_matmul else "fp32"]
    model = adopt(load_network(facts.model.path, dtype, facts.machine.device), dtype)
    scores = score(model, data, likeness)
    kept, reasons = choose(data, scores, left_out, keep)
    if not len(kept):
        what = f"no row is good enough: {_counted(reasons)}"
        raise InputError(what, where=data.path, fix="look at the rows with `tunesmith data check`")
    subsets = {"kept": kept, **baselines(scores, len(kept), facts.recipe.seed)}
    source = {"source": data.fingerprint, "model": facts.model.name, "keep": keep, "likeness": likeness}
    with new_folder(path, facts=source, key="--to") as to:
        for name, rows in subsets.items():
            with (to / f"{name}.jsonl").open("wb") as file:
                file.writelines(line_of(data, int(row)) for row in rows)
        with (to / SCORES).open("wb") as file:
            file.writelines(json_bytes(line) for line in _lines(data, scores, subsets, reasons))
    told = tuple(_told(name, rows, scores, kept) for name, rows in subsets.items())
    return Curated(str(path), told, dict(Counter(map(_kind, reasons.values())).most_common()))


def _check(facts: Facts, keep: int, path: Path, likeness: str) -> None:
    data = facts.datasets[ROLE]
    if facts.recipe.stage != "sft" or any(part.format == "text" for part in data.parts):
        fix = "give questions with answers, and `stage: sft`"
        raise InputError("rows are chosen by how questions help to answer, and these have none", where="data", fix=fix)
    if keep >= len(data):
        what = f"--keep {keep:,} of {len(data):,} rows leaves nothing to choose"
        raise InputError(what, where="data curate", fix="keep fewer")
    if likeness not in LIKENESS:
        fix = f"one of {', '.join(LIKENESS)}"
        raise InputError(f"rows cannot be alike by {likeness!r:.40}", where="--likeness", fix=fix)
    if path.exists():
        raise InputError("it is there already", where=str(path), fix="name another folder with --to, or remove it")


# ---------------------------------------------------------------- scores


def score(model: LanguageModel, data: Dataset, likeness: str = "states") -> Scores:
    """The last answer of every row, behind its question and alone; and what its neighbours answer."""
    data = data.limited(model.context_length, "drop")
    nats_N2, tokens_N = np.full((len(data), 2), np.nan), np.zeros(len(data), dtype=np.int64)
    states_NH = np.zeros((len(data) if likeness == "states" else 0, model.network.config.hidden_size), np.float32)
    problems: dict[int, str] = {}
    for rows in batches(data, range(len(data))):
        documents: list[Document] = []
        places: list[tuple[int, int]] = []
        questions: dict[int, Document] = {}
        for row, draft in zip(rows, data.drafts(rows), strict=True):
            prepared = data.understand(row, draft)[1]
            if not prepared.documents:
                problems[row] = prepared.dropped
                continue
            document, first = last_answer(prepared.documents[-1])
            documents += [document, alone(document, first)]
            places += [(row, 0), (row, 1)]
            questions[row] = question(document, first)
            tokens_N[row] = np.count_nonzero(document.weights_L)
        for number, nats, _ in negative_log_likelihoods(model, documents, PACK):
            nats_N2[places[number]] = nats
        if len(states_NH):
            for number, mean_H in mean_states(model, list(questions.values()), PACK):
                states_NH[list(questions)[number]] = mean_H
    counts_N = np.maximum(1, tokens_N)
    usable = np.setdiff1d(np.arange(len(data)), list(problems))
    read = [row_of(data.example(row)) for row in range(len(data))]
    asked_NV = _spread(states_NH, usable) if len(states_NH) else word_vectors([row.prompt for row in read])
    return Scores(
        perplexity_N=np.exp(nats_N2[:, 0] / counts_N),
        difficulty_N=np.exp((nats_N2[:, 0] - nats_N2[:, 1]) / counts_N),
        answer_tokens_N=tokens_N,
        problems=problems,
        vectors_NV=asked_NV if len(states_NH) else word_vectors(["\n".join(row.turns) for row in read]),
        neighbours=neighbours(asked_NV, word_vectors([row.answer for row in read]), usable),
    )


def _spread(states_NH: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Directions from the middle, every dimension of one width: as they are, states of whatever texts point nearly the
    same way, by a few large dimensions (Timkey and van Schijndel 2021, arXiv 2109.04404)."""
    spread_NH, known = np.zeros_like(states_NH), states_NH[usable]
    spread_NH[usable] = (known - known.mean(axis=0)) / np.maximum(1e-6, known.std(axis=0))
    return unit(spread_NH)


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


def question(document: Document, first: int) -> Document:
    """What stands before the answer, each token but the first a target."""
    weights_L = np.ones(first, dtype=np.float32)
    weights_L[0] = 0
    return Document(document.id, document.tokens_L[:first], weights_L)


# ---------------------------------------------------------------- what is said of them


def _lines(data: Dataset, scores: Scores, subsets: Mapping[str, np.ndarray], reasons: dict[int, str]) -> Iterator[Json]:
    files = {name: set(rows.tolist()) for name, rows in subsets.items()}
    known = scores.neighbours
    for row in range(len(data)):
        numbers = {
            "perplexity": scores.perplexity_N[row],
            "difficulty": scores.difficulty_N[row],
            "agreement": known.own_N[row],
            "neighbours_agreement": known.theirs_N[row],
        }
        yield {
            "id": data.id(row),
            "files": [name for name, rows in files.items() if row in rows],
            "reason": reasons.get(row, ""),
            **{name: None if math.isnan(value) else round(float(value), 4) for name, value in numbers.items()},
            "answer_tokens": int(scores.answer_tokens_N[row]),
            "nearest": []
            if math.isnan(known.own_N[row])
            else [data.id(near) for near in known.nearest_NK[row].tolist()],
        }


def _told(name: str, rows: np.ndarray, scores: Scores, kept: np.ndarray) -> Subset:
    told = (scores.answer_tokens_N, scores.perplexity_N, scores.difficulty_N, scores.neighbours.own_N)
    tokens, perplexity, difficulty, agreement = (float(np.nanmedian(values[rows])) for values in told)
    return Subset(
        name=name,
        rows=len(rows),
        answer_tokens=tokens,
        perplexity=perplexity,
        difficulty=difficulty,
        agreement=None if math.isnan(agreement) else agreement,
        shared=len(np.intersect1d(rows, kept)),
    )


def _kind(reason: str) -> str:
    """A reason without what is of the one row."""
    if reason.startswith("says what "):
        return "says what another row says"
    return "like a row that is kept" if reason.startswith("like ") else reason.partition(":")[0]


def _counted(reasons: dict[int, str]) -> str:
    counts = Counter(map(_kind, reasons.values())).most_common(SHOWN)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)
