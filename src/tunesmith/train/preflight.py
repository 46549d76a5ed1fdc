"""Preflight: prove on the real model and the real data that a run is not silently wrong.

In: our model, a few real documents, and the logits of the stock transformers model on them. Out: a
CheckResult per check. A check that fails stops the run with GateError before the first step.

The checks also run on injected faults (a leaking mask, labels shifted by one, a branch that attends
to its sibling, a lost target, a pack rotated as one document) and must refuse each: a check that
cannot fail proves nothing. Every result says how many items it compared; a check of nothing, and a
fault that cannot be injected, are warnings.

Left out: choosing the documents (session/preflight_probe.py), checks of tokens alone
(preflight_tokens.py). No weight changes here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.hardware import release_memory
from tunesmith.core.types import Batch, Document, PackLayout
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.expert_weights import DenseExpertWeight
from tunesmith.model.experts import find_experts
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.model.quantization import find_quantized_weights
from tunesmith.session.preflight_probe import (
    ISOLATION_TOKENS,
    MAX_PACKED_DOCUMENTS,
    PreflightSamples,
    WindowedText,
    choose_packed_documents,
    choose_positions,
    find_siblings,
    pack_documents,
    pack_with_sharing,
    trim_to_fork,
    truncate,
)
from tunesmith.train.preflight_base import (
    break_oracle,
    check_oracle,
    compare_logits,
    describe_rounding,
    explain_unbreakable,
)
from tunesmith.train.preflight_blocks import (
    BLOCK_FIX,
    can_amplify_rounding,
    compare_backward,
    compare_blocks,
)
from tunesmith.train.preflight_isolation import (
    HIDDEN_TOLERANCE,
    ROUTED_TOLERANCE,
    compare_hidden,
    refuse_leakage,
)
from tunesmith.train.preflight_rotation import check_rotation, is_rotated_otherwise
from tunesmith.train.preflight_tokens import (
    REPORT_FIX,
    ROW_CHECKS,
    TEXT_CHECKS,
    check_role_masks,
    check_supervised_tokens,
    check_window_coverage,
    swap_role_masks,
)

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


@dataclass(frozen=True, eq=False)
class ModelUnderTest:
    """The model, with a cache of its hidden states: several checks need the same documents.

    `logit_errors` are the differences from transformers that `check_logits` accepted; it may need
    the result of `check_blocks`."""

    model: PackedCausalLM
    hidden_cache: dict[bytes, tuple[Tensor, Tensor]] = field(
        default_factory=dict[bytes, tuple[Tensor, Tensor]]
    )
    logit_errors: list[float] = field(default_factory=list[float])
    block_results: list[CheckResult] = field(default_factory=list[CheckResult])

    def compute_unpacked(self, document: Document, positions_S: Tensor) -> Tensor:
        """Return hidden states [S, H] of a document that is alone in its pack.

        `positions_S` must be targets or checked positions of the document."""
        key = document.tokens_L.tobytes() + document.weights_L.tobytes()
        if key not in self.hidden_cache:
            device = self.model.device
            batch = pack_documents([document], device)
            target_positions = np.flatnonzero(document.weights_L) - 1
            positions = np.union1d(target_positions, choose_positions(document))
            positions_P = torch.from_numpy(positions).to(device)
            batch = dataclasses.replace(batch, positions_S=positions_P)
            self.hidden_cache[key] = (positions_P, self.model.compute_hidden(batch))
        positions_P, hidden_PH = self.hidden_cache[key]
        return hidden_PH[torch.searchsorted(positions_P, positions_S)]


def run_preflight(model: PackedCausalLM, samples: PreflightSamples) -> list[CheckResult]:
    """Run all checks in order; raise GateError for the first that fails."""
    model.network.eval()
    subject = ModelUnderTest(model)
    with torch.no_grad():
        results = [check_supervised_tokens(samples), check_oracle(samples, model.dtype)]
        if samples.rounding is not None:
            results.append(describe_rounding(samples))
        results += [check(subject, samples) for check in FORWARD_CHECKS]
        if model.rotary is not None:
            results.append(check_rotation(model, model.rotary, samples))
        token_checks = ROW_CHECKS if samples.texts is None else TEXT_CHECKS
        results += [check(samples) for check in token_checks]
        if samples.role_masks is not None:
            results.append(check_role_masks(samples))
        if samples.sharing_documents is not None:
            results.append(check_prefix_sharing(subject, samples))
        results.append(check_blocks(subject, samples))
        results.append(compare_backward(model, samples))
        if samples.is_quantized or find_quantized_weights(model.network):
            results.append(_describe_quantized_weights(model))
        results.append(check_negative_controls(subject, samples))
    release_memory()  # of its networks in fp32; the steps need blocks of other sizes
    return results


def _describe_quantized_weights(model: PackedCausalLM) -> CheckResult:
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


# ---------------------------------------------------------------- injected faults


Corruption = Callable[[Batch], Batch]


@dataclass(frozen=True)
class NegativeControl:
    """An injected fault, and the check that must refuse it.

    `skip_reason` says why the fault cannot be injected; empty if it can."""

    fault: str
    check: Callable[[], CheckResult]
    skip_reason: str = ""


def check_negative_controls(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that each injected fault is detected."""
    detected: list[str] = []
    skipped: list[str] = []
    for control in list_controls(subject, samples):
        if control.skip_reason:
            skipped.append(f"{control.fault} ({control.skip_reason})")
            continue
        try:
            control.check()
        except GateError:
            detected.append(control.fault)
            continue
        raise GateError(
            f"preflight did not detect an injected fault ({control.fault}), so it proves nothing",
            where="preflight",
            fix=REPORT_FIX,
        )
    kind = "negative controls"
    if not skipped:
        evidence = f"all {len(detected)} injected faults detected: {', '.join(detected)}"
        return CheckResult.from_items(kind, len(detected), evidence, if_none="there is no fault")
    counts = f"{len(detected)} of {len(detected) + len(skipped)} injected faults detected"
    evidence = f"{counts}: {', '.join(detected)}; not injected: {', '.join(skipped)}"
    return CheckResult(kind, "warn", evidence, num_checked=len(detected))


