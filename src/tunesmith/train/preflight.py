"""The proof before step 1, on the real model and the real data: what must hold for a run not to be silently wrong.

In: the stock model's logits on a few real documents, our model, those documents. Out: a Verdict for each claim; a claim
that fails stops the run with GateError. The proof also runs on a mask that leaks, on labels shifted by one and, where
prefixes are shared, on a branch that sees its sibling, and must refuse them: a check that cannot fail proves nothing.
Nothing is trained here, no weight changes.
"""

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
from tunesmith.core.events import Verdict
from tunesmith.core.types import Batch, Document, Layout
from tunesmith.data.collate import collate
from tunesmith.data.packing import fed_tokens, pack_step
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.lm_head import target_losses
from tunesmith.model.quantization import quantized_weights
from tunesmith.session.preflight_probe import (
    PACKED_DOCUMENTS,
    Cut,
    Probe,
    beginning,
    checked_places,
    forest_of,
    near_the_fork,
    one_pack,
    siblings,
)

# Relative root-mean-square difference of centred logits that two correct computations may show.
LOGIT_TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-3, torch.float64: 1e-5}
# What the losses of two correct computations may differ by: a share of them, and by chance so many nats a token. A
# logit of 20 is followed by 20.125 in bf16, and products of other sizes round otherwise: with SmolLM2 on a processor
# with AMX 1.2 nats of 65 were seen, where fp32 lies between the two.
LOSS_TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-6}
SHARED_TOLERANCE = LOSS_TOLERANCE | {torch.bfloat16: 0.03}  # rows of a prefix are rounded with others than alone
TOKEN_NATS = {torch.bfloat16: 0.3, torch.float32: 0.0, torch.float64: 0.0}


@dataclass(frozen=True, eq=False)
class Subject:
    """The model to prove, with what it says to documents alone: several claims ask for that, it is computed once."""

    model: LanguageModel
    said: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict[bytes, tuple[Tensor, Tensor]])

    def alone(self, document: Document, positions_S: Tensor) -> Tensor:
        """Hidden states [S, H] of a document alone, at its targets or checked places."""
        key = document.tokens_L.tobytes() + document.weights_L.tobytes()
        if key not in self.said:
            batch = one_pack([document])
            places_P = torch.cat([batch.positions_S, torch.tensor(checked_places(document))]).unique()
            self.said[key] = places_P, self.model.hidden(dataclasses.replace(batch, positions_S=places_P))
        places_P, hidden_PH = self.said[key]
        return hidden_PH[torch.searchsorted(places_P, positions_S)]


def prove(model: LanguageModel, probe: Probe) -> list[Verdict]:
    """All claims in order. Raises GateError that names the first one that does not hold."""
    model.network.eval()
    subject = Subject(model)
    with torch.no_grad():
        verdicts = [claim(subject, probe) for claim in (CLAIMS if probe.texts is None else TEXT_CLAIMS)]
        _must_refuse("a mask that leaks", lambda: blind(subject, probe, spoil=_leaking))
        _must_refuse("labels shifted by one", lambda: labels_equal_stock(subject, probe, spoil=_shifted))
        if probe.alike:
            verdicts.append(shared_equals_alone(subject, probe))
            _must_refuse(
                "a branch that sees its sibling", lambda: shared_equals_alone(subject, probe, spoil=_overheard)
            )
        if texts := probe.texts:
            _must_refuse("a lost target", lambda: windows_cover(subject, _without_a_target(probe, texts)))
    if weights := quantized_weights(model.network).values():
        kept, wide = sum(weight.bytes for weight in weights), sum(2 * weight.parameters for weight in weights)
        evidence = f"{len(weights)} matrices in {kept:,} bytes, {kept / wide:.3f}x of what they take in bf16"
        verdicts.append(Verdict("4-bit weights", "ok", evidence))
    refused = ["a leaking mask", "shifted labels", *["a branch that sees its sibling"] * bool(probe.alike)]
    refused += ["a lost target"] * bool(probe.texts)
    return [*verdicts, Verdict("controls", "ok", f"all refused: {', '.join(refused)}")]


