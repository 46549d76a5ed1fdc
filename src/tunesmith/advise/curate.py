"""A candidate set of a few good rows, chosen by the base model itself, beside the subsets that it
has to beat.

    Facts, how many -> curate -> a folder: kept.jsonl, random.jsonl, longest.jsonl, scores.jsonl

scores.jsonl has a line for each row of the data: its scores, the files it is in, and why it is not
kept. Which rows are chosen is decided in data/choose.py. Left out: whether the choice trains better
(tune/prove.py)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.core.types import Document, Json
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.split import encode_row
from tunesmith.data.length_stats import iter_batches
from tunesmith.data.neighbors import build_word_vectors, find_neighbors, normalize_rows
from tunesmith.data.selection import (
    ROLE,
    SelectionScores,
    find_faults,
    select_baselines,
    select_rows,
)
from tunesmith.evaluate.loglikelihood import compute_mean_states, compute_nll
from tunesmith.model.causal_lm import DTYPES, PackedCausalLM, load_network, wrap_model
from tunesmith.session.inputs import RunInputs

PACK_TOKENS = 2048  # tokens that are computed at once
MAX_REASONS = 12  # kinds of reasons
SCORES_FILE = "scores.jsonl"

SIMILARITIES = (
    "states",
    "words",
)  # by what rows are alike: the model's hidden states of their questions, their words


@dataclass(frozen=True)
class SubsetStats:
    """One file of rows, in numbers; of the scores the median."""

    name: str
    rows: int
    answer_tokens: float
    perplexity: float
    difficulty: float
    agreement: float | None  # with the answers to the nearest questions; none of too few rows
    shared_rows: int  # rows that are in kept.jsonl too


@dataclass(frozen=True)
class CurationResult:
    path: str
    subsets: tuple[SubsetStats, ...]
    reasons: dict[str, int]  # kind of reason -> rows that are not kept for it


def curate(inputs: RunInputs, keep: int, path: Path, similarity: str = "states") -> CurationResult:
    """Raises InputError for a folder that is there already, rows without answers, and nothing to
    choose from."""
    data = inputs.datasets[ROLE]
    _check_arguments(inputs, keep, path, similarity)
    held_out = {role: rows for role, rows in inputs.datasets.items() if role != ROLE}
    excluded = find_faults(data, held_out)
    dtype = DTYPES["bf16" if inputs.machine.has_bf16_matmul else "fp32"]
    model = wrap_model(load_network(inputs.model.path, dtype, inputs.machine.device), dtype)
    scores = score_rows(model, data, similarity)
    selected, reasons = select_rows(data, scores, excluded, keep)
    if not len(selected):
        message = f"no row is good enough: {_format_reason_counts(reasons)}"
        raise InputError(
            message, where=data.path, fix="look at the rows with `tunesmith data check`"
        )
    subsets = {"kept": selected, **select_baselines(scores, len(selected), inputs.recipe.seed)}
    source = {
        "source": data.fingerprint,
        "model": inputs.model.name,
        "keep": keep,
        "likeness": similarity,
    }
    with atomic_dir(path, metadata=source, key="--to") as folder:
        for name, rows in subsets.items():
            with (folder / f"{name}.jsonl").open("wb") as file:
                file.writelines(encode_row(data, int(row)) for row in rows)
        with (folder / SCORES_FILE).open("wb") as file:
            file.writelines(
                dump_json(line) for line in _iter_score_lines(data, scores, subsets, reasons)
            )
    stats = tuple(_summarize_subset(name, rows, scores, selected) for name, rows in subsets.items())
    return CurationResult(
        str(path), stats, dict(Counter(map(_classify_reason, reasons.values())).most_common())
    )


def _check_arguments(inputs: RunInputs, keep: int, path: Path, similarity: str) -> None:
    data = inputs.datasets[ROLE]
    if inputs.recipe.stage != "sft" or any(part.format == "text" for part in data.parts):
        fix = "give questions with answers, and `stage: sft`"
        raise InputError(
            "rows are chosen by how questions help to answer, and these have none",
            where="data",
            fix=fix,
        )
    if keep >= len(data):
        message = f"--keep {keep:,} of {len(data):,} rows leaves nothing to choose"
        raise InputError(message, where="data curate", fix="keep fewer")
    if similarity not in SIMILARITIES:
        fix = f"one of {', '.join(SIMILARITIES)}"
        raise InputError(f"rows cannot be alike by {similarity!r:.40}", where="--likeness", fix=fix)
    if path.exists():
        raise InputError(
            "it is there already",
            where=str(path),
            fix="name another folder with --to, or remove it",
        )


# ---------------------------------------------------------------- scores


def score_rows(model: PackedCausalLM, data: Dataset, similarity: str = "states") -> SelectionScores:
    """The last answer of every row, behind its question and alone; and what its neighbours
    answer."""
    data = data.with_max_length(model.context_length, "drop")
    nats_N2, tokens_N = np.full((len(data), 2), np.nan), np.zeros(len(data), dtype=np.int64)
    states_NH = np.zeros(
        (len(data) if similarity == "states" else 0, model.network.config.hidden_size), np.float32
    )
    problems: dict[int, str] = {}
    for rows in iter_batches(data, range(len(data))):
        documents: list[Document] = []
        cells: list[tuple[int, int]] = []
        questions: dict[int, Document] = {}
        for row, rendered in zip(rows, data.render_rows(rows), strict=True):
            prepared = data.render_row(row, rendered)[1]
            if not prepared.documents:
                problems[row] = prepared.drop_reason
                continue
            document, answer_start = extract_last_answer(prepared.documents[-1])
            documents += [document, drop_question(document, answer_start)]
            cells += [(row, 0), (row, 1)]
            questions[row] = extract_question(document, answer_start)
            tokens_N[row] = np.count_nonzero(document.weights_L)
        for index, nats, _ in compute_nll(model, documents, PACK_TOKENS):
            nats_N2[cells[index]] = nats
        if len(states_NH):
            for index, mean_H in compute_mean_states(model, list(questions.values()), PACK_TOKENS):
                states_NH[list(questions)[index]] = mean_H
    counts_N = np.maximum(1, tokens_N)
    usable_rows = np.setdiff1d(np.arange(len(data)), list(problems))
    row_texts = [extract_row_texts(data.read_example(row)) for row in range(len(data))]
    question_vectors_NV = (
        _standardize_states(states_NH, usable_rows)
        if len(states_NH)
        else build_word_vectors([row.prompt for row in row_texts])
    )
    return SelectionScores(
        perplexity_N=np.exp(nats_N2[:, 0] / counts_N),
        difficulty_N=np.exp((nats_N2[:, 0] - nats_N2[:, 1]) / counts_N),
        answer_tokens_N=tokens_N,
        problems=problems,
        vectors_NV=question_vectors_NV
        if len(states_NH)
        else build_word_vectors(["\n".join(row.turns) for row in row_texts]),
        neighbors=find_neighbors(
            question_vectors_NV, build_word_vectors([row.answer for row in row_texts]), usable_rows
        ),
    )


def _standardize_states(states_NH: np.ndarray, usable_rows: np.ndarray) -> np.ndarray:
    """Directions from the middle, every dimension of one width: as they are, states of whatever
    texts point nearly the same way, by a few large dimensions (Timkey and van Schijndel 2021, arXiv
    2109.04404)."""
    directions_NH, usable_states_UH = np.zeros_like(states_NH), states_NH[usable_rows]
    directions_NH[usable_rows] = (usable_states_UH - usable_states_UH.mean(axis=0)) / np.maximum(
        1e-6, usable_states_UH.std(axis=0)
    )
    return normalize_rows(directions_NH)


def extract_last_answer(document: Document) -> tuple[Document, int]:
    """The document up to its last trained run, with that run alone as targets of equal weight; and
    where it begins."""
    trained_positions = np.flatnonzero(document.weights_L > 0)
    breaks = np.flatnonzero(np.diff(trained_positions) > 1)
    first, last = (
        int(trained_positions[breaks[-1] + 1 if len(breaks) else 0]),
        int(trained_positions[-1]),
    )
    weights_L = np.zeros(last + 1, dtype=np.float32)
    weights_L[first:] = 1
    return Document(document.id, document.tokens_L[: last + 1], weights_L), first


def drop_question(document: Document, answer_start: int) -> Document:
    """The answer without its question: behind the one token before it, which the template wrote."""
    return dataclasses.replace(
        document,
        tokens_L=document.tokens_L[answer_start - 1 :],
        weights_L=document.weights_L[answer_start - 1 :],
    )


def extract_question(document: Document, answer_start: int) -> Document:
    """What stands before the answer, each token but the first a target."""
    weights_L = np.ones(answer_start, dtype=np.float32)
    weights_L[0] = 0
    return Document(document.id, document.tokens_L[:answer_start], weights_L)


# ---------------------------------------------------------------- what is said of them


def _iter_score_lines(
    data: Dataset,
    scores: SelectionScores,
    subsets: Mapping[str, np.ndarray],
    reasons: dict[int, str],
) -> Iterator[Json]:
    files = {name: set(rows.tolist()) for name, rows in subsets.items()}
    neighbour_scores = scores.neighbors
    for row in range(len(data)):
        row_scores = {
            "perplexity": scores.perplexity_N[row],
            "difficulty": scores.difficulty_N[row],
            "agreement": neighbour_scores.answer_similarity_N[row],
            "neighbours_agreement": neighbour_scores.neighbor_agreement_N[row],
        }
        yield {
            "id": data.get_id(row),
            "files": [name for name, rows in files.items() if row in rows],
            "reason": reasons.get(row, ""),
            **{
                name: None if math.isnan(value) else round(float(value), 4)
                for name, value in row_scores.items()
            },
            "answer_tokens": int(scores.answer_tokens_N[row]),
            "nearest": []
            if math.isnan(neighbour_scores.answer_similarity_N[row])
            else [
                data.get_id(neighbour) for neighbour in neighbour_scores.nearest_NK[row].tolist()
            ],
        }


def _summarize_subset(
    name: str, rows: np.ndarray, scores: SelectionScores, selected: np.ndarray
) -> SubsetStats:
    columns = (
        scores.answer_tokens_N,
        scores.perplexity_N,
        scores.difficulty_N,
        scores.neighbors.answer_similarity_N,
    )
    tokens, perplexity, difficulty, agreement = (
        float(np.nanmedian(values[rows])) for values in columns
    )
    return SubsetStats(
        name=name,
        rows=len(rows),
        answer_tokens=tokens,
        perplexity=perplexity,
        difficulty=difficulty,
        agreement=None if math.isnan(agreement) else agreement,
        shared_rows=len(np.intersect1d(rows, selected)),
    )


def _classify_reason(reason: str) -> str:
    """Return a reason without the details of its row."""
    if reason.startswith("duplicate of "):
        return "duplicate of another row"
    if reason.startswith("similar to "):
        return "similar to a selected row"
    return reason.partition(":")[0]


def _format_reason_counts(reasons: dict[int, str]) -> str:
    counts = Counter(map(_classify_reason, reasons.values())).most_common(MAX_REASONS)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)
