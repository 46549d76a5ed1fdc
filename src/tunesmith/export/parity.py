"""Check that an export behaves as its run: same prompts, same distributions, same answers.

    select_examples -> ParityExamples
    compute_live_outputs -> LiveOutputs; compute_export_outputs -> ParityOutputs
    compare_outputs -> Parity; refuse_mismatch -> GateError

Both sides compute in fp32, the run in our engine and the export in transformers, so any difference
comes from the export's format. The live outputs are computed first: one model is in memory at a
time. Legend: S supervised positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Document, GenerationRequest, Json, Pack
from tunesmith.data.chat_template.render_notes import CONTROL_LIKE_TEXT
from tunesmith.data.collate import collate
from tunesmith.data.dataset import Dataset
from tunesmith.data.packing import count_input_tokens
from tunesmith.export.source_run import SourceRun
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import Network, PackedCausalLM, compute_stock_logits, wrap_model
from tunesmith.model.experts import ExpertLoraTensors, has_transposed_stacks
from tunesmith.model.generation.engine import generate
from tunesmith.model.merge import WeightDeltas
from tunesmith.model.reference_load import encode_stock_prompts
from tunesmith.model.save import (
    LoraTensors,
    ModuleTensor,
    TokenRowTensors,
    get_merge_target,
)

MAX_ROWS = 16  # of a matrix
MAX_EXPERTS = 4  # of a stack
MAX_SHARE_ERROR = 0.05
MAX_STANDARD_ERRORS = 6.0  # of a few hundred matrices, none is beyond by chance


MAX_PROMPTS = 16
MAX_ROWS_READ = 64
MAX_POSITIONS = 32  # per row, where logits are compared
ENOUGH_POSITIONS = 256  # of all rows; more prompts only take time, five forwards each
MAX_ROW_TOKENS = 1024  # longer rows are used only if all are longer
MAX_NEW_TOKENS = 32
# Q8_0 keeps matrices in fp16 whose rows do not divide into its blocks.
ROUNDED_DTYPES = {"f16": "float16", "bf16": "bfloat16", "q8_0": "float16"}


@dataclass(frozen=True, eq=False)
class ParityExample:
    """A held-out row: its tokens with the first few targets, and the prompt of its last answer."""

    document: Document
    prompt: tuple[int, ...]
    messages: tuple[Json, ...] = ()  # the prompt before rendering; empty for plain text
    tools: tuple[Json, ...] = ()
    rendered_ids: tuple[int, ...] = ()  # the expected rendering by other programs

    @property
    def positions(self) -> list[int]:
        return (np.flatnonzero(self.document.weights_L) - 1).tolist()


@dataclass(frozen=True, eq=False)
class ParityOutputs:
    """Outputs of one side: logits [S, V] and a greedy answer per example."""

    logits: tuple[Tensor, ...]
    greedy: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class LiveOutputs(ParityOutputs):
    """Outputs of the run, with the mean KL to its base and rows of what training changed."""

    trained_kl: float
    changes: tuple[SampledChange, ...] = ()


@dataclass(frozen=True, eq=False)
class ReloadedExport:
    """An export as another program loads it. `rendered_ids`: the prompts of the chat examples."""

    network: Network
    rendered_ids: Sequence[tuple[int, ...]]
    end_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ExportJob:
    """One export: the run, the new folder, and the examples that both are compared on."""

    run: SourceRun
    folder: Path
    export_type: str
    examples: Sequence[ParityExample]

    @property
    def rounded_dtype(self) -> torch.dtype | None:
        """Return the coarsest dtype that weights are rounded to, None for types that keep fp32."""
        name = {**ROUNDED_DTYPES, "": self.run.model_spec.dtype}.get(self.export_type)
        return getattr(torch, name) if name else None

    @property
    def chat_examples(self) -> list[ParityExample]:
        """The examples that have messages to render."""
        return [example for example in self.examples if example.messages]


@dataclass(frozen=True)
class Parity:
    """How far an export is from its run.

    KL(run || export) in nats at `positions`; `trained_kl` is the mean of KL(run || base).
    `same_prompts` of `rendered_prompts` have the same ids, `same_answers` of `prompts` the same
    greedy tokens. `lost`: parameters without all of what training changed; in `unchecked` of the
    `changed` ones rounding hides the change.
    """

    prompts: int
    rendered_prompts: int
    same_prompts: int
    same_answers: int
    positions: int
    mean_kl: float
    max_kl: float
    trained_kl: float
    top1_agreement: float
    max_logit_difference: float
    lost: tuple[LostChange, ...] = ()
    changed: int = 0
    unchecked: int = 0


@dataclass(frozen=True)
class Tolerance:
    """The largest KL that a format may cause, and never more than MAX_LOST_SHARE of what training
    caused.

    Greedy answers and top-1 agreement are reported, not gated: between two almost equally likely
    tokens, any rounding may choose.
    """

    mean_kl: float
    max_kl: float


# Half of an adapter, left out, is a quarter of the KL that training caused.
MAX_LOST_SHARE = 0.25
NUMERIC_KL = 1e-6  # of an adapter that changed no more, nothing can be lost

ROUNDING_HINT = (
    "rounding weights to 16 bits loses small changes: export the adapter alone (--to peft), or use "
    "--to gguf --type f32; please report this if that differs, too"
)

# ---------------------------------------------------------------- examples


def select_examples(run: SourceRun) -> tuple[ParityExample, ...]:
    """Return held-out rows of the run as examples. Raises InputError if its data are missing."""
    rows = run.open_held_out_rows(MAX_ROWS_READ)
    candidates: list[ParityExample] = []
    for index in range(len(rows)):
        if example := _build_example(run, rows, index):
            candidates.append(example)
    if not candidates:
        fix = "restore the data of the run"
        raise InputError("no row to compare the export on", where=rows.path, fix=fix)
    short = [example for example in candidates if len(example.document) <= MAX_ROW_TOKENS]
    by_length = sorted(candidates, key=lambda example: len(example.document))
    chosen = _take_enough(short or by_length)
    # Where our rendering rightly differs from other programs', the stock template is the reference.
    chats = [(e.messages, e.tools) for e in chosen if e.messages and not e.rendered_ids]
    stock_ids = iter(encode_stock_prompts(run.saved_dir, chats, run.recipe.chat_template_kwargs))
    return tuple(
        replace(example, rendered_ids=next(stock_ids))
        if example.messages and not example.rendered_ids
        else example
        for example in chosen
    )


def _take_enough(examples: Sequence[ParityExample]) -> list[ParityExample]:
    """Return the first examples, up to ENOUGH_POSITIONS and MAX_PROMPTS."""
    chosen: list[ParityExample] = []
    num_positions = 0
    for example in examples[:MAX_PROMPTS]:
        if num_positions >= ENOUGH_POSITIONS:
            break
        chosen.append(example)
        num_positions += len(example.positions)
    return chosen


def _build_example(run: SourceRun, rows: Dataset, index: int) -> ParityExample | None:
    """Return the row as an example; None for a row without supervised tokens."""
    example, prepared = rows.render_row(index)
    if not prepared.documents:
        return None
    document = prepared.documents[-1]
    weights_L = document.weights_L
    (targets,) = np.nonzero(weights_L)
    prompt_end = np.flatnonzero(weights_L[: targets[-1]] == 0)[-1] + 1
    prompt = tuple(document.tokens_L[:prompt_end].tolist())
    short_weights_L = weights_L.copy()
    short_weights_L[targets[MAX_POSITIONS:]] = 0
    short_document = Document(document.id, document.tokens_L, short_weights_L)
    if not example.messages:
        return ParityExample(short_document, prompt)
    answer_turn = max(i for i, weight in enumerate(example.turn_weights) if weight > 0)
    messages = run.renderer.normalize_messages(example.messages[:answer_turn], example.tools)
    # Other programs write today's date where the run's is frozen, and turn text that looks like a
    # control token into one.
    is_different = run.renderer.has_date or CONTROL_LIKE_TEXT in prepared.notes
    rendered_ids = () if is_different else prompt
    return ParityExample(short_document, prompt, tuple(messages), example.tools, rendered_ids)


# ---------------------------------------------------------------- the two sides


def compute_live_outputs(job: ExportJob) -> LiveOutputs:
    """Return the run's outputs in our engine. The model is freed when this returns."""
    changes = _sample_changes(job)
    base_logits = () if job.run.loras else _compute_untrained_logits(job)
    model = job.run.load_live_model()
    logits = _compute_engine_logits(model, job.examples, "the run")
    if job.run.loras:
        with scaled_adapter(model.network, 0):
            base_logits = _compute_engine_logits(model, job.examples, "its base")
    trained_kl = compute_mean_kl(logits, base_logits)
    greedy = _generate_greedy(model, job, job.run.renderer.end_ids)
    return LiveOutputs(logits, greedy, trained_kl, changes)


