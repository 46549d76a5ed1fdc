"""Preflight checks that run the model: logits, labels, isolation, packs, shared prefixes, rotation.

In: a Subject. Out: a CheckResult per check, or GateError. Beside a check stand the fault that it
must refuse, and the reason why that cannot be injected (`explain_...`, empty if it can). Left out:
blocks one by one (preflight_blocks.py), the table of all checks (preflight.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Batch, Document, PackLayout, require
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.expert_weights import DenseExpertWeight
from tunesmith.model.experts import find_experts
from tunesmith.model.layers import MIXERS
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.model.quantization import find_quantized_weights
from tunesmith.session.preflight_probe import (
    ISOLATION_TOKENS,
    MAX_PACKED_DOCUMENTS,
    REPORT_FIX,
    PreflightSamples,
    Subject,
    choose_packed_documents,
    choose_positions,
    fill_pack,
    find_siblings,
    pack_beyond,
    pack_documents,
    pack_with_sharing,
    trim_to_fork,
    truncate,
)
from tunesmith.train.preflight_blocks import BLOCK_FIX, can_amplify_rounding, check_blocks

# Largest relative RMS difference of centered logits between two forwards of the stock model. Other
# shapes of products round otherwise, which a router that changes its mind amplifies; a forward that
# leaves something out differs by about 100%.
ORACLE_TOLERANCE = {
    torch.bfloat16: 0.2,
    torch.float16: 0.05,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
# Largest relative RMS difference of centered logits between two correct computations.
LOGIT_TOLERANCE = {
    torch.bfloat16: 0.06,
    torch.float16: 0.02,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
# The same for networks that amplify rounding, if all blocks agree.
AMPLIFIED_TOLERANCE = 0.5
# Largest difference of two correct losses: a relative part, and a random part in nats per token.
# A logit of 20 is followed by 20.125 in bf16, and matrix products of other shapes round otherwise:
# SmolLM2 on a CPU with AMX differs by 1.2 nats of 65, and the fp32 loss lies between the two.
LOSS_TOLERANCE = {
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-6,
}
# The rows of a shared prefix are rounded together with other rows than in an unshared pack.
SHARED_TOLERANCE = LOSS_TOLERANCE | {torch.bfloat16: 0.03, torch.float16: 0.01}
TOKEN_TOLERANCE_NATS = {
    torch.bfloat16: 0.3,
    torch.float16: 0.05,
    torch.float32: 0.0,
    torch.float64: 0.0,
}
# Largest difference of hidden states in a pack and alone, relative to their norm, in groups of 64
# tokens. In bf16 two correct computations of 25 random networks differed by up to 0.042, with
# experts by 0.18: a router that decides otherwise changes a token at once.
HIDDEN_TOLERANCE = {
    torch.bfloat16: 0.08,
    torch.float16: 0.02,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
ROUTED_TOLERANCE = HIDDEN_TOLERANCE | {torch.bfloat16: 0.25, torch.float16: 0.25}
GROUP_TOKENS = 64
FEW_TOKENS = 8
BACKEND_FIX = "use another attention backend"
# Largest difference of two correct cosines or sines.
ROTATION_TOLERANCE = 1e-4
ORACLE_KIND = "transformers with its cache = without"


# ---------------------------------------------------------------- the base model as it was loaded


def check_oracle(subject: Subject) -> CheckResult:
    """Check that the stock model gives the same logits without and with its cache.

    The other checks take its forward without a cache for the truth. Should that be wrong (one
    version ignored the layers of Gemma 4 that share keys when no cache was asked for), ours would
    agree with it and nothing would be noticed."""
    oracle = subject.samples.oracle
    if isinstance(oracle, str):
        return CheckResult.from_items(ORACLE_KIND, 0, "", if_none=oracle)
    where = f"preflight: {oracle.document_id}"
    if not oracle.plain_PV.isfinite().all():
        raise GateError(
            "the base model computes NaN or infinite values, in transformers, too",
            where=where,
            fix="download the model again: a number of its config.json or its weights are wrong",
        )
    error = compare_logits(oracle.cached_PV, oracle.plain_PV)
    if not error <= ORACLE_TOLERANCE[subject.model.dtype]:  # also refuses NaN
        raise GateError(
            f"transformers' logits with and without its KV cache differ by {error:.1%} of their "
            "norm, so it cannot serve as the reference",
            where=where,
            fix=f"install another version of transformers; {REPORT_FIX}",
        )
    num_positions = len(oracle.plain_PV)
    evidence = (
        f"relative difference {error:.2%} at {num_positions} positions, the last one from the "
        f"cache; document of {oracle.num_tokens} tokens"
    )
    return CheckResult.from_items(
        ORACLE_KIND, num_positions, evidence, if_none="there is no document"
    )


def compare_logits(logits_PV: Tensor, expected_PV: Tensor) -> float:
    """Return the difference of centered logits relative to the norm of the expected ones."""
    centered_PV = expected_PV - expected_PV.mean(-1, keepdim=True)
    difference_PV = logits_PV - logits_PV.mean(-1, keepdim=True) - centered_PV
    return float(difference_PV.norm() / centered_PV.norm())


def break_oracle(subject: Subject) -> Subject:
    """Let the cache lose the last token: it repeats the logits before."""
    oracle = subject.samples.oracle
    assert not isinstance(oracle, str), "explain_unbreakable says why there is none"
    broken_PV = oracle.cached_PV.clone()
    broken_PV[-1] = broken_PV[0]
    return subject.with_samples(oracle=dataclasses.replace(oracle, cached_PV=broken_PV))


def explain_unbreakable(subject: Subject) -> str:
    oracle = subject.samples.oracle
    if isinstance(oracle, str):
        return oracle
    changed = torch.cat((oracle.plain_PV[:-1], oracle.plain_PV[:1]))
    change = compare_logits(changed, oracle.plain_PV)
    # the fault repeats logits that differ by the rounding already
    rounding = 2 * compare_logits(oracle.cached_PV, oracle.plain_PV)
    is_noticed = change > ORACLE_TOLERANCE[subject.model.dtype] + rounding
    return "" if is_noticed else "the last two tokens have similar logits"


def has_quantized_weights(subject: Subject) -> bool:
    network = subject.model.network
    return subject.samples.is_quantized or bool(find_quantized_weights(network))


def describe_quantized_weights(subject: Subject) -> CheckResult:
    """Count the weights in 4 bits; those of experts must be among them."""
    model = subject.model
    for path, experts in find_experts(model.network).items():
        if isinstance(experts.inputs, DenseExpertWeight):
            message = f"the weights are in 4 bits, but not those of {path}"
            raise GateError(message, where="preflight", fix=REPORT_FIX)
    weights = find_quantized_weights(model.network).values()
    quantized_bytes = sum(weight.nbytes for weight in weights)
    bf16_bytes = sum(2 * weight.num_parameters for weight in weights)
    ratio = quantized_bytes / max(1, bf16_bytes)
    evidence = f"{len(weights)} matrices, {quantized_bytes:,} bytes, {ratio:.3f}x of bf16"
    if_none = "no matrix of the model is in 4 bits"
    return CheckResult.from_items("4-bit weights", len(weights), evidence, if_none=if_none)


# ---------------------------------------------------------------- the forward


def check_logits(subject: Subject) -> CheckResult:
    """Check that our packed forward gives the logits of the stock model, document by document."""
    samples = subject.samples
    worst = 0.0
    num_agreeing = 0
    num_positions = 0
    head = subject.model.head
    tolerance = LOGIT_TOLERANCE[subject.model.dtype]
    pairs = zip(samples.documents, samples.reference_logits, strict=True)
    for document, stock_PV in pairs:
        positions_P = torch.tensor(choose_positions(document), device=subject.model.device)
        ours_PV = head.compute_logits(subject.compute_unpacked(document, positions_P)).float()
        error = compare_logits(ours_PV, stock_PV)
        worst = max(worst, error)
        num_agreeing += int((ours_PV.argmax(-1) == stock_PV.argmax(-1)).sum())
        num_positions += len(stock_PV)
        if error <= tolerance:
            continue
        is_explicable = samples.stock is not None and can_amplify_rounding(subject.model)
        if is_explicable and math.isfinite(error):
            check_blocks(subject)  # names the wrong one
        if not (is_explicable and error <= AMPLIFIED_TOLERANCE):
            raise GateError(
                f"logits differ from transformers by {error:.1%} of their norm, "
                f"more than {tolerance:.1%}",
                where=f"preflight: {document.id}",
                fix=BLOCK_FIX,
            )
    subject.logit_error = worst
    lengths = ", ".join(str(count_input_tokens(document)) for document in samples.documents)
    evidence = (
        f"relative difference at most {worst:.2%}, "
        f"top-1 equal at {num_agreeing}/{num_positions} positions; document lengths {lengths}"
    )
    return CheckResult.from_items(
        "logits match transformers", num_positions, evidence, if_none="there is no document"
    )


def check_labels(subject: Subject) -> CheckResult:
    """Check that each position is trained to predict the document's next token.

    Our losses are compared with the cross-entropy of the stock logits for the next tokens, which
    does not use our code from documents to targets."""
    worst = 0.0
    num_checked = 0
    head = subject.model.head
    for document, stock_PV in _pair_first_documents(subject.samples):
        batch = subject.corrupt(pack_documents([document], subject.model.device))
        hidden_SH = subject.compute_unpacked(document, batch.positions_S)
        losses_S = measure_target_losses(hidden_SH, head, batch.targets_S)
        loss_by_position = dict(zip(batch.positions_S.tolist(), losses_S.tolist(), strict=True))
        positions, stock_losses = _compute_stock_losses(document, stock_PV)
        our_losses = torch.tensor([loss_by_position.get(p, math.nan) for p in positions])
        error = float((our_losses - stock_losses).abs().mean() / (1 + stock_losses.mean()))
        worst = max(worst, error)
        num_checked += len(positions)
        if not error <= _limit_label_error(stock_losses, subject.model.dtype):
            raise GateError(
                f"losses of the next tokens differ from transformers by {error:.1%}: "
                "labels are shifted or missing",
                where=f"preflight: {document.id}",
                fix=REPORT_FIX,
            )
    evidence = f"{num_checked} losses, relative difference at most {worst:.2%}"
    return CheckResult.from_items(
        "labels match transformers", num_checked, evidence, if_none="there is no target"
    )


def _limit_label_error(stock_losses: Tensor, dtype: torch.dtype) -> float:
    """Return the largest relative difference of right losses.

    The rounding of single tokens evens out over many; an answer may have two."""
    random = TOKEN_TOLERANCE_NATS[dtype] / math.sqrt(max(1, len(stock_losses)))
    return LOGIT_TOLERANCE[dtype] + random / (1 + float(stock_losses.mean()))


def _pair_first_documents(samples: PreflightSamples) -> list[tuple[Document, Tensor]]:
    pairs = zip(samples.documents, samples.reference_logits, strict=True)
    return list(pairs)[:MAX_PACKED_DOCUMENTS]


def shift_labels(subject: Subject) -> Subject:
    """Let each position predict its own token."""

    def shift(batch: Batch) -> Batch:
        return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])

    return subject.with_corrupt_batches(shift)


def explain_invisible_shift(subject: Subject) -> str:
    for document, stock_PV in _pair_first_documents(subject.samples):
        _, next_losses = _compute_stock_losses(document, stock_PV)
        _, current_losses = _compute_stock_losses(document, stock_PV, shift=0)
        change = (current_losses - next_losses).abs().mean() / (1 + next_losses.mean())
        limit = _limit_label_error(next_losses, subject.model.dtype)
        if change > 2 * limit:  # ours may differ by as much
            return ""
    return "the next tokens have nearly the losses of the tokens before them"


def _compute_stock_losses(
    document: Document, stock_PV: Tensor, shift: int = 1
) -> tuple[list[int], Tensor]:
    """Return the checked positions with a target, and the stock model's losses of the tokens that
    come `shift` later."""
    rows: list[int] = []
    positions: list[int] = []
    for row, position in enumerate(choose_positions(document)):
        if document.weights_L[position + 1]:
            rows.append(row)
            positions.append(position)
    tokens = torch.tensor([int(document.tokens_L[p + shift]) for p in positions])
    return positions, F.cross_entropy(stock_PV[rows].cpu(), tokens, reduction="none")


def check_document_isolation(subject: Subject) -> CheckResult:
    """Check that changing one document of a pack leaves the others' outputs bitwise unchanged, with
    experts up to rounding."""
    documents = [
        truncate(document, ISOLATION_TOKENS)
        for document in subject.samples.documents[:MAX_PACKED_DOCUMENTS]
    ]
    batch = pack_documents(documents, subject.model.device)
    isolation = refuse_leakage(subject.model, subject.corrupt(batch), batch.layout)
    num_changed = isolation.num_segments
    evidence = f"{num_changed} documents changed in turn, the others unchanged {isolation.extent}"
    return CheckResult.from_items(
        "no cross-document attention", num_changed, evidence, if_none="there is no second document"
    )


def leak_mask(subject: Subject) -> Subject:
    """Let a pack be one document for attention."""

    def leak(batch: Batch) -> Batch:
        return dataclasses.replace(batch, layout=PackLayout((0,), (batch.layout.num_tokens,)))

    return subject.with_corrupt_batches(leak)


def check_packed_loss(subject: Subject) -> CheckResult:
    """Check that every document has the same loss in a pack as alone, and the same hidden states
    token by token. Where no table names the family, whose code may count the tokens of a pack, the
    pack is as long as those of the run."""
    chosen = choose_packed_documents(subject.samples.documents)
    documents = fill_pack(chosen, subject.samples.full_pack)
    worst, worst_hidden = _compare_with_unpacked(subject, documents)
    lengths = ", ".join(str(count_input_tokens(document)) for document in chosen)
    num_tokens = sum(map(count_input_tokens, documents))
    evidence = (
        f"{len(documents)} documents in a pack of {num_tokens:,} tokens, relative difference at "
        f"most {worst:.1e}, of hidden states at most {worst_hidden:.1e}; document lengths {lengths}"
    )
    return CheckResult.from_items(
        "packed loss = unpacked loss", len(documents), evidence, if_none="there is no document"
    )


def check_prefix_sharing(subject: Subject) -> CheckResult:
    """Check that sharing a prefix changes no loss and that branches do not attend to each other."""
    kind = "prefix-shared loss = unshared loss"
    documents = subject.samples.sharing_documents
    if not documents:
        if_none = "no two documents share a prefix; all are too short"
        return CheckResult.from_items(kind, 0, "", if_none=if_none)
    model = subject.model
    fork = pack_with_sharing(trim_to_fork(documents), device=model.device)
    isolation = refuse_leakage(model, subject.corrupt(fork), fork.layout)
    worst, worst_hidden = _compare_with_unpacked(subject, documents, share_prefixes=True)
    pack = pack_with_sharing(documents, model.get_rotation_key)
    num_computed = pack.layout.num_tokens
    num_input = sum(map(count_input_tokens, documents))
    evidence = (
        f"relative difference at most {worst:.1e}, of hidden states at most {worst_hidden:.1e}; "
        f"{isolation.num_segments} segments isolated "
        f"{isolation.extent}; {num_computed} tokens computed for {num_input}"
    )
    return CheckResult.from_items(
        kind,
        num_input - num_computed,
        evidence,
        if_none="the documents with a common prefix are rotated differently",
    )


def leak_sibling(subject: Subject) -> Subject:
    """Let one branch continue its sibling instead of their common prefix."""

    def leak(batch: Batch) -> Batch:
        siblings = find_siblings(batch.layout)
        if siblings is None:
            return batch
        parents = list(batch.layout.parents)
        parents[siblings[1]] = siblings[0]
        layout = dataclasses.replace(batch.layout, parents=tuple(parents))
        return dataclasses.replace(batch, layout=layout)

    return subject.with_corrupt_batches(leak)


def explain_missing_siblings(subject: Subject) -> str:
    return "" if subject.samples.sharing_documents else "no documents share a prefix"


def _compare_with_unpacked(
    subject: Subject, documents: Sequence[Document], *, share_prefixes: bool = False
) -> tuple[float, float]:
    """Return the worst relative differences of a document in one pack and alone: of its summed
    loss, and of its hidden states.

    Differences of tokens cancel in the sum, and in bf16 its tolerance is wide."""
    model = subject.model
    num_tokens = sum(map(len, documents))
    (pack,) = pack_step(
        documents, num_tokens, should_share=share_prefixes, get_group=model.get_rotation_key
    )
    packed_batch = collate(pack, model.device)
    packed_SH = model.compute_hidden(packed_batch)
    packed_losses = _sum_document_losses(model, packed_batch, packed_SH)
    tolerance = (SHARED_TOLERANCE if share_prefixes else LOSS_TOLERANCE)[model.dtype]
    worst = 0.0
    worst_hidden = 0.0
    for index, (document, packed_loss) in enumerate(
        zip(pack.documents, packed_losses, strict=True)
    ):
        batch = pack_documents([document], model.device)
        hidden_SH = subject.compute_unpacked(document, batch.positions_S)
        (unpacked_loss,) = _sum_document_losses(model, batch, hidden_SH)
        num_targets = np.count_nonzero(document.weights_L)
        size = max(abs(unpacked_loss), 1e-3 * num_targets)
        difference = abs(packed_loss - unpacked_loss)
        worst = max(worst, difference / size)
        limit = tolerance * size + TOKEN_TOLERANCE_NATS[model.dtype] * math.sqrt(num_targets)
        if not difference <= limit:
            kind = "prefix-shared" if share_prefixes else "packed"
            setting = "share_prefixes: false" if share_prefixes else "another attention backend"
            raise GateError(
                f"{kind} loss {packed_loss:.5f}, unpacked loss {unpacked_loss:.5f}",
                where=f"preflight: {document.id}",
                fix=f"use {setting}; {REPORT_FIX}",
            )
        # A mask would have a shape by its values, for which a GPU has to wait.
        is_other_S = packed_batch.document_S != index
        rows_S = torch.argsort(is_other_S.int(), stable=True)[: len(hidden_SH)]
        document_SH = packed_SH[rows_S]
        worst_hidden = max(worst_hidden, _compare_states(subject, document, document_SH, hidden_SH))
    return worst, worst_hidden


def _compare_states(
    subject: Subject, document: Document, packed_SH: Tensor, alone_SH: Tensor
) -> float:
    """Return by how much the hidden states of a document in a pack differ from those alone. A model
    whose logits differ more from transformers, block by block from rounding, may differ more."""
    model = subject.model
    has_experts = bool(find_experts(model.network))
    tolerance = (ROUTED_TOLERANCE if has_experts else HIDDEN_TOLERANCE)[model.dtype]
    tolerance = max(tolerance, 2 * subject.logit_error)
    error = compare_hidden(packed_SH, alone_SH, has_experts=has_experts)
    if not error <= tolerance:  # also refuses NaN
        raise GateError(
            f"hidden states in a pack differ from those alone by {error:.1%} of their norm, "
            f"more than {tolerance:.1%}",
            where=f"preflight: {document.id}",
            fix=f"use another attention backend; {REPORT_FIX}",
        )
    return error


def _sum_document_losses(model: PackedCausalLM, batch: Batch, hidden_SH: Tensor) -> list[float]:
    """Return the summed loss of each document of the batch."""
    losses_S = measure_target_losses(hidden_SH, model.head, batch.targets_S)
    sums_D = torch.zeros(len(batch.ids), dtype=torch.float64)
    sums_D.index_add_(0, batch.document_S.cpu(), losses_S.double().cpu())
    return sums_D.tolist()


# ---------------------------------------------------------------- documents apart


@dataclass(frozen=True)
class Isolation:
    """The number of segments that were changed. With `is_bitwise` the others stayed bitwise equal,
    else only their gradient is 0."""

    num_segments: int
    is_bitwise: bool

    @property
    def extent(self) -> str:
        """Return in what sense the others are unchanged."""
        return "bitwise" if self.is_bitwise else "by their gradient, which is 0"


def refuse_leakage(model: PackedCausalLM, batch: Batch, layout: PackLayout) -> Isolation:
    """Change the tokens of each segment in turn; only segments that continue it may change.

    `layout` says which do; the batch's own may be corrupted. Raises GateError if an unrelated
    segment changes.

    With experts the others may be rounded otherwise, since a matrix product of other rows may round
    a row otherwise, and then a router that meets two equal scores may decide otherwise. There no
    gradient of the others' hidden states may reach the changed tokens, exactly. Layers that carry
    state have a backward of their own, which may cross documents where the forward does not: their
    gradient is computed too, once. Experts with a limited capacity, whose choices have no gradient,
    are found by comparing blocks in a pack with documents alone."""
    all_positions_S = torch.arange(batch.layout.num_tokens, device=model.device)
    batch = dataclasses.replace(batch, positions_S=all_positions_S)
    has_experts = bool(find_experts(model.network))
    has_state = any(isinstance(module, MIXERS) for module in model.network.modules())
    before = None if has_experts else model.compute_hidden(batch)
    num_segments = 0
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        unrelated_U = _find_unrelated(layout, segment).to(model.device)
        if not len(unrelated_U):
            continue
        num_segments += 1
        if has_experts or (has_state and num_segments == 1):
            _refuse_gradient(model, batch, slice(start, start + length), unrelated_U)
        if before is None:
            continue
        tokens_T = batch.tokens_T.clone()
        tokens_T[start : start + length] = tokens_T[start : start + length].roll(1) + 1
        tokens_T %= model.token_rows
        after = model.compute_hidden(dataclasses.replace(batch, tokens_T=tokens_T))
        if not torch.equal(before[unrelated_U], after[unrelated_U]):
            raise GateError(
                "documents in a pack attend to each other", where="preflight", fix=BACKEND_FIX
            )
    return Isolation(num_segments, is_bitwise=not has_experts)


def compare_hidden(packed_SH: Tensor, alone_SH: Tensor, *, has_experts: bool) -> float:
    """Return the largest difference of a group of consecutive tokens relative to its norm.

    Fewer tokens than a few count as a part of them, since one may be rounded worse than most; with
    experts, fewer than a group, since one may meet another expert."""
    few = GROUP_TOKENS if has_experts else FEW_TOKENS
    worst = 0.0
    packed_groups = packed_SH.double().split(GROUP_TOKENS)
    for packed, alone in zip(packed_groups, alone_SH.double().split(GROUP_TOKENS), strict=True):
        error = float((packed - alone).norm() / alone.norm())
        error *= min(1.0, len(alone) / few) ** 0.5
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _find_unrelated(layout: PackLayout, segment: int) -> Tensor:
    """Return the indices [U] of the tokens of segments that do not continue this one."""
    is_unrelated = [segment not in layout.get_path(i) for i in range(len(layout.lengths))]
    (indices,) = np.nonzero(np.repeat(is_unrelated, layout.lengths))
    return torch.from_numpy(indices)


def _refuse_gradient(
    model: PackedCausalLM, batch: Batch, changed: slice, unrelated_U: Tensor
) -> None:
    """Raise GateError if unrelated hidden states have a gradient at the embeddings of the `changed`
    tokens, or none at their own."""
    embeddings: list[Tensor] = []

    def make_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    hook = model.network.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            hidden_UH = model.compute_hidden(batch)[unrelated_U]
            generator = torch.Generator().manual_seed(0)
            direction_UH = torch.randn(hidden_UH.shape, generator=generator).to(hidden_UH)
            (gradient,) = torch.autograd.grad((hidden_UH * direction_UH).sum(), embeddings)
    finally:
        hook.remove()
    felt_T = gradient.reshape(batch.layout.num_tokens, -1).abs().sum(1)
    if felt_T[changed].any() or not felt_T[unrelated_U].any():
        message = "documents in a pack attend to each other"
        if not felt_T[changed].any():
            message = "gradient check inconclusive: no gradient even at a document's own tokens"
        raise GateError(message, where="preflight", fix=BACKEND_FIX)


# ---------------------------------------------------------------- rotation


def has_rotary(subject: Subject) -> bool:
    """Return whether the rotation of a token depends on the length of its document."""
    return subject.model.rotary is not None


def check_rotation(subject: Subject) -> CheckResult:
    """Check that each document of a pack is rotated as if it were alone.

    For rotary embeddings that depend on the length: the shortest documents and the longest one, in
    a pack of more tokens than the limit from which on they do."""
    model = subject.model
    rotary = require(model.rotary)
    documents = choose_packed_documents(subject.samples.documents)
    batch = pack_beyond(documents, rotary.longest_limit, model.device)
    layout = batch.layout
    model.set_layout(subject.corrupt(batch).layout)
    x = torch.empty(0, dtype=torch.float32, device=model.device)
    worst = 0.0
    for arguments in rotary.list_layer_types():
        tables = rotary(x, batch.positions_T[None], *arguments)
        alone: dict[int, tuple[Tensor, Tensor]] = {}
        for start, length in zip(layout.starts, layout.lengths, strict=True):
            if length not in alone:
                alone[length] = rotary.compute_alone(x, length, *arguments)
            for packed_1TD, alone_1LD in zip(tables, alone[length], strict=True):
                difference = packed_1TD[:, start : start + length] - alone_1LD
                worst = max(worst, float(difference.abs().max()))
    if not worst <= ROTATION_TOLERANCE:
        raise GateError(
            f"the length of a pack changes the rotation of its documents by {worst:.2g}",
            where="preflight",
            fix=REPORT_FIX,
        )
    lengths = f"{min(layout.lengths)} to {max(layout.lengths)} tokens"
    evidence = (
        f"{len(layout.lengths)} documents of {lengths} in a pack of {layout.num_tokens:,}, "
        f"difference at most {worst:.1e}"
    )
    return CheckResult.from_items(
        "rotation per document", len(layout.lengths), evidence, if_none="there is no document"
    )


def explain_equal_rotation(subject: Subject) -> str:
    """Return why no document would be rotated otherwise by the length of its pack."""
    rotary = require(subject.model.rotary)
    documents = choose_packed_documents(subject.samples.documents)
    layout = pack_beyond(documents, rotary.longest_limit).layout
    x = torch.empty(0, dtype=torch.float32, device=subject.model.device)
    for arguments in rotary.list_layer_types():
        as_pack = rotary.compute_alone(x, layout.num_tokens, *arguments)
        for length in set(layout.lengths):
            alone = rotary.compute_alone(x, length, *arguments)
            for pack_1TD, alone_1LD in zip(as_pack, alone, strict=True):
                if (pack_1TD[:, :length] - alone_1LD).abs().max() > ROTATION_TOLERANCE:
                    return ""
    return "it changes no rotation here"
