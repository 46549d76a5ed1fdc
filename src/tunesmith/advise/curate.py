"""Select a small set of good rows with the base model, next to the baselines that it has to beat.

    RunInputs, how many -> a folder: selected.jsonl, random.jsonl, longest.jsonl, scores.jsonl

scores.jsonl has a line for each row of the data: its scores, its files, and why it is not selected.
The selection itself is in data/selection.py. Left out: whether it trains better
(two runs and `compare` show it).
"""

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
from tunesmith.data.dataset import Dataset
from tunesmith.data.length_stats import iter_batches
from tunesmith.data.selection import (
    PERSONAL_CHECK,
    ROLE,
    SelectionScores,
    find_faults,
    select_baselines,
    select_rows,
)
from tunesmith.data.split import encode_row
from tunesmith.evaluate.loglikelihood import compute_mean_states, compute_nll
from tunesmith.model.causal_lm import DTYPES, PackedCausalLM, load_network
from tunesmith.session.family_proof import wrap_proven
from tunesmith.session.inputs import RunInputs

PACK_TOKENS = 2048
MAX_REASONS = 12  # kinds of reasons that an error lists
SCORES_FILE = "scores.jsonl"
SELECTED = "selected"  # the subset of the selected rows


@dataclass(frozen=True)
class SubsetStats:
    """One file of rows, with its median scores."""

    name: str
    rows: int
    answer_tokens: float
    perplexity: float
    difficulty: float
    shared_rows: int  # with selected.jsonl


@dataclass(frozen=True)
class CurationResult:
    path: str
    subsets: tuple[SubsetStats, ...]
    reasons: dict[str, int]  # kind of reason -> rows that are not selected


def curate(
    inputs: RunInputs,
    keep: int,
    path: Path,
    *,
    allow_personal: bool = False,
) -> CurationResult:
    """Score all rows, select `keep` of them, and write the folder atomically.

    Rows with personal data are excluded unless `allow_personal`.

    Raises InputError for an existing folder, rows without answers, and when no row is good enough.
    """
    data = inputs.datasets[ROLE]
    _check_arguments(inputs, keep, path)
    held_out = {role: rows for role, rows in inputs.datasets.items() if role != ROLE}
    excluded = find_faults(data, held_out, allow_personal=allow_personal)
    dtype = DTYPES["bf16" if inputs.machine.has_bf16_matmul else "fp32"]
    model = wrap_proven(load_network(inputs.model.path, dtype, inputs.machine.device), dtype)
    scores = score_rows(model, data)
    selected, reasons = select_rows(data, scores, excluded, keep)
    reason_counts = Counter(_classify_reason(reason) for reason in reasons.values()).most_common()
    if not len(selected):
        counts = [f"{count:,} {kind}" for kind, count in reason_counts[:MAX_REASONS]]
        message = f"no row is good enough: {', '.join(counts)}"
        fix = "inspect them with `tunesmith data check`"
        if any(reason.startswith(f"{PERSONAL_CHECK}:") for reason in excluded.values()):
            fix += "; where personal data belongs in the answers, add --allow-personal"
        raise InputError(message, where=data.path, fix=fix)
    subsets = {SELECTED: selected, **select_baselines(scores, len(selected), inputs.recipe.seed)}
    metadata = {"source": data.fingerprint, "model": inputs.model.name, "keep": keep}
    with atomic_dir(path, metadata=metadata, key="--to") as folder:
        for name, rows in subsets.items():
            with (folder / f"{name}.jsonl").open("wb") as file:
                file.writelines(encode_row(data, int(row)) for row in rows)
        with (folder / SCORES_FILE).open("wb") as file:
            for line in _iter_score_lines(data, scores, subsets, reasons):
                file.write(dump_json(line))
    stats = tuple(_summarize_subset(name, rows, scores, selected) for name, rows in subsets.items())
    return CurationResult(str(path), stats, dict(reason_counts))


def _check_arguments(inputs: RunInputs, keep: int, path: Path) -> None:
    data = inputs.datasets[ROLE]
    if inputs.recipe.stage != "sft" or any(part.format == "text" for part in data.parts):
        message = "selection needs questions with answers, but these rows have none"
        raise InputError(message, where="data", fix="use questions with answers, and `stage: sft`")
    if keep >= len(data):
        message = f"--keep {keep:,} of {len(data):,} rows leaves nothing to select"
        raise InputError(message, where="data curate", fix="keep fewer")
    if path.exists():
        fix = "choose another folder with --out, or remove it"
        raise InputError("the folder already exists", where=str(path), fix=fix)


# ---------------------------------------------------------------- scores