def list_controls(subject: ModelUnderTest, samples: PreflightSamples) -> list[NegativeControl]:
    """Return the faults for these samples, those that cannot be injected included."""
    controls = [
        NegativeControl(
            "leaking mask", lambda: check_document_isolation(subject, samples, corrupt=_leak_mask)
        ),
        NegativeControl(
            "block that reads another document",
            lambda: check_blocks(subject, samples, corrupt=_leak_mask),
            "" if samples.stock else "transformers' modules were not kept",
        ),
        NegativeControl(
            "shifted labels",
            lambda: check_labels(subject, samples, corrupt=_shift_labels),
            _explain_invisible_shift(samples, subject.model.dtype),
        ),
    ]
    model = subject.model
    controls.append(
        NegativeControl(
            "cache that loses a token",
            lambda: check_oracle(break_oracle(samples), model.dtype),
            explain_unbreakable(samples.oracle, model.dtype),
        )
    )
    rotary = model.rotary
    if rotary is not None:
        controls.append(
            NegativeControl(
                "pack rotated as one document",
                lambda: check_rotation(model, rotary, samples, corrupt=_leak_mask),
                ""
                if is_rotated_otherwise(model, rotary, samples)
                else "it changes no rotation here",
            )
        )
    return controls + _list_optional_controls(subject, samples)


def _list_optional_controls(
    subject: ModelUnderTest, samples: PreflightSamples
) -> list[NegativeControl]:
    """Return the faults of checks that not every run has."""
    controls: list[NegativeControl] = []
    if samples.sharing_documents is not None:
        controls.append(
            NegativeControl(
                "branch that attends to its sibling",
                lambda: check_prefix_sharing(subject, samples, corrupt=_leak_sibling),
                "" if samples.sharing_documents else "no documents share a prefix",
            )
        )
    if samples.role_masks is not None:
        controls.append(
            NegativeControl(
                "targets where none are trained",
                lambda: check_role_masks(swap_role_masks(samples)),
                ""
                if any(mask.has_distinct_targets for mask in samples.role_masks)
                else "no trained message differs from all other text",
            )
        )
    if samples.texts is not None:
        without_target = _drop_target(samples)
        controls.append(
            NegativeControl(
                "lost target",
                lambda: check_window_coverage(without_target or samples),
                "" if without_target else "there is no text",
            )
        )
    return controls


def _leave_unchanged(batch: Batch) -> Batch:
    return batch


def _leak_mask(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=PackLayout((0,), (batch.layout.num_tokens,)))


def _shift_labels(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])


def _explain_invisible_shift(samples: PreflightSamples, dtype: torch.dtype) -> str:
    """Return why labels shifted by one cannot be noticed, empty if they can."""
    pairs = list(zip(samples.documents, samples.reference_logits, strict=True))
    for document, stock_PV in pairs[:MAX_PACKED_DOCUMENTS]:
        _, next_losses = _compute_stock_losses(document, stock_PV)
        _, current_losses = _compute_stock_losses(document, stock_PV, shift=0)
        change = (current_losses - next_losses).abs().mean() / (1 + next_losses.mean())
        if change > 2 * LOGIT_TOLERANCE[dtype]:  # ours may differ by as much
            return ""
    return "the next tokens have nearly the losses of the tokens before them"


def _leak_sibling(batch: Batch) -> Batch:
    """Let one branch continue its sibling instead of their common prefix."""
    branch, sibling = find_siblings(batch.layout) or (-1, 0)
    parents = list(batch.layout.parents)
    if sibling < len(parents):
        parents[sibling] = branch
    layout = dataclasses.replace(batch.layout, parents=tuple(parents))
    return dataclasses.replace(batch, layout=layout)


def _drop_target(samples: PreflightSamples) -> PreflightSamples | None:
    """Remove the last target of the first window; return None without texts."""
    if not samples.texts:
        return None
    first_text, *others = samples.texts
    first_window, *windows = first_text.windows
    weights_L = first_window.weights_L.copy()
    weights_L[-1] = 0
    corrupted_window = dataclasses.replace(first_window, weights_L=weights_L)
    corrupted = WindowedText(first_text.document, (corrupted_window, *windows))
    return dataclasses.replace(samples, texts=(corrupted, *others))