def _compute_untrained_logits(job: ExportJob) -> tuple[Tensor, ...]:
    """Return the logits of the base of a fully trained model, which is freed when this returns."""
    model = wrap_model(job.run.load_untrained_network(), torch.float32)
    return _compute_engine_logits(model, job.examples, "its base")


def _sample_changes(job: ExportJob) -> tuple[SampledChange, ...]:
    """Return rows of what training changed in the base that the export starts from."""
    if not job.run.changes:
        return ()
    return sample_changes(job.run.load_base_network(), job.run.changes, job.rounded_dtype)


def compute_export_outputs(job: ExportJob, reloaded: ReloadedExport) -> ParityOutputs:
    """Return the export's outputs: logits of the stock network, greedy answers of our engine up to
    the export's own end tokens.

    Raises GateError for logits that are not finite.
    """
    logits = compute_example_logits(reloaded.network, job.examples)
    if not all(bool(values.isfinite().all()) for values in logits):
        message = "the export's logits are not finite"
        raise GateError(message, where=str(job.run.path), fix="please report this")
    model = wrap_model(reloaded.network, torch.float32)
    return ParityOutputs(logits, _generate_greedy(model, job, reloaded.end_ids))


def compute_example_logits(
    network: Network, examples: Sequence[ParityExample]
) -> tuple[Tensor, ...]:
    """Return the logits of a stock network."""
    logits: list[Tensor] = []
    for example in log_progress(examples, len(examples), "prompts compared, in transformers"):
        tokens = example.document.tokens_L[: count_input_tokens(example.document)].tolist()
        logits.append(compute_stock_logits(network, tokens, example.positions).cpu())
    return tuple(logits)