def _must_refuse(what: str, check: Callable[[], Verdict]) -> None:
    try:
        check()
    except GateError:
        return
    raise GateError(f"the proof did not notice {what}, so it proves nothing", where="preflight")


def _without_a_target(probe: Probe, texts: Sequence[Cut]) -> Probe:
    first = texts[0].windows[0]
    weights_L = first.weights_L.copy()
    weights_L[-1] = 0
    spoilt = Cut(texts[0].whole, (dataclasses.replace(first, weights_L=weights_L), *texts[0].windows[1:]))
    return dataclasses.replace(probe, texts=(spoilt, *texts[1:]))


Spoil = Callable[[Batch], Batch]


def _as_is(batch: Batch) -> Batch:
    return batch


def _leaking(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=Layout((0,), (batch.layout.tokens,)))


def _shifted(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])


def _overheard(batch: Batch) -> Batch:
    """A branch goes on from the one beside it."""
    one, other = siblings(batch.layout) or (-1, 0)
    parents = [one if segment == other else parent for segment, parent in enumerate(batch.layout.parents)]
    return dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, parents=tuple(parents)))


def _every_position(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions_S=torch.arange(batch.layout.tokens))


# ---------------------------------------------------------------- claims


def forward_equals_stock(subject: Subject, probe: Probe) -> Verdict:
    """Our packed forward gives the stock model's logits, document by document."""
    worst, agree, total = 0.0, 0, 0
    model, tolerance = subject.model, LOGIT_TOLERANCE[subject.model.dtype]
    for document, stock in zip(probe.documents, probe.stock_logits, strict=True):
        ours = model.head.logits(subject.alone(document, torch.tensor(checked_places(document)))).float()
        centred = stock - stock.mean(-1, keepdim=True)
        difference = ours - ours.mean(-1, keepdim=True) - centred
        error = float(difference.norm() / centred.norm())
        worst, agree = max(worst, error), agree + int((ours.argmax(-1) == stock.argmax(-1)).sum())
        total += len(stock)
        if not error <= tolerance:
            raise GateError(
                f"our forward differs from the stock model's by {error:.1%} of the logits' size, over {tolerance:.1%}",
                where=f"preflight: {document.id}",
                fix="this model family is not supported yet; please report it",
            )
    lengths = ", ".join(str(fed_tokens(d)) for d in probe.documents)
    return Verdict(
        "forward = stock", "ok", f"logits within {worst:.2%}, top token equal at {agree}/{total}; lengths {lengths}"
    )


def labels_equal_stock(subject: Subject, probe: Probe, *, spoil: Spoil = _as_is) -> Verdict:
    """What a position is trained to say is the document's next token: the losses are what the stock model's logits
    give for those tokens, without our way from documents to targets."""
    worst, checked, model = 0.0, 0, subject.model
    for document, stock in list(zip(probe.documents, probe.stock_logits, strict=True))[:PACKED_DOCUMENTS]:
        batch = spoil(one_pack([document]))
        losses_S = target_losses(subject.alone(document, batch.positions_S), model.head, batch.targets_S)
        found = dict(zip(batch.positions_S.tolist(), losses_S.tolist(), strict=True))
        rows = [(row, p) for row, p in enumerate(checked_places(document)) if document.weights_L[p + 1]]
        next_tokens = torch.tensor([int(document.tokens_L[p + 1]) for _, p in rows])
        theirs = F.cross_entropy(stock[[row for row, _ in rows]].cpu(), next_tokens, reduction="none")
        ours = torch.tensor([found.get(p, math.nan) for _, p in rows])
        error = float((ours - theirs).abs().mean() / (1 + theirs.mean()))
        worst, checked = max(worst, error), checked + len(rows)
        if not error <= LOGIT_TOLERANCE[model.dtype]:
            raise GateError(
                f"losses differ by {error:.1%} from the stock model's for the next tokens: labels are shifted or lost",
                where=f"preflight: {document.id}",
                fix="please report this",
            )
    return Verdict("labels = next tokens", "ok", f"{checked} losses within {worst:.2%} of the stock model's")