# ---------------------------------------------------------------- checks of the forward


def check_blocks(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check every block on transformers' inputs, in a pack."""
    if corrupt is not _leave_unchanged:
        return compare_blocks(subject.model, samples, corrupt)
    if not subject.block_results:
        subject.block_results.append(compare_blocks(subject.model, samples, corrupt))
    return subject.block_results[0]


def check_logits(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that our packed forward gives the logits of the stock model, document by document."""
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
            check_blocks(subject, samples)  # names the wrong one
        if not (is_explicable and error <= AMPLIFIED_TOLERANCE):
            raise GateError(
                f"logits differ from transformers by {error:.1%} of their norm, "
                f"more than {tolerance:.1%}",
                where=f"preflight: {document.id}",
                fix=BLOCK_FIX,
            )
    subject.logit_errors.append(worst)
    lengths = ", ".join(str(count_input_tokens(document)) for document in samples.documents)
    evidence = (
        f"relative difference at most {worst:.2%}, "
        f"top-1 equal at {num_agreeing}/{num_positions} positions; document lengths {lengths}"
    )
    return CheckResult.from_items(
        "logits match transformers", num_positions, evidence, if_none="there is no document"
    )


def check_labels(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check that each position is trained to predict the document's next token.

    Our losses are compared with the cross-entropy of the stock logits for the next tokens, which
    does not use our code from documents to targets."""
    worst = 0.0
    num_checked = 0
    head = subject.model.head
    pairs = list(zip(samples.documents, samples.reference_logits, strict=True))
    for document, stock_PV in pairs[:MAX_PACKED_DOCUMENTS]:
        batch = corrupt(pack_documents([document], subject.model.device))
        hidden_SH = subject.compute_unpacked(document, batch.positions_S)
        losses_S = measure_target_losses(hidden_SH, head, batch.targets_S)
        loss_by_position = dict(zip(batch.positions_S.tolist(), losses_S.tolist(), strict=True))
        positions, stock_losses = _compute_stock_losses(document, stock_PV)
        our_losses = torch.tensor([loss_by_position.get(p, math.nan) for p in positions])
        error = float((our_losses - stock_losses).abs().mean() / (1 + stock_losses.mean()))
        worst = max(worst, error)
        num_checked += len(positions)
        if not error <= LOGIT_TOLERANCE[subject.model.dtype]:
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


def check_document_isolation(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check that changing one document of a pack leaves the others' outputs bitwise unchanged, with
    experts up to rounding."""
    documents = [
        truncate(document, ISOLATION_TOKENS)
        for document in samples.documents[:MAX_PACKED_DOCUMENTS]
    ]
    batch = pack_documents(documents, subject.model.device)
    isolation = refuse_leakage(subject.model, corrupt(batch), batch.layout)
    num_changed = isolation.num_segments
    evidence = f"{num_changed} documents changed in turn, the others unchanged {isolation.extent}"
    return CheckResult.from_items(
        "no cross-document attention", num_changed, evidence, if_none="there is no second document"
    )


def check_packed_loss(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that every document has the same loss in a pack as alone, and the same hidden states
    token by token."""
    documents = choose_packed_documents(samples.documents)
    worst, worst_hidden = _compare_with_unpacked(subject, documents)
    lengths = ", ".join(str(count_input_tokens(document)) for document in documents)
    evidence = (
        f"{len(documents)} documents, relative difference at most {worst:.1e}, of hidden states "
        f"at most {worst_hidden:.1e}; "
        f"document lengths {lengths}"
    )
    return CheckResult.from_items(
        "packed loss = unpacked loss", len(documents), evidence, if_none="there is no document"
    )


def check_prefix_sharing(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check that sharing a prefix changes no loss and that branches do not attend to each other."""
    kind = "prefix-shared loss = unshared loss"
    documents = samples.sharing_documents
    if not documents:
        if_none = "no two documents share a prefix; all are too short"
        return CheckResult.from_items(kind, 0, "", if_none=if_none)
    model = subject.model
    fork = pack_with_sharing(trim_to_fork(documents), device=model.device)
    isolation = refuse_leakage(model, corrupt(fork), fork.layout)
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


def _compare_with_unpacked(
    subject: ModelUnderTest, documents: Sequence[Document], *, share_prefixes: bool = False
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
    subject: ModelUnderTest, document: Document, packed_SH: Tensor, alone_SH: Tensor
) -> float:
    """Return by how much the hidden states of a document in a pack differ from those alone. A model
    whose logits differ more from transformers, block by block from rounding, may differ more."""
    model = subject.model
    has_experts = bool(find_experts(model.network))
    tolerance = (ROUTED_TOLERANCE if has_experts else HIDDEN_TOLERANCE)[model.dtype]
    tolerance = max([tolerance, *(2 * error for error in subject.logit_errors)])
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


# A check that cannot pass on nothing: it says how many items it compared.
FORWARD_CHECKS = (check_logits, check_labels, check_document_isolation, check_packed_loss)