@torch.no_grad()
def _compute_engine_logits(
    model: PackedCausalLM, examples: Sequence[ParityExample], side: str
) -> tuple[Tensor, ...]:
    logits: list[Tensor] = []
    for example in log_progress(examples, len(examples), f"prompts compared, {side}"):
        batch = collate(Pack((example.document,)), model.device)
        logits.append(model.head.compute_logits(model.compute_hidden(batch)).float().cpu())
    return tuple(logits)


def _generate_greedy(
    model: PackedCausalLM, job: ExportJob, end_ids: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    model.network.eval()
    requests = [GenerationRequest(example.prompt, MAX_NEW_TOKENS) for example in job.examples]
    finished = generate(model, requests, decode=job.run.renderer.decode, end_ids=end_ids)
    generations = dict(log_progress(finished, len(requests), "answers compared"))
    return tuple(generations[index].tokens for index in range(len(requests)))


# ---------------------------------------------------------------- the gate


def compare_outputs(
    job: ExportJob,
    live_outputs: LiveOutputs,
    export_outputs: ParityOutputs,
    reloaded: ReloadedExport,
) -> Parity:
    """Return how far the export's outputs are from the run's."""
    kl_S = _compute_kl(live_outputs.logits, export_outputs.logits)
    num_agreements = 0
    max_difference = 0.0
    for ours, theirs in zip(live_outputs.logits, export_outputs.logits, strict=True):
        num_agreements += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        max_difference = max(max_difference, float((ours - theirs).abs().max()))
    expected_ids = [example.rendered_ids for example in job.chat_examples]
    changes = check_changes(live_outputs.changes, reloaded.network)
    return Parity(
        prompts=len(job.examples),
        rendered_prompts=len(expected_ids),
        same_prompts=_count_equal(expected_ids, reloaded.rendered_ids),
        same_answers=_count_equal(live_outputs.greedy, export_outputs.greedy),
        positions=len(kl_S),
        mean_kl=float(kl_S.mean()),
        max_kl=float(kl_S.max()),
        trained_kl=live_outputs.trained_kl,
        top1_agreement=num_agreements / len(kl_S),
        max_logit_difference=max_difference,
        lost=changes.lost,
        changed=changes.changed,
        unchecked=changes.unchecked,
    )


def _count_equal(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def compute_mean_kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the mean of KL(ours || theirs) over all positions, in nats."""
    return float(_compute_kl(ours, theirs).mean())


def _compute_kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return KL(ours || theirs) at every position of every example, in fp64."""
    kl_values: list[Tensor] = []
    for our_logits, their_logits in zip(ours, theirs, strict=True):
        p_SV = our_logits.double().log_softmax(-1)
        q_SV = their_logits.double().log_softmax(-1)
        kl_values.append((p_SV.exp() * (p_SV - q_SV)).sum(-1).clamp(min=0))
    return torch.cat(kl_values)


def refuse_mismatch(
    tolerance: Tolerance, parity: Parity, job: ExportJob, reloaded: ReloadedExport
) -> None:
    """Raise GateError with all differences beyond the tolerance."""
    run = job.run
    problems: list[str] = []
    fix = "please report this"
    if parity.same_prompts < parity.rendered_prompts:
        num_different = parity.rendered_prompts - parity.same_prompts
        counts = f"{num_different} of {parity.rendered_prompts}"
        problems.append(f"{counts} prompts are rendered to other tokens")
    end_ids = set(reloaded.end_ids)
    trained_end_ids = run.renderer.end_ids
    if trained_end_ids[0] not in end_ids or not end_ids <= set(trained_end_ids):
        trained = f"they were trained to end in {trained_end_ids[0]}"
        problems.append(f"answers end in {sorted(end_ids)}, {trained}")
    if not parity.positions or math.isnan(parity.mean_kl) or math.isnan(parity.max_kl):
        problems.append(f"logits cannot be compared at {parity.positions} positions")
    if not problems:
        fix = ROUNDING_HINT
    if parity.mean_kl > tolerance.mean_kl:
        kl = f"{parity.mean_kl:.2g}"
        problems.append(f"the mean KL to the run is {kl}, above {tolerance.mean_kl:g}")
    problems += _list_losses(parity)
    if parity.max_kl > tolerance.max_kl:
        kl = f"{parity.max_kl:.2g}"
        problems.append(f"the largest KL at a position is {kl}, above {tolerance.max_kl:g}")
    if not problems:
        return
    message = f"the export does not behave as the run: {'; '.join(problems)}"
    raise GateError(message, where=str(run.path), fix=f"nothing was written; {fix}")


def _list_losses(parity: Parity) -> list[str]:
    """Return what the export lost of what training changed."""
    losses: list[str] = []
    if parity.mean_kl > max(NUMERIC_KL, MAX_LOST_SHARE * parity.trained_kl):
        kl = f"{parity.mean_kl:.2g} of {parity.trained_kl:.2g}"
        losses.append(f"it loses what training changed: a mean KL of {kl}")
    if parity.lost:
        worst = max(parity.lost, key=lambda lost: abs(lost.share - 1))
        count = f"{len(parity.lost)} of the parameters that training changed lack a part of it"
        losses.append(f"{count}: {worst.key} has {worst.share:.0%}")
    return losses


# ---------------------------------------------------------------- what training changed

# A mean KL is of all matrices together: one that lost its adapter may move the answers less than
# rounding does. So a few rows of each matrix are compared with the base's. The slope of their
# difference over the trained change is 1 if the change is there, 0 without it, 0.5 at half the
# scale, and near 0 if another layer's adapter was merged. Rounding to 4 or 8 bits adds noise, which
# the standard error counts. Where weights are rounded to 16 bits, so is the expected change: one of
# less than half a unit is lost in a correct export, too. Where rounding hides a lost change, the
# parameter is counted as unchecked. A change of 0, of an expert that no token chose, cannot be
# lost. The change is computed from the adapter's tensors here, not by the code that merges.
# Legend: K sampled rows, O outputs, I inputs.


@dataclass(frozen=True, eq=False)
class SampledChange:
    """Rows of a parameter in the base, and what training adds to them."""

    key: str  # as in `WeightDeltas`
    rows_K: Tensor
    base_KI: Tensor
    change_KI: Tensor
    expert: int | None = None  # of a stack
    dtype: torch.dtype | None = None  # what the export rounds to, if it does


@dataclass(frozen=True)
class LostChange:
    """A parameter of an export that has another share of its change than 1."""

    key: str
    share: float


@dataclass(frozen=True)
class ChangeCheck:
    """The parameters that lack a part of their change, each once; how many training changed, and in
    how many of them a lost change could not be told from rounding."""

    lost: tuple[LostChange, ...]
    changed: int
    unchecked: int


def sample_changes(
    network: nn.Module, changes: WeightDeltas, dtype: torch.dtype | None
) -> tuple[SampledChange, ...]:
    """Return rows of every parameter of the base that training changed by what fp32 can show.

    dtype: what the weights of the export are rounded to; None if they are not. Some may not be."""
    samples: list[SampledChange] = []
    for key, delta in changes.items():
        parameter = get_merge_target(network, key).detach()
        if not isinstance(delta, ExpertLoraTensors):
            samples.append(_sample_matrix(key, delta, _to_rows(parameter)))
            continue
        for expert in _choose_rows(len(parameter), MAX_EXPERTS).tolist():
            lora = LoraTensors(delta.a_ERI[expert], delta.b_EOR[expert], delta.scale)
            matrix_OI = _get_rows(network, key, expert)
            samples.append(replace(_sample_matrix(key, lora, matrix_OI), expert=expert))
    return tuple(replace(sample, dtype=dtype) for sample in samples if sample.change_KI.any())


def check_changes(samples: Sequence[SampledChange], network: nn.Module) -> ChangeCheck:
    """Compare the parameters of an export with the base and with what training added."""
    lost: dict[str, LostChange] = {}
    checked: set[str] = set()
    for sample in samples:
        exported_KI = _get_rows(network, sample.key, sample.expert)[sample.rows_K].float().cpu()
        slopes = [_measure_slope(sample, exported_KI, None)]
        if sample.dtype is not None:
            slopes.append(_measure_slope(sample, exported_KI, sample.dtype))
        if not any(abs(share - 1) <= tolerance for share, tolerance in slopes):
            lost.setdefault(sample.key, LostChange(sample.key, slopes[0][0]))
        if all(tolerance < 1 for _, tolerance in slopes):
            checked.add(sample.key)
    changed = {sample.key for sample in samples}
    return ChangeCheck(tuple(lost.values()), len(changed), len(changed - checked))


def _get_rows(network: nn.Module, key: str, expert: int | None) -> Tensor:
    """Return the parameter that a delta changes as a matrix [O, I], of one expert of a stack."""
    parameter = get_merge_target(network, key).detach()
    if expert is None:
        return _to_rows(parameter)
    return parameter[expert].t() if has_transposed_stacks(network, key) else parameter[expert]


def _to_rows(parameter: Tensor) -> Tensor:
    """Return a parameter as a matrix [O, I], a vector as one column."""
    return parameter.reshape(len(parameter), -1)


def _choose_rows(count: int, limit: int) -> Tensor:
    """Return at most `limit` of `count` indices, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


def _sample_matrix(
    key: str, delta: LoraTensors | TokenRowTensors | ModuleTensor, matrix_OI: Tensor
) -> SampledChange:
    if isinstance(delta, TokenRowTensors):
        rows_K = delta.first_id + _choose_rows(len(delta.rows_KH), MAX_ROWS)
    else:
        rows_K = _choose_rows(len(matrix_OI), MAX_ROWS)
    base_KI = matrix_OI[rows_K].float().cpu()
    if isinstance(delta, LoraTensors):
        trained_KI = _adapt_rows(delta, rows_K, base_KI)
    elif isinstance(delta, TokenRowTensors):
        trained_KI = delta.rows_KH[rows_K - delta.first_id]
    else:
        trained_KI = _to_rows(delta.tensor)[rows_K]
    return SampledChange(key, rows_K, base_KI, trained_KI.float().cpu() - base_KI)


def _adapt_rows(lora: LoraTensors, rows_K: Tensor, base_KI: Tensor) -> Tensor:
    """Return rows of W + scale * B A, with DoRA at their trained lengths."""
    adapted_KI = base_KI + lora.scale * torch.einsum("kr,ri->ki", lora.b_OR[rows_K], lora.a_RI)
    if lora.magnitude_O is None:
        return adapted_KI
    return torch.nn.functional.normalize(adapted_KI, dim=1) * lora.magnitude_O[rows_K, None]


def _measure_slope(
    sample: SampledChange, exported_KI: Tensor, dtype: torch.dtype | None
) -> tuple[float, float]:
    """Return the slope of what an export has more than the base over the trained change, and how
    far from 1 it may be. A change that rounding leaves nothing of has the slope 1 if the export has
    nothing of it either."""
    base_KI = sample.base_KI
    trained_KI = base_KI + sample.change_KI
    if dtype is not None:
        base_KI = base_KI.to(dtype)
        trained_KI = trained_KI.to(dtype)
    change = (trained_KI.double() - base_KI.double()).flatten()
    difference = (exported_KI.double() - base_KI.double()).flatten()
    energy = float(change @ change)
    if not energy:
        return (0.0, MAX_SHARE_ERROR) if difference.any() else (1.0, math.inf)
    slope = float(difference @ change) / energy
    residual = difference - slope * change
    standard_error = float((residual @ residual / len(residual) / energy).sqrt())
    return slope, MAX_SHARE_ERROR + MAX_STANDARD_ERRORS * standard_error
