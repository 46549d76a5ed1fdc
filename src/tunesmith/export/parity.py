"""Whether an export behaves as the run does: the same prompts, the same answers.

    witnesses_of(run) -> held-out rows;  live_answers, export_answers -> Answers;  compare -> Parity;  refuse_beyond

Both sides compute in fp32, the run in our engine and the export in transformers', so what is left
between them is what the format does to the weights. The live answers are taken first and their
model is let go: one model is in memory at a time. Legend: S supervised positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Document, GenerationRequest, Json, Pack
from tunesmith.data.chat_template.render_notes import CONTROL_LIKE_TEXT
from tunesmith.data.collate import collate
from tunesmith.data.dataset import Dataset
from tunesmith.data.packing import count_input_tokens
from tunesmith.export.source_run import SourceRun
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import Network, PackedCausalLM, compute_stock_logits, wrap_model
from tunesmith.model.generation.engine import generate
from tunesmith.model.reference_load import encode_stock_prompts

MAX_PROMPTS, MAX_ROWS_READ = 16, 64
MAX_POSITIONS = 32  # of each row, where logits are compared
BaseKind = Literal["original", "dequantized"]
MAX_ROW_TOKENS = 1024  # tokens of a row; longer ones only if all are
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, eq=False)
class ParityExample:
    """A held-out row: its tokens with the first few targets, and the prompt of its last answer as
    it is served."""

    document: Document
    prompt: tuple[int, ...]
    messages: tuple[Json, ...] = ()  # the prompt as it reaches the template; empty for plain text
    tools: tuple[Json, ...] = ()
    rendered_ids: tuple[int, ...] = ()  # what every other program must make of the messages

    @property
    def positions(self) -> list[int]:
        return (np.flatnonzero(self.document.weights_L) - 1).tolist()


@dataclass(frozen=True, eq=False)
class ParityOutputs:
    """What one side says to the witnesses: logits [S, V] of each, and greedy answers."""

    logits: tuple[Tensor, ...]
    greedy: tuple[tuple[int, ...], ...]
    trained_kl: float | None = None  # of the run: how far its adapter brought it from the base


@dataclass(frozen=True, eq=False)
class ReloadedExport:
    """An export as another program reads it. `rendered`: the prompts of the witnesses that have
    messages."""

    network: Network
    rendered_ids: Sequence[tuple[int, ...]]
    end_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ExportJob:
    """One export at work: a run becomes a `kind` of format in `folder`, and is compared on the
    witnesses."""

    run: SourceRun
    folder: Path
    export_type: str
    examples: Sequence[ParityExample]
    base: BaseKind = "original"  # what an adapter that was trained on 4-bit weights is merged into

    @property
    def dequantized_paths(self) -> frozenset[str]:
        """The matrices that are merged as 4 bits left them."""
        return self.run.quantized_paths if self.base == "dequantized" else frozenset()

    @property
    def chat_examples(self) -> list[ParityExample]:
        """The witnesses that have messages to render."""
        return [example for example in self.examples if example.messages]


@dataclass(frozen=True)
class Parity:
    """How far an export is from its run. KL in nats at `places`, from the run's distribution to the
    export's; `trained_kl` is its mean from the run's to the base's, None where there is no adapter.
    `same_prompts` of `rendered_prompts` give the same ids, `same_answers` of `prompts` the same
    greedy tokens."""

    prompts: int
    rendered_prompts: int
    same_prompts: int
    same_answers: int
    positions: int
    mean_kl: float
    max_kl: float
    trained_kl: float | None
    top1_agreement: float
    max_logit_difference: float


@dataclass(frozen=True)
class Tolerance:
    """The most that a format may do to an export. Greedy answers and likeliest tokens are told and
    not judged: where two tokens are nearly as likely, any rounding may choose the other."""

    mean_kl: float
    max_kl: float


ROUNDING_HINT = (
    "small changes are lost where weights are rounded to 16 bits: keep the adapter apart (--to peft), or take "
    "--to gguf --type f32; please report it if that differs, too"
)

# ---------------------------------------------------------------- witnesses


def select_examples(run: SourceRun) -> tuple[ParityExample, ...]:
    """Raises InputError when the run's data are gone."""
    rows = run.open_held_out_rows(MAX_ROWS_READ)
    candidates = [
        example for index in range(len(rows)) if (example := _build_example(run, rows, index))
    ]
    if not candidates:
        raise InputError(
            "no row to compare the export on", where=rows.path, fix="put the data of the run back"
        )
    short_examples = [example for example in candidates if len(example.document) <= MAX_ROW_TOKENS]
    chosen = (short_examples or sorted(candidates, key=lambda example: len(example.document)))[
        :MAX_PROMPTS
    ]
    stock_chats = [
        (example.messages, example.tools) for example in chosen if _needs_stock_rendering(example)
    ]
    stock_ids = iter(
        encode_stock_prompts(run.saved_dir, stock_chats, run.recipe.chat_template_kwargs)
    )
    return tuple(
        replace(example, rendered_ids=next(stock_ids))
        if _needs_stock_rendering(example)
        else example
        for example in chosen
    )


