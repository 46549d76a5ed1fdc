"""Preflight: prove on the real model and the real data that a run is not silently wrong.

In: our model, a few real documents, and the logits of the stock transformers model on them. Out: a
CheckResult per check. A check that fails stops the run with GateError before the first step.

The checks also run on injected faults (a leaking mask, labels shifted by one, a branch that attends
to its sibling, a lost target) and must refuse each: a check that cannot fail proves nothing.

Left out: choosing the documents (session/preflight_probe.py). No weight changes here."""

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
from tunesmith.core.types import Batch, Document, PackLayout
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.model.quantization import find_quantized_weights
from tunesmith.session.preflight_probe import (
    CHAINED_SUFFIX,
    MAX_PACKED_DOCUMENTS,
    TRUNCATED_SUFFIX,
    PreflightSamples,
    WindowedText,
    choose_packed_documents,
    choose_positions,
    find_siblings,
    pack_documents,
    pack_with_sharing,
    trim_to_fork,
    truncate_to_beginning,
)

# Largest relative RMS difference of centered logits between two correct computations.
LOGIT_TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-3, torch.float64: 1e-5}
# Largest difference of two correct losses: a relative part, and a random part in nats per token.
# A logit of 20 is followed by 20.125 in bf16, and matrix products of other shapes round otherwise:
# SmolLM2 on a CPU with AMX differs by 1.2 nats of 65, and the fp32 loss lies between the two.
LOSS_TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-6}
# The rows of a shared prefix are rounded together with other rows than in an unshared pack.
SHARED_TOLERANCE = LOSS_TOLERANCE | {torch.bfloat16: 0.03}
TOKEN_TOLERANCE_NATS = {torch.bfloat16: 0.3, torch.float32: 0.0, torch.float64: 0.0}

REPORT_FIX = "please report this"


@dataclass(frozen=True, eq=False)
class ModelUnderTest:
    """The model, with a cache of its hidden states: several checks need the same documents."""

    model: PackedCausalLM
    hidden_cache: dict[bytes, tuple[Tensor, Tensor]] = field(
        default_factory=dict[bytes, tuple[Tensor, Tensor]]
    )

    def compute_unpacked(self, document: Document, positions_S: Tensor) -> Tensor:
        """Return hidden states [S, H] of a document that is alone in its pack.

        `positions_S` must be targets or checked positions of the document."""
        key = document.tokens_L.tobytes() + document.weights_L.tobytes()
        if key not in self.hidden_cache:
            batch = pack_documents([document])
            checked_P = torch.tensor(choose_positions(document))
            positions_P = torch.cat([batch.positions_S, checked_P]).unique()
            batch = dataclasses.replace(batch, positions_S=positions_P)
            self.hidden_cache[key] = (positions_P, self.model.compute_hidden(batch))
        positions_P, hidden_PH = self.hidden_cache[key]
        return hidden_PH[torch.searchsorted(positions_P, positions_S)]


def run_preflight(model: PackedCausalLM, samples: PreflightSamples) -> list[CheckResult]:
    """Run all checks in order; raise GateError for the first that fails."""
    model.network.eval()
    subject = ModelUnderTest(model)
    with torch.no_grad():
        checks = CHECKS if samples.texts is None else TEXT_CHECKS
        results = [check(subject, samples) for check in checks]
        if samples.sharing_documents:
            results.append(check_prefix_sharing(subject, samples))
        if find_quantized_weights(model.network):
            results.append(_describe_quantized_weights(model))
        results.append(check_negative_controls(subject, samples))
    return results


def _describe_quantized_weights(model: PackedCausalLM) -> CheckResult:
    weights = find_quantized_weights(model.network).values()
    quantized_bytes = sum(weight.nbytes for weight in weights)
    ratio = quantized_bytes / sum(2 * weight.num_parameters for weight in weights)
    evidence = f"{len(weights)} matrices, {quantized_bytes:,} bytes, {ratio:.3f}x of bf16"
    return CheckResult("4-bit weights", "ok", evidence)


# ---------------------------------------------------------------- injected faults


Corruption = Callable[[Batch], Batch]


