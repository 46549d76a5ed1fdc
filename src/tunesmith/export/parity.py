"""Whether an export behaves as the run does: the same prompts, the same answers.

    witnesses_of(run) -> held-out rows;  live_answers, export_answers -> Answers;  compare -> Parity;  refuse_beyond

Both sides compute in fp32, the run in our engine and the export in transformers', so what is left between them is what
the format does to the weights. The live answers are taken first and their model is let go: one model is in memory at a
time. Legend: S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Document, Json, Pack, Request
from tunesmith.data.chat_template.assistant_spans import FOREIGN
from tunesmith.data.collate import collate
from tunesmith.data.dataset import Dataset
from tunesmith.data.packing import fed_tokens
from tunesmith.export.source_run import Finished
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.causal_lm import LanguageModel, Network, adopt, stock_logits
from tunesmith.model.generation.engine import generate
from tunesmith.model.reference_load import stock_prompts

PROMPTS, ROWS_READ = 16, 64
PLACES = 32  # of each row, where logits are compared
Base = Literal["original", "dequantized"]
LONGEST = 1024  # tokens of a row; longer ones only if all are
NEW_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Witness:
    """A held-out row: its tokens with the first few targets, and the prompt of its last answer as it is served."""

    document: Document
    prompt: tuple[int, ...]
    messages: tuple[Json, ...] = ()  # the prompt as it reaches the template; empty for plain text
    tools: tuple[Json, ...] = ()
    rendered: tuple[int, ...] = ()  # what every other program must make of the messages

    @property
    def places(self) -> list[int]:
        return (np.flatnonzero(self.document.weights_L) - 1).tolist()


@dataclass(frozen=True, eq=False)
class Answers:
    """What one side says to the witnesses: logits [S, V] of each, and greedy answers."""

    logits: tuple[Tensor, ...]
    greedy: tuple[tuple[int, ...], ...]
    trained_kl: float | None = None  # of the run: how far its adapter brought it from the base


@dataclass(frozen=True, eq=False)
class Reread:
    """An export as another program reads it. `rendered`: the prompts of the witnesses that have messages."""

    network: Network
    rendered: Sequence[tuple[int, ...]]
    end_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One export at work: a run becomes a `kind` of format in `folder`, and is compared on the witnesses."""

    run: Finished
    folder: Path
    kind: str
    witnesses: Sequence[Witness]
    base: Base = "original"  # what an adapter that was trained on 4-bit weights is merged into

    @property
    def narrow(self) -> frozenset[str]:
        """The matrices that are merged as 4 bits left them."""
        return self.run.narrow if self.base == "dequantized" else frozenset()

    @property
    def chats(self) -> list[Witness]:
        """The witnesses that have messages to render."""
        return [witness for witness in self.witnesses if witness.messages]


@dataclass(frozen=True)
class Parity:
    """How far an export is from its run. KL in nats at `places`, from the run's distribution to the export's;
    `trained_kl` is its mean from the run's to the base's, None where there is no adapter. `same_prompts` of
    `rendered_prompts` give the same ids, `same_answers` of `prompts` the same greedy tokens."""

    prompts: int
    rendered_prompts: int
    same_prompts: int
    same_answers: int
    places: int
    mean_kl: float
    max_kl: float
    trained_kl: float | None
    top1_agreement: float
    max_logit_difference: float


@dataclass(frozen=True)
class Tolerance:
    """The most that a format may do to an export. Greedy answers and likeliest tokens are told and not judged: where
    two tokens are nearly as likely, any rounding may choose the other."""

    mean_kl: float
    max_kl: float


ROUNDED = (
    "small changes are lost where weights are rounded to 16 bits: keep the adapter apart (--to peft), or take "
    "--to gguf --type f32; please report it if that differs, too"
)

# ---------------------------------------------------------------- witnesses


def witnesses_of(run: Finished) -> tuple[Witness, ...]:
    """Raises InputError when the run's data are gone."""
    rows = run.held_out_rows(ROWS_READ)
    found = [witness for index in range(len(rows)) if (witness := _witness(run, rows, index))]
    if not found:
        raise InputError("no row to compare the export on", where=rows.path, fix="put the data of the run back")
    short = [witness for witness in found if len(witness.document) <= LONGEST]
    chosen = (short or sorted(found, key=lambda witness: len(witness.document)))[:PROMPTS]
    asked = [(w.messages, w.tools) for w in chosen if _by_stock(w)]
    stock = iter(stock_prompts(run.saved, asked, run.recipe.chat_template_kwargs))
    return tuple(replace(witness, rendered=next(stock)) if _by_stock(witness) else witness for witness in chosen)


def _by_stock(witness: Witness) -> bool:
    """Whether other programs rightly render it otherwise: then the stock template of the run's own files tells how."""
    return bool(witness.messages) and not witness.rendered


def _witness(run: Finished, rows: Dataset, index: int) -> Witness | None:
    """None for a row that trains nothing."""
    example, prepared = rows.understand(index)
    if not prepared.documents:
        return None
    document = prepared.documents[-1]
    (targets,) = np.nonzero(document.weights_L)
    untrained = np.flatnonzero(document.weights_L[: targets[-1]] == 0)
    prompt = tuple(document.tokens_L[: untrained[-1] + 1].tolist())
    weights_L = document.weights_L.copy()
    weights_L[targets[PLACES:]] = 0
    short = Document(document.id, document.tokens_L, weights_L)
    if not example.messages:
        return Witness(short, prompt)
    asked = max(i for i, weight in enumerate(example.turn_weights) if weight > 0)
    messages = tuple(run.renderer.as_wanted(example.messages[:asked], example.tools))
    # Other programs write today's date where the run's is frozen, and make control tokens of text that looks so.
    differs = run.renderer.dated or FOREIGN in prepared.notes
    return Witness(short, prompt, messages, example.tools, () if differs else prompt)


