"""The proof before step 1, on the real model and the real data: what must hold for a run not to be
silently wrong.

In: the stock model's logits on a few real documents, our model, those documents. Out: a Verdict for
each claim; a claim that fails stops the run with GateError. The proof also runs on a mask that
leaks, on labels shifted by one and, where prefixes are shared, on a branch that sees its sibling,
and must refuse them: a check that cannot fail proves nothing. Nothing is trained here, no weight
changes."""

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
    MAX_PACKED_DOCUMENTS,
    PreflightSamples,
    WindowedText,
    choose_positions,
    find_siblings,
    pack_documents,
    pack_with_sharing,
    trim_to_fork,
    truncate_to_beginning,
)

# Relative root-mean-square difference of centred logits that two correct computations may show.
LOGIT_TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-3, torch.float64: 1e-5}
# What the losses of two correct computations may differ by: a share of them, and by chance so many
# nats a token. A logit of 20 is followed by 20.125 in bf16, and products of other sizes round
# otherwise: with SmolLM2 on a processor with AMX 1.2 nats of 65 were seen, where fp32 lies between
# the two.
LOSS_TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-6}
SHARED_TOLERANCE = LOSS_TOLERANCE | {
    torch.bfloat16: 0.03
}  # rows of a prefix are rounded with others than alone
TOKEN_TOLERANCE_NATS = {torch.bfloat16: 0.3, torch.float32: 0.0, torch.float64: 0.0}


@dataclass(frozen=True, eq=False)
class ModelUnderTest:
    """The model to prove, with what it says to documents alone: several claims ask for that, it is
    computed once."""

    model: PackedCausalLM
    hidden_cache: dict[bytes, tuple[Tensor, Tensor]] = field(
        default_factory=dict[bytes, tuple[Tensor, Tensor]]
    )

    def compute_alone(self, document: Document, positions_S: Tensor) -> Tensor:
        """Hidden states [S, H] of a document alone, at its targets or checked places."""
        key = document.tokens_L.tobytes() + document.weights_L.tobytes()
        if key not in self.hidden_cache:
            batch = pack_documents([document])
            checked_P = torch.cat(
                [batch.positions_S, torch.tensor(choose_positions(document))]
            ).unique()
            self.hidden_cache[key] = (
                checked_P,
                self.model.compute_hidden(dataclasses.replace(batch, positions_S=checked_P)),
            )
        checked_P, hidden_PH = self.hidden_cache[key]
        return hidden_PH[torch.searchsorted(checked_P, positions_S)]


def run_preflight(model: PackedCausalLM, samples: PreflightSamples) -> list[CheckResult]:
    """All claims in order. Raises GateError that names the first one that does not hold."""
    model.network.eval()
    subject = ModelUnderTest(model)
    with torch.no_grad():
        verdicts = [
            check(subject, samples) for check in (CHECKS if samples.texts is None else TEXT_CHECKS)
        ]
        _require_detected(
            "a mask that leaks",
            lambda: check_document_isolation(subject, samples, corrupt=_leak_mask),
        )
        _require_detected(
            "labels shifted by one", lambda: check_labels(subject, samples, corrupt=_shift_labels)
        )
        if samples.sharing_documents:
            verdicts.append(check_prefix_sharing(subject, samples))
            _require_detected(
                "a branch that sees its sibling",
                lambda: check_prefix_sharing(subject, samples, corrupt=_leak_sibling),
            )
        if texts := samples.texts:
            _require_detected(
                "a lost target",
                lambda: check_window_coverage(subject, _drop_target(samples, texts)),
            )
    if weights := find_quantized_weights(model.network).values():
        quantized_bytes, bf16_bytes = (
            sum(weight.nbytes for weight in weights),
            sum(2 * weight.num_parameters for weight in weights),
        )
        evidence = f"{len(weights)} matrices in {quantized_bytes:,} bytes, {quantized_bytes / bf16_bytes:.3f}x of what they take in bf16"
        verdicts.append(CheckResult("4-bit weights", "ok", evidence))
    detected_faults = [
        "a leaking mask",
        "shifted labels",
        *["a branch that sees its sibling"] * bool(samples.sharing_documents),
    ]
    detected_faults += ["a lost target"] * bool(samples.texts)
    return [*verdicts, CheckResult("controls", "ok", f"all refused: {', '.join(detected_faults)}")]