def _needs_stock_rendering(example: ParityExample) -> bool:
    """Whether other programs rightly render it otherwise: then the stock template of the run's own
    files tells how."""
    return bool(example.messages) and not example.rendered_ids


def _build_example(run: SourceRun, rows: Dataset, index: int) -> ParityExample | None:
    """None for a row that trains nothing."""
    example, prepared = rows.render_row(index)
    if not prepared.documents:
        return None
    document = prepared.documents[-1]
    (targets,) = np.nonzero(document.weights_L)
    untrained_positions = np.flatnonzero(document.weights_L[: targets[-1]] == 0)
    prompt = tuple(document.tokens_L[: untrained_positions[-1] + 1].tolist())
    weights_L = document.weights_L.copy()
    weights_L[targets[MAX_POSITIONS:]] = 0
    short_document = Document(document.id, document.tokens_L, weights_L)
    if not example.messages:
        return ParityExample(short_document, prompt)
    answer_turn = max(
        turn_index for turn_index, weight in enumerate(example.turn_weights) if weight > 0
    )
    messages = tuple(run.renderer.normalize_messages(example.messages[:answer_turn], example.tools))
    # Other programs write today's date where the run's is frozen, and make control tokens of text
    # that looks so.
    is_different = run.renderer.has_date or CONTROL_LIKE_TEXT in prepared.notes
    return ParityExample(
        short_document, prompt, messages, example.tools, () if is_different else prompt
    )


# ---------------------------------------------------------------- the two sides


def compute_live_outputs(job: ExportJob) -> ParityOutputs:
    """Of base and adapter in our engine. The model is gone when this returns."""
    model, end_ids = job.run.load_live_model(), job.run.renderer.end_ids
    logits, trained_kl = _compute_engine_logits(model, job.examples), None
    if job.run.loras:
        with scaled_adapter(model.network, 0):
            trained_kl = compute_mean_kl(logits, _compute_engine_logits(model, job.examples))
    return ParityOutputs(logits, _generate_greedy(model, job, end_ids), trained_kl)


def compute_export_outputs(job: ExportJob, reloaded: ReloadedExport) -> ParityOutputs:
    """Logits by the stock network; then it becomes ours, for the greedy answers up to the export's
    own end tokens. GateError for logits that are not finite."""
    logits = compute_example_logits(reloaded.network, job.examples)
    if not all(bool(values.isfinite().all()) for values in logits):
        raise GateError(
            "the export's logits are not finite", where=str(job.run.path), fix="please report this"
        )
    model = wrap_model(reloaded.network, torch.float32)
    return ParityOutputs(logits, _generate_greedy(model, job, reloaded.end_ids))


def compute_live_logits(run: SourceRun, examples: Sequence[ParityExample]) -> tuple[Tensor, ...]:
    """Of base and adapter in our engine; the model is gone when this returns."""
    return _compute_engine_logits(run.load_live_model(), examples)


def compute_example_logits(
    network: Network, examples: Sequence[ParityExample]
) -> tuple[Tensor, ...]:
    """Of a stock network."""
    input_tokens = [
        example.document.tokens_L[: count_input_tokens(example.document)].tolist()
        for example in examples
    ]
    return tuple(
        compute_stock_logits(network, tokens, example.positions).cpu()
        for tokens, example in zip(input_tokens, examples, strict=True)
    )


