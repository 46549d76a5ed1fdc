"""The proof before step 1, on the real model and the real data: what must hold for a run not to be silently wrong.

In: the stock model's logits on a few real documents, our model, those documents. Out: a Verdict for each claim; a claim
that fails stops the run with GateError. The proof also runs on a mask that leaks and on labels shifted by one, and
must refuse both: a check that cannot fail proves nothing. Nothing is trained here, no weight changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batch import collate
from tunesmith.data.pack import fed_tokens, pack_step
from tunesmith.errors import GateError
from tunesmith.model.head import target_losses
from tunesmith.model.load import LanguageModel
from tunesmith.model.quantized import quantized_weights
from tunesmith.types import Batch, Document, Layout, Verdict

# Relative root-mean-square difference of centred logits that two correct computations may show.
LOGIT_TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-3, torch.float64: 1e-5}
# Relative difference of the losses of two correct computations.
LOSS_TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-6}
PACKED_DOCUMENTS = 3  # the shortest of the probe: enough to see a leak or wrong labels, in seconds
BLIND_TOKENS = 128  # of each of them are enough to see whether documents see each other
CHECKED_PLACES = 64  # of a document, from its first token to its last: their logits are compared


@dataclass(frozen=True, eq=False)
class Probe:
    """A few real documents, what the stock model says to each (logits [P, V] at its `checked_places`), the ids of end
    tokens and, for the rows whose stock ids are known, whether ours are the same."""

    documents: tuple[Document, ...]
    stock_logits: tuple[Tensor, ...]
    end_ids: frozenset[int]
    stock_ids_equal: tuple[tuple[str, bool], ...] = ()


def choose_documents(candidates: Sequence[Document], window: int | None) -> tuple[Document, ...]:
    """The shortest, two between and the longest, shortest first; of rejected answers the shortest and the longest too.
    With a window, at least one document longer than it (rows are chained when none is). A lone document stands twice:
    blindness takes two."""
    ranked = sorted((d for d in candidates if fed_tokens(d)), key=len)
    rejected = [d for d in ranked if d.side == "rejected"]
    others = [d for d in ranked if d.side != "rejected"]
    places = sorted({0, len(others) // 4, len(others) // 2, len(others) - 1}) if others else []
    chosen = [others[place] for place in places] + [rejected[place] for place in {0, len(rejected) - 1} if rejected]
    chosen = sorted((dataclasses.replace(d, side="") for d in chosen), key=len)  # to be packed one by one
    if window and ranked and all(fed_tokens(d) <= window for d in chosen):
        chosen.append(_chained(ranked, window + 1 + len(ranked[0])))
    return tuple(chosen * 2 if len(chosen) == 1 else chosen)


def _beginning(document: Document) -> Document:
    """Its first tokens as a document; the last of them is its target."""
    tokens_L = document.tokens_L[: BLIND_TOKENS + 1]
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[-1] = 1
    return Document(document.id, tokens_L, weights_L)


def checked_places(document: Document) -> list[int]:
    """Evenly spread over the tokens that are fed, the first and the last among them."""
    return np.unique(np.linspace(0, fed_tokens(document) - 1, CHECKED_PLACES).astype(int)).tolist()


def _chained(documents: Sequence[Document], tokens: int) -> Document:
    """Rows behind one another as one document: only its length matters."""
    repeated = [documents[i % len(documents)] for i in range(1 + tokens // max(1, min(map(len, documents))))]
    tokens_L = np.concatenate([d.tokens_L for d in repeated])[:tokens]
    weights_L = np.ones(len(tokens_L), np.float32)
    weights_L[0] = 0
    return Document(f"{documents[0].id} and more", tokens_L, weights_L)


def prove(model: LanguageModel, probe: Probe) -> list[Verdict]:
    """All claims in order. Raises GateError that names the first one that does not hold."""
    model.network.eval()
    with torch.no_grad():
        verdicts = [claim(model, probe) for claim in CLAIMS]
        _must_refuse("a mask that leaks", lambda: blind(model, probe, spoil=_leaking))
        _must_refuse("labels shifted by one", lambda: labels_equal_stock(model, probe, spoil=_shifted))
    if weights := quantized_weights(model.network).values():
        kept, wide = sum(weight.bytes for weight in weights), sum(2 * weight.parameters for weight in weights)
        evidence = f"{len(weights)} matrices in {kept:,} bytes, {kept / wide:.3f}x of what they take in bf16"
        verdicts.append(Verdict("4-bit weights", "ok", evidence))
    return [*verdicts, Verdict("controls", "ok", "a leaking mask and shifted labels were both refused")]


def _must_refuse(what: str, check: Callable[[], Verdict]) -> None:
    try:
        check()
    except GateError:
        return
    raise GateError(f"the proof did not notice {what}, so it proves nothing", where="preflight")


Spoil = Callable[[Batch], Batch]


def _as_is(batch: Batch) -> Batch:
    return batch


def _leaking(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=Layout((0,), (batch.layout.tokens,)))


def _shifted(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets_S=batch.tokens_T[batch.positions_S])


def _one_pack(documents: Sequence[Document]) -> Batch:
    (pack,) = pack_step(documents, sum(map(len, documents)))
    return collate(pack)


def _every_position(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions_S=torch.arange(batch.layout.tokens))


# ---------------------------------------------------------------- claims


def forward_equals_stock(model: LanguageModel, probe: Probe) -> Verdict:
    """Our packed forward gives the stock model's logits, document by document."""
    worst, agree, total = 0.0, 0, 0
    tolerance = LOGIT_TOLERANCE[model.dtype]
    for document, stock in zip(probe.documents, probe.stock_logits, strict=True):
        batch = dataclasses.replace(_one_pack([document]), positions_S=torch.tensor(checked_places(document)))
        ours = model.head.logits(model.hidden(batch)).float()
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