def _require_detected(fault: str, check: Callable[[], CheckResult]) -> None:
    try:
        check()
    except GateError:
        return
    raise GateError(f"the proof did not notice {fault}, so it proves nothing", where="preflight")


def _drop_target(samples: PreflightSamples, texts: Sequence[WindowedText]) -> PreflightSamples:
    first = texts[0].windows[0]
    weights_L = first.weights_L.copy()
    weights_L[-1] = 0
    corrupted = WindowedText(
        texts[0].document, (dataclasses.replace(first, weights_L=weights_L), *texts[0].windows[1:])
    )
    return dataclasses.replace(samples, texts=(corrupted, *texts[1:]))


Corruption = Callable[[Batch], Batch]


def _leave_unchanged(batch: Batch) -> Batch:
    return batch


def _leak_mask(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=PackLayout((0,), (batch.layout.num_tokens,)))


def _shift_labels(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])


def _leak_sibling(batch: Batch) -> Batch:
    """A branch goes on from the one beside it."""
    branch, sibling = find_siblings(batch.layout) or (-1, 0)
    parents = [
        branch if segment == sibling else parent
        for segment, parent in enumerate(batch.layout.parents)
    ]
    return dataclasses.replace(
        batch, layout=dataclasses.replace(batch.layout, parents=tuple(parents))
    )


def _select_all_positions(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions_S=torch.arange(batch.layout.num_tokens))


# ---------------------------------------------------------------- claims