def blind(subject: Subject, probe: Probe, *, spoil: Spoil = _as_is) -> Verdict:
    """Other tokens in one document leave the outputs of all others bitwise the same."""
    pack = one_pack([beginning(document) for document in probe.documents[:PACKED_DOCUMENTS]])
    changed = _refuse_sight(subject.model, spoil(pack), pack.layout)
    return Verdict("documents are blind", "ok", f"{changed} documents changed, the others bitwise the same")


def _refuse_sight(model: LanguageModel, batch: Batch, layout: Layout) -> int:
    """Changes the tokens of each segment of a layout in turn: only what continues it may change. How many there are."""
    before, lengths_T = model.hidden(_every_position(batch)), torch.tensor(layout.lengths)
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        tokens = batch.tokens_T.clone()
        tokens[start : start + length] = tokens[start : start + length].roll(1) + 1
        tokens %= model.head.weight.shape[0]
        after = model.hidden(_every_position(dataclasses.replace(batch, tokens_T=tokens)))
        apart = torch.tensor([segment not in layout.path(i) for i in range(len(layout.lengths))])
        others = apart.repeat_interleave(lengths_T)
        if not torch.equal(before[others], after[others]):
            raise GateError(
                "documents in a pack see each other", where="preflight", fix="use another attention backend"
            )
    return len(layout.lengths)


def _losses(model: LanguageModel, batch: Batch, hidden_SH: Tensor) -> dict[int, float]:
    """Summed loss by place of the document in the batch."""
    losses_S = target_losses(hidden_SH, model.head, batch.targets_S)
    sums = torch.zeros(len(batch.ids), dtype=torch.float64)
    sums.index_add_(0, batch.document_S.cpu(), losses_S.double().cpu())
    return dict(enumerate(sums.tolist()))


def packed_equals_alone(subject: Subject, probe: Probe) -> Verdict:
    """Every document has the same loss in a pack as alone."""
    worst = _compare_alone(subject, probe.documents[:PACKED_DOCUMENTS])
    return Verdict("packed = alone", "ok", f"losses within {worst:.1e} of each other")


def _compare_alone(subject: Subject, documents: Sequence[Document], *, share: bool = False) -> float:
    """The worst relative difference of a document's loss in one pack and alone."""
    (pack,) = pack_step(documents, sum(map(len, documents)), share=share)
    model, batch = subject.model, collate(pack)
    together = _losses(model, batch, model.hidden(batch))
    tolerance, worst = (SHARED_TOLERANCE if share else LOSS_TOLERANCE)[model.dtype], 0.0
    for place, document in enumerate(pack.documents):
        batch = one_pack([document])
        alone = _losses(model, batch, subject.alone(document, batch.positions_S))[0]
        targets = np.count_nonzero(document.weights_L)
        apart, size = abs(together[place] - alone), max(abs(alone), 1e-3 * targets)
        worst = max(worst, apart / size)
        if not apart <= tolerance * size + TOKEN_NATS[model.dtype] * math.sqrt(targets):
            what, fix = (
                ("a shared pack", "set share_prefixes: false") if share else ("a pack", "use another attention backend")
            )
            raise GateError(
                f"loss {together[place]:.5f} in {what}, {alone:.5f} alone",
                where=f"preflight: {document.id}",
                fix=f"{fix}; please report this",
            )
    return worst


def shared_equals_alone(subject: Subject, probe: Probe, *, spoil: Spoil = _as_is) -> Verdict:
    """Documents that share what they begin with have the loss that they have alone, and branches are blind to each
    other: other tokens in one leave all that does not continue it bitwise the same."""
    near = forest_of(near_the_fork(probe.alike))
    segments = _refuse_sight(subject.model, spoil(near), near.layout)
    worst = _compare_alone(subject, probe.alike, share=True)
    computed, owned = forest_of(probe.alike).layout.tokens, sum(map(fed_tokens, probe.alike))
    tokens = f"{computed} tokens computed for {owned}"
    return Verdict("shared = alone", "ok", f"losses within {worst:.1e}, {segments} segments blind to the bit; {tokens}")