def score_rows(model: PackedCausalLM, data: Dataset) -> SelectionScores:
    """Score the last answer of every row, with and without its question."""
    data = data.with_max_length(model.context_length, "drop")
    num_rows = len(data)
    nats_N2 = np.full((num_rows, 2), np.nan)  # with the question, without it
    tokens_N = np.zeros(num_rows, dtype=np.int64)
    states_NH = np.zeros((num_rows, model.network.config.hidden_size), np.float32)
    problems: dict[int, str] = {}
    for rows in iter_batches(data, range(num_rows)):
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
        question_rows = list(questions)
        for index, mean_H in compute_mean_states(model, list(questions.values()), PACK_TOKENS):
            states_NH[question_rows[index]] = mean_H
    counts_N = np.maximum(1, tokens_N)
    usable_rows = np.setdiff1d(np.arange(num_rows), list(problems))
    return SelectionScores(
        perplexity_N=np.exp(nats_N2[:, 0] / counts_N),
        difficulty_N=np.exp((nats_N2[:, 0] - nats_N2[:, 1]) / counts_N),
        answer_tokens_N=tokens_N,
        problems=problems,
        vectors_NV=_standardize_states(states_NH, usable_rows),
    )


def _standardize_states(states_NH: np.ndarray, usable_rows: np.ndarray) -> np.ndarray:
    """Center and scale every dimension, then normalize.

    Raw states of any texts point nearly the same way, because of a few large dimensions (Timkey and
    van Schijndel 2021, arXiv 2109.04404).
    """
    usable_UH = states_NH[usable_rows]
    directions_NH = np.zeros_like(states_NH)
    centered_UH = usable_UH - usable_UH.mean(axis=0)
    directions_NH[usable_rows] = centered_UH / np.maximum(1e-6, usable_UH.std(axis=0))
    norms_N1 = np.linalg.norm(directions_NH, axis=1, keepdims=True)
    return directions_NH / np.maximum(1e-9, norms_N1)


def extract_last_answer(document: Document) -> tuple[Document, int]:
    """Return the document up to the end of its last answer, and where that answer starts.

    Only that answer is supervised, with equal weights.
    """
    trained_positions = np.flatnonzero(document.weights_L > 0)
    breaks = np.flatnonzero(np.diff(trained_positions) > 1)
    start = int(trained_positions[breaks[-1] + 1 if len(breaks) else 0])
    end = int(trained_positions[-1]) + 1
    weights_L = np.zeros(end, dtype=np.float32)
    weights_L[start:] = 1
    return Document(document.id, document.tokens_L[:end], weights_L), start


def drop_question(document: Document, answer_start: int) -> Document:
    """Return the answer alone, after the one template token before it."""
    return dataclasses.replace(
        document,
        tokens_L=document.tokens_L[answer_start - 1 :],
        weights_L=document.weights_L[answer_start - 1 :],
    )


def extract_question(document: Document, answer_start: int) -> Document:
    """Return everything before the answer, with all tokens but the first as targets."""
    weights_L = np.ones(answer_start, dtype=np.float32)
    weights_L[0] = 0
    return Document(document.id, document.tokens_L[:answer_start], weights_L)


# ---------------------------------------------------------------- output


def _iter_score_lines(
    data: Dataset,
    scores: SelectionScores,
    subsets: Mapping[str, np.ndarray],
    reasons: dict[int, str],
) -> Iterator[Json]:
    files = {name: set(rows.tolist()) for name, rows in subsets.items()}
    for row in range(len(data)):
        row_scores = {
            "perplexity": scores.perplexity_N[row],
            "difficulty": scores.difficulty_N[row],
        }
        rounded: Json = {}
        for name, value in row_scores.items():
            rounded[name] = None if math.isnan(value) else round(float(value), 4)
        yield {
            "id": data.get_id(row),
            "files": [name for name, rows in files.items() if row in rows],
            "reason": reasons.get(row, ""),
            **rounded,
            "answer_tokens": int(scores.answer_tokens_N[row]),
        }


def _summarize_subset(
    name: str, rows: np.ndarray, scores: SelectionScores, selected: np.ndarray
) -> SubsetStats:
    return SubsetStats(
        name=name,
        rows=len(rows),
        answer_tokens=float(np.median(scores.answer_tokens_N[rows])),
        perplexity=float(np.nanmedian(scores.perplexity_N[rows])),
        difficulty=float(np.nanmedian(scores.difficulty_N[rows])),
        shared_rows=len(np.intersect1d(rows, selected)),
    )


def _classify_reason(reason: str) -> str:
    """Return a reason without the details of its row."""
    if reason.startswith("duplicate of "):
        return "duplicate of another row"
    if reason.startswith("similar to "):
        return "similar to a selected row"
    return reason.partition(":")[0]