# ---------------------------------------------------------------- the two sides


def live_answers(job: Job) -> Answers:
    """Of base and adapter in our engine. The model is gone when this returns."""
    model, ends = job.run.live_model(), job.run.renderer.end_ids
    logits, trained_kl = _our_logits(model, job.witnesses), None
    if job.run.loras:
        with adapter_scaled(model.network, 0):
            trained_kl = mean_kl(logits, _our_logits(model, job.witnesses))
    return Answers(logits, _greedy(model, job, ends), trained_kl)


def export_answers(job: Job, reread: Reread) -> Answers:
    """Logits by the stock network; then it becomes ours, for the greedy answers up to the export's own end tokens.
    GateError for logits that are not finite."""
    logits = witness_logits(reread.network, job.witnesses)
    if not all(bool(values.isfinite().all()) for values in logits):
        raise GateError("the export's logits are not finite", where=str(job.run.path), fix="please report this")
    model = adopt(reread.network, torch.float32)
    return Answers(logits, _greedy(model, job, reread.end_ids))


def live_logits(run: Finished, witnesses: Sequence[Witness]) -> tuple[Tensor, ...]:
    """Of base and adapter in our engine; the model is gone when this returns."""
    return _our_logits(run.live_model(), witnesses)


def witness_logits(network: Network, witnesses: Sequence[Witness]) -> tuple[Tensor, ...]:
    """Of a stock network."""
    fed = [witness.document.tokens_L[: fed_tokens(witness.document)].tolist() for witness in witnesses]
    return tuple(stock_logits(network, f, w.places).cpu() for f, w in zip(fed, witnesses, strict=True))


@torch.no_grad()
def _our_logits(model: LanguageModel, witnesses: Sequence[Witness]) -> tuple[Tensor, ...]:
    batches = (collate(Pack((witness.document,)), model.device) for witness in witnesses)
    return tuple(model.head.logits(model.hidden(batch)).float().cpu() for batch in batches)


def _greedy(model: LanguageModel, job: Job, end_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    model.network.eval()
    requests = [Request(witness.prompt, NEW_TOKENS) for witness in job.witnesses]
    found = dict(generate(model, requests, decode=job.run.renderer.decode, end_ids=end_ids))
    return tuple(found[place].tokens for place in range(len(requests)))


# ---------------------------------------------------------------- the gate


def compare(job: Job, live: Answers, export: Answers, reread: Reread) -> Parity:
    pairs = list(zip(live.logits, export.logits, strict=True))
    kl_S = _kl(live.logits, export.logits)
    same_S = torch.cat([ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in pairs])
    wanted = [witness.rendered for witness in job.chats]
    return Parity(
        prompts=len(job.witnesses),
        rendered_prompts=len(wanted),
        same_prompts=sum(a == b for a, b in zip(wanted, reread.rendered, strict=True)),
        same_answers=sum(a == b for a, b in zip(live.greedy, export.greedy, strict=True)),
        places=len(kl_S),
        mean_kl=float(kl_S.mean()),
        max_kl=float(kl_S.max()),
        trained_kl=live.trained_kl,
        top1_agreement=float(same_S.double().mean()),
        max_logit_difference=max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
    )


def mean_kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """KL(ours || theirs) in nats, over all places."""
    return float(_kl(ours, theirs).mean())


def _kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """KL(ours || theirs) at every place of every witness, in fp64."""
    found: list[Tensor] = []
    for one, other in zip(ours, theirs, strict=True):
        p_SV, q_SV = one.double().log_softmax(-1), other.double().log_softmax(-1)
        found.append((p_SV.exp() * (p_SV - q_SV)).sum(-1).clamp(min=0))
    return torch.cat(found)


def refuse_beyond(tolerance: Tolerance, parity: Parity, job: Job, reread: Reread) -> None:
    """GateError that says everything in which the export is not the run."""
    ends, trained = set(reread.end_ids), job.run.renderer.end_ids
    wrong = {
        f"{parity.rendered_prompts - parity.same_prompts} of {parity.rendered_prompts} prompts are rendered to other "
        "tokens": parity.same_prompts < parity.rendered_prompts,
        f"answers end in {sorted(ends)}, they were trained to end in {trained[0]}": trained[0] not in ends
        or not ends <= set(trained),
        f"the mean KL to the run is {parity.mean_kl:.2g}, above {tolerance.mean_kl:g}": parity.mean_kl
        > tolerance.mean_kl,
        f"the KL at one place is {parity.max_kl:.2g}, above {tolerance.max_kl:g}": parity.max_kl > tolerance.max_kl,
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        what = f"the export does not behave as the run: {'; '.join(found)}"
        other = job.base == "original" and job.run.narrow
        numbers_only = not any(list(wrong.values())[:2])
        advice = ROUNDED if numbers_only else "please report this"
        advice = "use --base dequantized, the weights that were trained beside" if other else advice
        raise GateError(what, where=str(job.run.path), fix=f"nothing was written; {advice}")