def answers_end(subject: Subject, probe: Probe) -> Verdict:
    """The last trained token of every document is an end token: the model learns to stop."""
    del subject
    real = [d for d in probe.documents if not d.id.endswith(" and more")]
    for document in real:
        last = int(document.tokens_L[np.flatnonzero(document.weights_L)[-1]])
        if last not in probe.end_ids:
            raise GateError(
                f"the answer's last trained token is {last}, no end token: the model would never learn to stop",
                where=f"preflight: {document.id}",
                fix="use overlong: drop instead of truncate, or a template that closes its answers",
            )
    return Verdict("answers end", "ok", f"{len(real)} answers end in a trained end token")


def texts_end(subject: Subject, probe: Probe) -> Verdict:
    """The separator stands at the end of every text, nowhere else, and is trained."""
    del subject
    texts = probe.texts or ()
    for text in texts:
        last = text.windows[-1]
        ends = [token in probe.end_ids for token in text.whole.tokens_L[1:].tolist()]
        if sum(ends) != 1 or not ends[-1] or not last.weights_L[-1] or int(last.tokens_L[-1]) not in probe.end_ids:
            raise GateError(
                "the separator does not end the text, or is not trained",
                where=f"preflight: {text.whole.id}",
                fix="please report the model's tokenizer",
            )
    return Verdict("texts end", "ok", f"{len(texts)} texts end in the separator, which is trained, and only there")


def windows_cover(subject: Subject, probe: Probe) -> Verdict:
    """The windows' targets, in order, are the tokens of the text, all but the first, each once."""
    del subject
    texts = probe.texts or ()
    windows = targets = 0
    for text in texts:
        found = np.concatenate([window.tokens_L[window.weights_L > 0] for window in text.windows])
        if not np.array_equal(found, text.whole.tokens_L[1:]):
            raise GateError(
                f"windows train {len(found)} tokens of a text of {len(text.whole)}, or others than those it has",
                where=f"preflight: {text.whole.id}",
                fix="please report this",
            )
        windows, targets = windows + len(text.windows), targets + len(found)
    evidence = f"{targets:,} tokens of {len(texts)} texts are targets once each, in {windows:,} windows"
    return Verdict("windows cover", "ok", evidence)


def ids_equal_stock(subject: Subject, probe: Probe) -> Verdict:
    """Token ids, leading BOS included, are those of the stock tokenizer's chat template."""
    del subject
    for row, equal, _ in probe.stock_ids:
        if not equal:
            raise GateError(
                "token ids differ from those of the stock tokenizer",
                where=f"preflight: {row}",
                fix="tokenizer.json and the tokenizer's class disagree; if the file is right, which other servers read,"
                ' write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json',
            )
    if not probe.stock_ids:
        told = "not compared: the rows are plain texts, hold what looks like a control token, or an earlier date"
        return Verdict("ids = stock", "warn", told)
    prompts = sum(not found.whole for found in probe.stock_ids)
    told = f"{len(probe.stock_ids)} rows tokenised equally, leading BOS included"
    return Verdict("ids = stock", "ok", told + (f"; of {prompts} the prompts, as they are served" if prompts else ""))


def something_trained(subject: Subject, probe: Probe) -> Verdict:
    """Every document trains at least one token, and never its first."""
    del subject
    for document in probe.documents:
        if not document.weights_L.any() or document.weights_L[0]:
            raise GateError("the document trains nothing, or its first token", where=f"preflight: {document.id}")
    trained = sum(int(np.count_nonzero(d.weights_L)) for d in probe.documents)
    return Verdict("something is trained", "ok", f"{trained} of {sum(map(len, probe.documents))} tokens")


CLAIMS = (
    something_trained,
    forward_equals_stock,
    labels_equal_stock,
    blind,
    packed_equals_alone,
    answers_end,
    ids_equal_stock,
)
TEXT_CLAIMS = (
    something_trained,
    forward_equals_stock,
    labels_equal_stock,
    blind,
    packed_equals_alone,
    texts_end,
    windows_cover,
)
