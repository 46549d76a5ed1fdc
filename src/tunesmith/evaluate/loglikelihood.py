"""Compute negative log-likelihoods of documents, packed as in training, without gradients.

In: Documents and a model. Out: per document, the sum over its supervised tokens in nats, and their
number. Weights other than 0 count as 1: weighting is for training, not for evaluation. Several
ranks share the packs out (shared_items.py).
Legend: S targets, D documents, H hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from tunesmith.core.events import CheckResult
from tunesmith.core.hardware import upload
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Batch, Comparison, Document, Side
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import MetricValues, select_items
from tunesmith.evaluate.shared_items import IndexedPack, Scorer, compute_packs, score_packs
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import CHUNK_TARGETS, measure_target_losses

T = TypeVar("T")
PROGRESS_LABEL = "documents scored"
MAX_CHOSEN_DROP = 0.10  # warn when chosen answers get this much less likely


class NLLResult(NamedTuple):
    """The sum over the supervised tokens of a document, and their number."""

    nats: float
    tokens: int


def compute_nll(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> Iterator[tuple[int, float, int]]:
    """Yield (document index, nats, tokens) pack by pack; documents without a target are skipped."""
    packs = pack_documents(model, documents, pack_length, share=share)
    results = score_packs(model, packs, NLL_SCORER, len(documents))
    for index, (nats, tokens) in log_progress(results, len(documents), PROGRESS_LABEL):
        yield index, nats, tokens


def map_documents(
    model: PackedCausalLM,
    documents: Sequence[Document],
    pack_length: int,
    compute: Callable[[PackedCausalLM, Batch, Sequence[int]], Sequence[T]],
    *,
    share: bool = False,
) -> Iterator[tuple[int, T]]:
    """Yield (document index, result) pack by pack, all on this rank.

    compute: takes a batch and the indices of its documents, and returns a result per document.
    """
    packs = pack_documents(model, documents, pack_length, share=share)
    return compute_packs(model, packs, compute)


def pack_documents(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> list[IndexedPack]:
    """Return the packs of the documents that have a target."""
    assert not model.network.training, "the model must be in evaluation mode"
    index_by_id = {id(document): i for i, document in enumerate(documents)}
    assert len(index_by_id) == len(documents), "a document is in the list twice"
    supervised = [document for document in documents if document.weights_L.any()]
    packs = pack_step(supervised, pack_length, should_share=share, get_group=model.get_rotation_key)
    indexed: list[IndexedPack] = []
    for pack in packs:
        indices = [index_by_id[id(document)] for document in pack.documents]
        indexed.append(IndexedPack(pack, indices))
    return indexed


@torch.no_grad()
def _compute_pack_nll(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[NLLResult]:
    """Return nats and tokens of each document of a pack."""
    losses_S = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
    del indices
    return list(map(NLLResult, sum_by_document(losses_S, batch), batch.num_targets))


NLL_SCORER = Scorer("nll", NLLResult, _compute_pack_nll, 2)


class GreedyResult(NamedTuple):
    """Sums over the supervised tokens of a document: nats, their number, and how many of them are
    the most likely token."""

    nats: float
    tokens: int
    matches: float


@torch.no_grad()
def _compute_pack_greedy(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[GreedyResult]:
    del indices
    hidden_SH = model.compute_hidden(batch)
    losses_S = measure_target_losses(hidden_SH, model.head, batch.targets_S)
    parts = hidden_SH.split(CHUNK_TARGETS)
    tokens_S = torch.cat([model.head.compute_raw_logits(part).argmax(-1) for part in parts])
    matches_S = tokens_S == batch.targets_S
    nats = sum_by_document(losses_S, batch)
    matches = sum_by_document(matches_S, batch)
    return list(map(GreedyResult, nats, batch.num_targets, matches))


GREEDY_SCORER = Scorer("greedy", GreedyResult, _compute_pack_greedy, 3)


def measure_loss_and_greedy_match(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> tuple[MetricValues, MetricValues]:
    """Return the mean loss per row, and which rows greedy decoding would answer token for token,
    without generating: each token is the most likely one after those before it (`is_greedy` of
    lm-eval)."""
    packs = pack_documents(model, documents, pack_length, share=share)
    rows: dict[str, tuple[float, int]] = {}
    is_match: dict[str, bool] = {}
    for index, result in sorted(score_packs(model, packs, GREEDY_SCORER, len(documents))):
        row = documents[index].id
        nats, tokens = rows.get(row, (0.0, 0))
        rows[row] = nats + result.nats, tokens + result.tokens
        is_match[row] = is_match.get(row, True) and result.matches == result.tokens
    match = MetricValues(task, "greedy_match", tuple(rows), tuple(map(float, is_match.values())))
    return build_loss_measurement(task, rows), match


def compute_mean_states(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (document index, mean of the final hidden states [H] that predict its targets)."""
    return map_documents(model, documents, pack_length, _compute_pack_means)