def labels_equal_stock(model: LanguageModel, probe: Probe, *, spoil: Spoil = _as_is) -> Verdict:
    """What a position is trained to say is the document's next token: the losses are what the stock model's logits
    give for those tokens, without our way from documents to targets."""
    worst, checked = 0.0, 0
    for document, stock in list(zip(probe.documents, probe.stock_logits, strict=True))[:PACKED_DOCUMENTS]:
        batch = spoil(_one_pack([document]))
        losses_S = target_losses(model.hidden(batch), model.head, batch.targets_S)
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


def blind(model: LanguageModel, probe: Probe, *, spoil: Spoil = _as_is) -> Verdict:
    """Other tokens in one document leave the outputs of all others bitwise the same."""
    pack = _one_pack([_beginning(document) for document in probe.documents[:PACKED_DOCUMENTS]])
    batch, starts = spoil(pack), pack.layout
    before = model.hidden(_every_position(batch))
    for start, length in zip(starts.starts, starts.lengths, strict=True):
        tokens = batch.tokens_T.clone()
        tokens[start : start + length] = tokens[start : start + length].roll(1) + 1
        tokens %= model.head.weight.shape[0]
        after = model.hidden(_every_position(dataclasses.replace(batch, tokens_T=tokens)))
        others = torch.ones(len(tokens), dtype=torch.bool)
        others[start : start + length] = False
        if not torch.equal(before[others], after[others]):
            raise GateError(
                "documents in a pack see each other", where="preflight", fix="use another attention backend"
            )
    return Verdict("documents are blind", "ok", f"{len(starts.starts)} documents changed, the others bitwise the same")


def _losses(model: LanguageModel, batch: Batch) -> dict[int, float]:
    """Summed loss by place of the document in the batch."""
    losses_S = target_losses(model.hidden(batch), model.head, batch.targets_S)
    sums = torch.zeros(len(batch.ids), dtype=torch.float64)
    sums.index_add_(0, batch.document_S.cpu(), losses_S.double().cpu())
    return dict(enumerate(sums.tolist()))


def packed_equals_alone(model: LanguageModel, probe: Probe) -> Verdict:
    """Every document has the same loss in a pack as alone."""
    documents = probe.documents[:PACKED_DOCUMENTS]
    (pack,) = pack_step(documents, sum(map(len, documents)))
    together = _losses(model, collate(pack))
    tolerance, worst = LOSS_TOLERANCE[model.dtype], 0.0
    for place, document in enumerate(pack.documents):
        alone = _losses(model, _one_pack([document]))[0]
        error = abs(together[place] - alone) / max(abs(alone), 1e-3 * np.count_nonzero(document.weights_L))
        worst = max(worst, error)
        if not error <= tolerance:
            raise GateError(
                f"loss {together[place]:.5f} in a pack, {alone:.5f} alone",
                where=f"preflight: {document.id}",
                fix="use another attention backend; please report this",
            )
    return Verdict("packed = alone", "ok", f"losses within {worst:.1e} of each other")


def answers_end(model: LanguageModel, probe: Probe) -> Verdict:
    """The last trained token of every document is an end token: the model learns to stop."""
    del model
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


def ids_equal_stock(model: LanguageModel, probe: Probe) -> Verdict:
    """Token ids, leading BOS included, are those of the stock tokenizer's chat template."""
    del model
    for row, equal in probe.stock_ids_equal:
        if not equal:
            raise GateError(
                "token ids differ from those of the stock tokenizer",
                where=f"preflight: {row}",
                fix="tokenizer.json and the tokenizer's class disagree; please report the model",
            )
    return Verdict("ids = stock", "ok", f"{len(probe.stock_ids_equal)} rows tokenised equally, leading BOS included")


def something_trained(model: LanguageModel, probe: Probe) -> Verdict:
    """Every document trains at least one token, and never its first."""
    del model
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