def check_negative_controls(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that each injected fault is detected."""
    controls: dict[str, Callable[[], CheckResult]] = {
        "leaking mask": lambda: check_document_isolation(subject, samples, corrupt=_leak_mask),
        "shifted labels": lambda: check_labels(subject, samples, corrupt=_shift_labels),
    }
    if samples.sharing_documents:
        controls["branch that attends to its sibling"] = lambda: check_prefix_sharing(
            subject, samples, corrupt=_leak_sibling
        )
    if texts := samples.texts:
        controls["lost target"] = lambda: check_window_coverage(
            subject, _drop_target(samples, texts)
        )
    for fault, check in controls.items():
        try:
            check()
        except GateError:
            continue
        raise GateError(
            f"preflight did not detect an injected fault ({fault}), so it proves nothing",
            where="preflight",
            fix=REPORT_FIX,
        )
    evidence = f"all {len(controls)} injected faults detected: {', '.join(controls)}"
    return CheckResult("negative controls", "ok", evidence)


def _leave_unchanged(batch: Batch) -> Batch:
    return batch


def _leak_mask(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=PackLayout((0,), (batch.layout.num_tokens,)))


def _shift_labels(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])


def _leak_sibling(batch: Batch) -> Batch:
    """Let one branch continue its sibling instead of their common prefix."""
    branch, sibling = find_siblings(batch.layout) or (-1, 0)
    parents = list(batch.layout.parents)
    if sibling < len(parents):
        parents[sibling] = branch
    layout = dataclasses.replace(batch.layout, parents=tuple(parents))
    return dataclasses.replace(batch, layout=layout)


def _drop_target(samples: PreflightSamples, texts: Sequence[WindowedText]) -> PreflightSamples:
    first_text = texts[0]
    first_window = first_text.windows[0]
    weights_L = first_window.weights_L.copy()
    weights_L[-1] = 0
    corrupted_window = dataclasses.replace(first_window, weights_L=weights_L)
    corrupted = WindowedText(first_text.document, (corrupted_window, *first_text.windows[1:]))
    return dataclasses.replace(samples, texts=(corrupted, *texts[1:]))


# ---------------------------------------------------------------- checks of the forward


def check_logits(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that our packed forward gives the logits of the stock model, document by document."""
    worst = 0.0
    num_agreeing = 0
    num_positions = 0
    head = subject.model.head
    tolerance = LOGIT_TOLERANCE[subject.model.dtype]
    for document, stock_PV in zip(samples.documents, samples.reference_logits, strict=True):
        positions_P = torch.tensor(choose_positions(document))
        ours_PV = head.compute_logits(subject.compute_unpacked(document, positions_P)).float()
        centered_PV = stock_PV - stock_PV.mean(-1, keepdim=True)
        difference_PV = ours_PV - ours_PV.mean(-1, keepdim=True) - centered_PV
        error = float(difference_PV.norm() / centered_PV.norm())
        worst = max(worst, error)
        num_agreeing += int((ours_PV.argmax(-1) == stock_PV.argmax(-1)).sum())
        num_positions += len(stock_PV)
        if not error <= tolerance:  # also refuses NaN
            raise GateError(
                f"logits differ from transformers by {error:.1%} of their norm, "
                f"more than {tolerance:.1%}",
                where=f"preflight: {document.id}",
                fix="this model family is not supported yet; please report it",
            )
    lengths = ", ".join(str(count_input_tokens(document)) for document in samples.documents)
    evidence = (
        f"relative difference at most {worst:.2%}, "
        f"top-1 equal at {num_agreeing}/{num_positions} positions; document lengths {lengths}"
    )
    return CheckResult("logits match transformers", "ok", evidence)


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
        batch = corrupt(pack_documents([document]))
        hidden_SH = subject.compute_unpacked(document, batch.positions_S)
        losses_S = measure_target_losses(hidden_SH, head, batch.targets_S)
        loss_by_position = dict(zip(batch.positions_S.tolist(), losses_S.tolist(), strict=True))
        rows: list[int] = []
        positions: list[int] = []
        for row, position in enumerate(choose_positions(document)):
            if document.weights_L[position + 1]:
                rows.append(row)
                positions.append(position)
        next_tokens = torch.tensor([int(document.tokens_L[p + 1]) for p in positions])
        stock_losses = F.cross_entropy(stock_PV[rows].cpu(), next_tokens, reduction="none")
        our_losses = torch.tensor([loss_by_position.get(p, math.nan) for p in positions])
        error = float((our_losses - stock_losses).abs().mean() / (1 + stock_losses.mean()))
        worst = max(worst, error)
        num_checked += len(rows)
        if not error <= LOGIT_TOLERANCE[subject.model.dtype]:
            raise GateError(
                f"losses of the next tokens differ from transformers by {error:.1%}: "
                "labels are shifted or missing",
                where=f"preflight: {document.id}",
                fix=REPORT_FIX,
            )
    evidence = f"{num_checked} losses, relative difference at most {worst:.2%}"
    return CheckResult("labels match transformers", "ok", evidence)


def check_document_isolation(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check that changing one document of a pack leaves the others' outputs bitwise unchanged."""
    documents = [
        truncate_to_beginning(document) for document in samples.documents[:MAX_PACKED_DOCUMENTS]
    ]
    batch = pack_documents(documents)
    num_changed = _refuse_leakage(subject.model, corrupt(batch), batch.layout)
    evidence = f"{num_changed} documents changed in turn, the others bitwise unchanged"
    return CheckResult("no cross-document attention", "ok", evidence)


def _refuse_leakage(model: PackedCausalLM, batch: Batch, layout: PackLayout) -> int:
    """Change the tokens of each segment in turn; only segments that continue it may change.

    Return the number of segments; raise GateError if an unrelated one changes."""
    batch = dataclasses.replace(batch, positions_S=torch.arange(batch.layout.num_tokens))
    before = model.compute_hidden(batch)
    lengths_T = torch.tensor(layout.lengths)
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        tokens_T = batch.tokens_T.clone()
        tokens_T[start : start + length] = tokens_T[start : start + length].roll(1) + 1
        tokens_T %= model.head.weight.shape[0]
        after = model.compute_hidden(dataclasses.replace(batch, tokens_T=tokens_T))
        is_unrelated = [segment not in layout.get_path(i) for i in range(len(layout.lengths))]
        is_unrelated_T = torch.tensor(is_unrelated).repeat_interleave(lengths_T)
        if not torch.equal(before[is_unrelated_T], after[is_unrelated_T]):
            raise GateError(
                "documents in a pack attend to each other",
                where="preflight",
                fix="use another attention backend",
            )
    return len(layout.lengths)


def check_packed_loss(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that every document has the same loss in a pack as alone."""
    documents = choose_packed_documents(samples.documents)
    worst = _compare_with_unpacked(subject, documents)
    lengths = ", ".join(str(count_input_tokens(document)) for document in documents)
    evidence = f"relative difference at most {worst:.1e}; document lengths {lengths}"
    return CheckResult("packed loss = unpacked loss", "ok", evidence)


def check_prefix_sharing(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Check that sharing a prefix changes no loss and that branches do not attend to each other."""
    documents = samples.sharing_documents
    fork = pack_with_sharing(trim_to_fork(documents))
    num_segments = _refuse_leakage(subject.model, corrupt(fork), fork.layout)
    worst = _compare_with_unpacked(subject, documents, share_prefixes=True)
    pack = pack_with_sharing(documents, subject.model.get_rotation_key)
    num_computed = pack.layout.num_tokens
    num_input = sum(map(count_input_tokens, documents))
    evidence = (
        f"relative difference at most {worst:.1e}, {num_segments} segments isolated bitwise; "
        f"{num_computed} tokens computed for {num_input}"
    )
    return CheckResult("prefix-shared loss = unshared loss", "ok", evidence)


def _compare_with_unpacked(
    subject: ModelUnderTest, documents: Sequence[Document], *, share_prefixes: bool = False
) -> float:
    """Return the worst relative difference of a document's loss in one pack and alone."""
    model = subject.model
    num_tokens = sum(map(len, documents))
    (pack,) = pack_step(
        documents, num_tokens, should_share=share_prefixes, get_group=model.get_rotation_key
    )
    packed_batch = collate(pack)
    packed_losses = _sum_document_losses(model, packed_batch, model.compute_hidden(packed_batch))
    tolerance = (SHARED_TOLERANCE if share_prefixes else LOSS_TOLERANCE)[model.dtype]
    worst = 0.0
    for document, packed_loss in zip(pack.documents, packed_losses, strict=True):
        batch = pack_documents([document])
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
    return worst


def _sum_document_losses(model: PackedCausalLM, batch: Batch, hidden_SH: Tensor) -> list[float]:
    """Return the summed loss of each document of the batch."""
    losses_S = measure_target_losses(hidden_SH, model.head, batch.targets_S)
    sums_D = torch.zeros(len(batch.ids), dtype=torch.float64)
    sums_D.index_add_(0, batch.document_S.cpu(), losses_S.double().cpu())
    return sums_D.tolist()


# ---------------------------------------------------------------- checks of the tokens


def check_supervised_tokens(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that every document has a supervised token, and never its first."""
    del subject
    num_supervised = 0
    for document in samples.documents:
        if not document.weights_L.any() or document.weights_L[0]:
            raise GateError(
                "no token of this document is supervised, or its first one is",
                where=f"preflight: {document.id}",
                fix="look at the row with `tunesmith data show`",
            )
        num_supervised += int(np.count_nonzero(document.weights_L))
    num_tokens = sum(map(len, samples.documents))
    return CheckResult("supervised tokens", "ok", f"{num_supervised} of {num_tokens}")


def check_eos_supervised(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that the last supervised token of every document is an end token."""
    del subject
    no_end = (CHAINED_SUFFIX, TRUNCATED_SUFFIX)
    documents = [document for document in samples.documents if not document.id.endswith(no_end)]
    for document in documents:
        last = int(document.tokens_L[np.flatnonzero(document.weights_L)[-1]])
        if last not in samples.end_ids:
            raise GateError(
                f"the last supervised token is {last}, not an end token: "
                "the model would never learn to stop",
                where=f"preflight: {document.id}",
                fix="use on_overlong: drop instead of truncate, "
                "or a chat template that closes its answers",
            )
    return CheckResult("EOS is supervised", "ok", f"{len(documents)} answers end with EOS")


def check_token_ids(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that token ids, leading BOS included, equal those of apply_chat_template."""
    del subject
    kind = "token ids match apply_chat_template"
    num_prompts = 0
    for row_id, is_equal, is_full_row in samples.token_id_checks:
        num_prompts += not is_full_row
        if not is_equal:
            raise GateError(
                "token ids differ from apply_chat_template",
                where=f"preflight: {row_id}",
                fix="tokenizer.json and the tokenizer class disagree; if tokenizer.json is right, "
                'set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json',
            )
    if not samples.token_id_checks:
        evidence = "not compared: all rows are plain text, contain control-like text or a date"
        return CheckResult(kind, "warn", evidence)
    evidence = f"{len(samples.token_id_checks)} rows, leading BOS included"
    if num_prompts:
        evidence += f"; only the prompts of {num_prompts}"
    return CheckResult(kind, "ok", evidence)


def check_text_eos(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that EOS ends every text, occurs nowhere else, and is supervised."""
    del subject
    texts = samples.texts or ()
    for text in texts:
        is_eos = [token in samples.end_ids for token in text.document.tokens_L[1:].tolist()]
        ends_once = sum(is_eos) == 1 and is_eos[-1]
        last = text.windows[-1]
        is_supervised = last.weights_L[-1] and int(last.tokens_L[-1]) in samples.end_ids
        if not ends_once or not is_supervised:
            raise GateError(
                "EOS does not end the text, or is not supervised",
                where=f"preflight: {text.document.id}",
                fix="please report the model's tokenizer",
            )
    evidence = f"{len(texts)} texts end with a supervised EOS and contain no other"
    return CheckResult("EOS between documents", "ok", evidence)


def check_window_coverage(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Check that the windows' targets are the text's tokens in order, each once, but the first."""
    del subject
    texts = samples.texts or ()
    num_windows = 0
    num_targets = 0
    for text in texts:
        targets = np.concatenate([w.tokens_L[w.weights_L > 0] for w in text.windows])
        if not np.array_equal(targets, text.document.tokens_L[1:]):
            raise GateError(
                f"windows have {len(targets)} targets for a text of {len(text.document)} tokens, "
                "or other tokens than the text",
                where=f"preflight: {text.document.id}",
                fix=REPORT_FIX,
            )
        num_windows += len(text.windows)
        num_targets += len(targets)
    evidence = f"{num_targets:,} tokens of {len(texts)} texts in {num_windows:,} windows"
    return CheckResult("every token is a target once", "ok", evidence)


COMMON_CHECKS = (
    check_supervised_tokens,
    check_logits,
    check_labels,
    check_document_isolation,
    check_packed_loss,
)
CHECKS = (*COMMON_CHECKS, check_eos_supervised, check_token_ids)
TEXT_CHECKS = (*COMMON_CHECKS, check_text_eos, check_window_coverage)