@torch.no_grad()
def _compute_pack_means(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[list[float]]:
    hidden_SH = model.compute_hidden(batch).float()
    sums_DH = hidden_SH.new_zeros((len(indices), hidden_SH.shape[1]))
    sums_DH.index_add_(0, batch.document_S, hidden_SH)
    counts_D = upload(batch.num_targets, sums_DH.device, sums_DH.dtype)
    return (sums_DH / counts_D[:, None]).tolist()


def sum_by_document(values_S: torch.Tensor, batch: Batch) -> list[float]:
    """Return the sum over each document's targets, in fp64."""
    sums_D = torch.zeros(len(batch.ids), dtype=torch.float64, device=values_S.device)
    return sums_D.index_add_(0, batch.document_S, values_S.double()).tolist()


def measure_loss(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> MetricValues:
    """Return the mean loss per row, in nats/token; the documents of a row are one item."""
    rows: dict[str, tuple[float, int]] = {}
    for index, nats, tokens in sorted(compute_nll(model, documents, pack_length, share=share)):
        row = documents[index].id
        row_nats, row_tokens = rows.get(row, (0.0, 0))
        rows[row] = row_nats + nats, row_tokens + tokens
    return build_loss_measurement(task, rows)


def build_loss_measurement(task: str, rows: Mapping[str, tuple[float, int]]) -> MetricValues:
    """Return the loss from row id -> (nats, tokens)."""
    return MetricValues(
        task=task,
        metric="loss",
        ids=tuple(rows),
        values=tuple(nats / tokens for nats, tokens in rows.values()),
        weights=tuple(float(tokens) for _, tokens in rows.values()),
        higher_is_better=False,
    )


def to_bits_per_byte(
    loss: MetricValues, documents: Sequence[Document], renderer: Renderer
) -> MetricValues:
    """Return the losses in bits per UTF-8 byte of the answers, comparable between tokenizers.

    The end token's bits count; it has no bytes.
    """
    num_bytes = dict.fromkeys(loss.ids, 0)
    for document in documents:
        if document.id in num_bytes and document.is_correct:
            targets = document.tokens_L[document.weights_L != 0].tolist()
            answer = renderer.decode([token for token in targets if token not in renderer.end_ids])
            num_bytes[document.id] += len(answer.encode())
    ids: list[str] = []
    values: list[float] = []
    weights: list[float] = []
    for row, value, tokens in zip(loss.ids, loss.values, loss.weights, strict=True):
        if num_bytes[row]:
            ids.append(row)
            values.append(value * tokens / math.log(2) / num_bytes[row])
            weights.append(float(num_bytes[row]))
    return replace(
        loss, metric=BITS_PER_BYTE, ids=tuple(ids), values=tuple(values), weights=tuple(weights)
    )


# ---------------------------------------------------------------- preference pairs


def measure_preference(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    should_sum: bool,
    share: bool = False,
) -> tuple[MetricValues, ...]:
    """Return per preference pair: accuracy, margin, and the log-probability of each answer.

    should_sum: compare sums over the answers, as DPO does, else means over their tokens, as ORPO
    and SimPO do.
    """
    logps: dict[tuple[str, str], float] = {}
    lengths: dict[tuple[str, str], int] = {}
    for index, nats, tokens in compute_nll(model, documents, pack_length, share=share):
        document = documents[index]
        logps[document.id, document.side] = -nats if should_sum else -nats / tokens
        lengths[document.id, document.side] = tokens
    rows = tuple(document.id for document in documents if document.side == "chosen")
    chosen = [logps[row, "chosen"] for row in rows]
    rejected = [logps[row, "rejected"] for row in rows]
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    accuracies = tuple(float(margin > 0) for margin in margins)
    longer = [lengths[row, "chosen"] - lengths[row, "rejected"] for row in rows]
    strata = ["" if not extra else "longer" if extra > 0 else "shorter" for extra in longer]
    by_length = MetricValues(task, "length_controlled_accuracy", rows, accuracies)
    return (
        MetricValues(task, "preference_accuracy", rows, accuracies),
        *_stratify(by_length, strata),
        MetricValues(task, "margin", rows, tuple(margins)),
        MetricValues(task, "chosen_logp", rows, tuple(chosen)),
        MetricValues(task, "rejected_logp", rows, tuple(rejected), higher_is_better=False),
    )


def measure_side_logp(
    model: PackedCausalLM,
    documents: Sequence[Document],
    side: Side,
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> MetricValues:
    """Return the log-probability of each desirable or undesirable answer, as KTO sums it."""
    nlls = sorted(compute_nll(model, documents, pack_length, share=share))
    return MetricValues(
        task,
        f"{side}_logp",
        tuple(documents[index].id for index, _, _ in nlls),
        tuple(-nats for _, nats, _ in nlls),
        higher_is_better=side == "desirable",
    )


def measure_side_margin(sides: Sequence[MetricValues]) -> Iterator[MetricValues]:
    """Yield the log-probability of desirable minus undesirable answers, in nats: the mean over both
    sides of twice their signed values."""
    ids = tuple(row for side in sides for row in side.ids)
    values = tuple((4 * s.higher_is_better - 2.0) * logp for s in sides for logp in s.values)
    names = [side.metric for side in sides for _ in side.ids]
    yield from _stratify(MetricValues(sides[0].task, "margin", ids, values), names)


def _stratify(measurement: MetricValues, names: Sequence[str]) -> Iterator[MetricValues]:
    """Yield the measurement as a mean over two strata: a model that only likes longer answers gains
    in one what it loses in the other (the aim of Dubois 2024). Items without a name are left out;
    nothing is yielded if a stratum has fewer than two."""
    counts = Counter(name for name in names if name)
    if len(counts) == 2 and min(counts.values()) > 1:
        part = select_items(measurement, [i for i, name in enumerate(names) if name])
        yield replace(part, strata=tuple(name for name in names if name))


def check_likelihood_displacement(
    comparisons: Sequence[Comparison], step: int
) -> Iterator[CheckResult]:
    """Yield a warning when the chosen answers became less likely (likelihood displacement)."""
    for comparison in comparisons:
        before = comparison.before.value
        after = comparison.after.value
        drop = (before - after) / max(abs(before), 1e-9)
        if comparison.metric == "chosen_logp" and drop > MAX_CHOSEN_DROP:
            change = f"log-probability {before:.2f} -> {after:.2f}, {drop:.0%} lower"
            fix = "raise nll_coefficient or beta, or lower learning_rate"
            evidence = f"{comparison.task}: {change}; {fix}"
            yield CheckResult("chosen answers less likely", "warn", evidence, step)