def check_logits(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Our packed forward gives the stock model's logits, document by document."""
    worst, num_agreeing, total = 0.0, 0, 0
    model, tolerance = subject.model, LOGIT_TOLERANCE[subject.model.dtype]
    for document, stock in zip(samples.documents, samples.reference_logits, strict=True):
        ours = model.head.compute_logits(
            subject.compute_alone(document, torch.tensor(choose_positions(document)))
        ).float()
        centred = stock - stock.mean(-1, keepdim=True)
        difference = ours - ours.mean(-1, keepdim=True) - centred
        error = float(difference.norm() / centred.norm())
        worst, num_agreeing = (
            max(worst, error),
            num_agreeing + int((ours.argmax(-1) == stock.argmax(-1)).sum()),
        )
        total += len(stock)
        if not error <= tolerance:
            raise GateError(
                f"our forward differs from the stock model's by {error:.1%} of the logits' size, over {tolerance:.1%}",
                where=f"preflight: {document.id}",
                fix="this model family is not supported yet; please report it",
            )
    lengths = ", ".join(str(count_input_tokens(d)) for d in samples.documents)
    return CheckResult(
        "forward = stock",
        "ok",
        f"logits within {worst:.2%}, top token equal at {num_agreeing}/{total}; lengths {lengths}",
    )


def check_labels(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """What a position is trained to say is the document's next token: the losses are what the stock
    model's logits give for those tokens, without our way from documents to targets."""
    worst, num_checked, model = 0.0, 0, subject.model
    for document, stock in list(zip(samples.documents, samples.reference_logits, strict=True))[
        :MAX_PACKED_DOCUMENTS
    ]:
        batch = corrupt(pack_documents([document]))
        losses_S = measure_target_losses(
            subject.compute_alone(document, batch.positions_S), model.head, batch.targets_S
        )
        loss_by_position = dict(zip(batch.positions_S.tolist(), losses_S.tolist(), strict=True))
        rows = [
            (row, p)
            for row, p in enumerate(choose_positions(document))
            if document.weights_L[p + 1]
        ]
        next_tokens = torch.tensor([int(document.tokens_L[p + 1]) for _, p in rows])
        theirs = F.cross_entropy(
            stock[[row for row, _ in rows]].cpu(), next_tokens, reduction="none"
        )
        ours = torch.tensor([loss_by_position.get(p, math.nan) for _, p in rows])
        error = float((ours - theirs).abs().mean() / (1 + theirs.mean()))
        worst, num_checked = max(worst, error), num_checked + len(rows)
        if not error <= LOGIT_TOLERANCE[model.dtype]:
            raise GateError(
                f"losses differ by {error:.1%} from the stock model's for the next tokens: labels are shifted or lost",
                where=f"preflight: {document.id}",
                fix="please report this",
            )
    return CheckResult(
        "labels = next tokens",
        "ok",
        f"{num_checked} losses within {worst:.2%} of the stock model's",
    )


def check_document_isolation(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Other tokens in one document leave the outputs of all others bitwise the same."""
    pack = pack_documents(
        [truncate_to_beginning(document) for document in samples.documents[:MAX_PACKED_DOCUMENTS]]
    )
    num_changed = _refuse_leakage(subject.model, corrupt(pack), pack.layout)
    return CheckResult(
        "documents are blind", "ok", f"{num_changed} documents changed, the others bitwise the same"
    )


def _refuse_leakage(model: PackedCausalLM, batch: Batch, layout: PackLayout) -> int:
    """Changes the tokens of each segment of a layout in turn: only what continues it may change.
    How many there are."""
    before, lengths_T = (
        model.compute_hidden(_select_all_positions(batch)),
        torch.tensor(layout.lengths),
    )
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        tokens = batch.tokens_T.clone()
        tokens[start : start + length] = tokens[start : start + length].roll(1) + 1
        tokens %= model.head.weight.shape[0]
        after = model.compute_hidden(
            _select_all_positions(dataclasses.replace(batch, tokens_T=tokens))
        )
        is_unrelated = torch.tensor(
            [segment not in layout.get_path(i) for i in range(len(layout.lengths))]
        )
        is_unrelated_T = is_unrelated.repeat_interleave(lengths_T)
        if not torch.equal(before[is_unrelated_T], after[is_unrelated_T]):
            raise GateError(
                "documents in a pack see each other",
                where="preflight",
                fix="use another attention backend",
            )
    return len(layout.lengths)


def _sum_document_losses(
    model: PackedCausalLM, batch: Batch, hidden_SH: Tensor
) -> dict[int, float]:
    """Summed loss by place of the document in the batch."""
    losses_S = measure_target_losses(hidden_SH, model.head, batch.targets_S)
    sums = torch.zeros(len(batch.ids), dtype=torch.float64)
    sums.index_add_(0, batch.document_S.cpu(), losses_S.double().cpu())
    return dict(enumerate(sums.tolist()))


def check_packed_loss(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Every document has the same loss in a pack as alone."""
    worst = _compare_with_alone(subject, samples.documents[:MAX_PACKED_DOCUMENTS])
    return CheckResult("packed = alone", "ok", f"losses within {worst:.1e} of each other")


def _compare_with_alone(
    subject: ModelUnderTest, documents: Sequence[Document], *, share_prefixes: bool = False
) -> float:
    """The worst relative difference of a document's loss in one pack and alone."""
    (pack,) = pack_step(documents, sum(map(len, documents)), should_share=share_prefixes)
    model, batch = subject.model, collate(pack)
    packed_losses = _sum_document_losses(model, batch, model.compute_hidden(batch))
    tolerance, worst = (SHARED_TOLERANCE if share_prefixes else LOSS_TOLERANCE)[model.dtype], 0.0
    for index, document in enumerate(pack.documents):
        batch = pack_documents([document])
        alone_loss = _sum_document_losses(
            model, batch, subject.compute_alone(document, batch.positions_S)
        )[0]
        targets = np.count_nonzero(document.weights_L)
        difference, size = (
            abs(packed_losses[index] - alone_loss),
            max(abs(alone_loss), 1e-3 * targets),
        )
        worst = max(worst, difference / size)
        if not difference <= tolerance * size + TOKEN_TOLERANCE_NATS[model.dtype] * math.sqrt(
            targets
        ):
            pack_kind, fix = (
                ("a shared pack", "set share_prefixes: false")
                if share_prefixes
                else ("a pack", "use another attention backend")
            )
            raise GateError(
                f"loss {packed_losses[index]:.5f} in {pack_kind}, {alone_loss:.5f} alone",
                where=f"preflight: {document.id}",
                fix=f"{fix}; please report this",
            )
    return worst


def check_prefix_sharing(
    subject: ModelUnderTest, samples: PreflightSamples, *, corrupt: Corruption = _leave_unchanged
) -> CheckResult:
    """Documents that share what they begin with have the loss that they have alone, and branches
    are blind to each other: other tokens in one leave all that does not continue it bitwise the
    same."""
    fork_batch = pack_with_sharing(trim_to_fork(samples.sharing_documents))
    segments = _refuse_leakage(subject.model, corrupt(fork_batch), fork_batch.layout)
    worst = _compare_with_alone(subject, samples.sharing_documents, share_prefixes=True)
    computed, owned = (
        pack_with_sharing(samples.sharing_documents).layout.num_tokens,
        sum(map(count_input_tokens, samples.sharing_documents)),
    )
    tokens = f"{computed} tokens computed for {owned}"
    return CheckResult(
        "shared = alone",
        "ok",
        f"losses within {worst:.1e}, {segments} segments blind to the bit; {tokens}",
    )


def check_eos_supervised(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """The last trained token of every document is an end token: the model learns to stop."""
    del subject
    complete_documents = [d for d in samples.documents if not d.id.endswith(" and more")]
    for document in complete_documents:
        last = int(document.tokens_L[np.flatnonzero(document.weights_L)[-1]])
        if last not in samples.end_ids:
            raise GateError(
                f"the answer's last trained token is {last}, no end token: the model would never learn to stop",
                where=f"preflight: {document.id}",
                fix="use overlong: drop instead of truncate, or a template that closes its answers",
            )
    return CheckResult(
        "answers end", "ok", f"{len(complete_documents)} answers end in a trained end token"
    )


def check_text_eos(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """The separator stands at the end of every text, nowhere else, and is trained."""
    del subject
    texts = samples.texts or ()
    for text in texts:
        last = text.windows[-1]
        is_end = [token in samples.end_ids for token in text.document.tokens_L[1:].tolist()]
        if (
            sum(is_end) != 1
            or not is_end[-1]
            or not last.weights_L[-1]
            or int(last.tokens_L[-1]) not in samples.end_ids
        ):
            raise GateError(
                "the separator does not end the text, or is not trained",
                where=f"preflight: {text.document.id}",
                fix="please report the model's tokenizer",
            )
    return CheckResult(
        "texts end",
        "ok",
        f"{len(texts)} texts end in the separator, which is trained, and only there",
    )


def check_window_coverage(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """The windows' targets, in order, are the tokens of the text, all but the first, each once."""
    del subject
    texts = samples.texts or ()
    windows = targets = 0
    for text in texts:
        target_tokens = np.concatenate(
            [window.tokens_L[window.weights_L > 0] for window in text.windows]
        )
        if not np.array_equal(target_tokens, text.document.tokens_L[1:]):
            raise GateError(
                f"windows train {len(target_tokens)} tokens of a text of {len(text.document)}, or others than those it has",
                where=f"preflight: {text.document.id}",
                fix="please report this",
            )
        windows, targets = windows + len(text.windows), targets + len(target_tokens)
    evidence = (
        f"{targets:,} tokens of {len(texts)} texts are targets once each, in {windows:,} windows"
    )
    return CheckResult("windows cover", "ok", evidence)


def check_token_ids(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Token ids, leading BOS included, are those of the stock tokenizer's chat template."""
    del subject
    for row, is_equal, _ in samples.token_id_checks:
        if not is_equal:
            raise GateError(
                "token ids differ from those of the stock tokenizer",
                where=f"preflight: {row}",
                fix="tokenizer.json and the tokenizer's class disagree; if the file is right, which other servers read,"
                ' write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json',
            )
    if not samples.token_id_checks:
        evidence = "not compared: the rows are plain texts, hold what looks like a control token, or an earlier date"
        return CheckResult("ids = stock", "warn", evidence)
    prompts = sum(not token_check.is_full_row for token_check in samples.token_id_checks)
    evidence = f"{len(samples.token_id_checks)} rows tokenised equally, leading BOS included"
    return CheckResult(
        "ids = stock",
        "ok",
        evidence + (f"; of {prompts} the prompts, as they are served" if prompts else ""),
    )


def check_supervised_tokens(subject: ModelUnderTest, samples: PreflightSamples) -> CheckResult:
    """Every document trains at least one token, and never its first."""
    del subject
    for document in samples.documents:
        if not document.weights_L.any() or document.weights_L[0]:
            raise GateError(
                "the document trains nothing, or its first token", where=f"preflight: {document.id}"
            )
    num_supervised = sum(int(np.count_nonzero(d.weights_L)) for d in samples.documents)
    return CheckResult(
        "something is trained",
        "ok",
        f"{num_supervised} of {sum(map(len, samples.documents))} tokens",
    )


CHECKS = (
    check_supervised_tokens,
    check_logits,
    check_labels,
    check_document_isolation,
    check_packed_loss,
    check_eos_supervised,
    check_token_ids,
)
TEXT_CHECKS = (
    check_supervised_tokens,
    check_logits,
    check_labels,
    check_document_isolation,
    check_packed_loss,
    check_text_eos,
    check_window_coverage,
)