@torch.no_grad()
def _compute_engine_logits(
    model: PackedCausalLM, examples: Sequence[ParityExample]
) -> tuple[Tensor, ...]:
    batches = (collate(Pack((example.document,)), model.device) for example in examples)
    return tuple(
        model.head.compute_logits(model.compute_hidden(batch)).float().cpu() for batch in batches
    )


def _generate_greedy(
    model: PackedCausalLM, job: ExportJob, end_ids: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    model.network.eval()
    requests = [GenerationRequest(example.prompt, MAX_NEW_TOKENS) for example in job.examples]
    generations = dict(generate(model, requests, decode=job.run.renderer.decode, end_ids=end_ids))
    return tuple(generations[index].tokens for index in range(len(requests)))


# ---------------------------------------------------------------- the gate


def compare_outputs(
    job: ExportJob,
    live_outputs: ParityOutputs,
    export_outputs: ParityOutputs,
    reloaded: ReloadedExport,
) -> Parity:
    pairs = list(zip(live_outputs.logits, export_outputs.logits, strict=True))
    kl_S = _compute_kl(live_outputs.logits, export_outputs.logits)
    is_same_S = torch.cat([ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in pairs])
    expected_ids = [example.rendered_ids for example in job.chat_examples]
    return Parity(
        prompts=len(job.examples),
        rendered_prompts=len(expected_ids),
        same_prompts=sum(a == b for a, b in zip(expected_ids, reloaded.rendered_ids, strict=True)),
        same_answers=sum(
            a == b for a, b in zip(live_outputs.greedy, export_outputs.greedy, strict=True)
        ),
        positions=len(kl_S),
        mean_kl=float(kl_S.mean()),
        max_kl=float(kl_S.max()),
        trained_kl=live_outputs.trained_kl,
        top1_agreement=float(is_same_S.double().mean()),
        max_logit_difference=max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
    )


def compute_mean_kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """KL(ours || theirs) in nats, over all places."""
    return float(_compute_kl(ours, theirs).mean())


def _compute_kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """KL(ours || theirs) at every place of every witness, in fp64."""
    kl_values: list[Tensor] = []
    for our_logits, their_logits in zip(ours, theirs, strict=True):
        p_SV, q_SV = our_logits.double().log_softmax(-1), their_logits.double().log_softmax(-1)
        kl_values.append((p_SV.exp() * (p_SV - q_SV)).sum(-1).clamp(min=0))
    return torch.cat(kl_values)


def refuse_mismatch(
    tolerance: Tolerance, parity: Parity, job: ExportJob, reloaded: ReloadedExport
) -> None:
    """GateError that says everything in which the export is not the run."""
    end_ids, trained_end_ids = set(reloaded.end_ids), job.run.renderer.end_ids
    failures = {
        f"{parity.rendered_prompts - parity.same_prompts} of {parity.rendered_prompts} prompts are rendered to other "
        "tokens": parity.same_prompts < parity.rendered_prompts,
        f"answers end in {sorted(end_ids)}, they were trained to end in {trained_end_ids[0]}": trained_end_ids[
            0
        ]
        not in end_ids
        or not end_ids <= set(trained_end_ids),
        f"the mean KL to the run is {parity.mean_kl:.2g}, above {tolerance.mean_kl:g}": parity.mean_kl
        > tolerance.mean_kl,
        f"the KL at one place is {parity.max_kl:.2g}, above {tolerance.max_kl:g}": parity.max_kl
        > tolerance.max_kl,
    }
    if messages := [text for text, has_failed in failures.items() if has_failed]:
        message = f"the export does not behave as the run: {'; '.join(messages)}"
        has_other_base = job.base == "original" and job.run.quantized_paths
        is_numeric_only = not any(list(failures.values())[:2])
        hint = ROUNDING_HINT if is_numeric_only else "please report this"
        hint = (
            "use --base dequantized, the weights that were trained beside"
            if has_other_base
            else hint
        )
        raise GateError(message, where=str(job.run.path), fix=f"nothing was written; {hint}")
