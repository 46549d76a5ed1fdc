"""The objects that flow through tunesmith, in that order.

    Recipe -> Plan (every setting with its reason) -> Batches -> Events -> RunRecord -> Report

All are frozen. Only `Batch` has tensors; all others have plain values and a JSON form. Shape
letters: T tokens of a pack, S supervised targets of a pack, V vocabulary, L tokens of a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from pydantic import model_validator

from tunesmith.core.events import CheckResult, GenerationSample, Rollback, Score
from tunesmith.core.evidence import ErrorAnalysis, RunVerdict
from tunesmith.core.formatting import iter_paths
from tunesmith.core.json_io import Json
from tunesmith.core.mesh import Machine, MeshPlan
from tunesmith.core.model_spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tunesmith.core.token_shard import TokenShard

__version__ = "0.1.0"

RUN_FORMAT = 5  # of plan.json and its run folder; raised when older files would be misread

T = TypeVar("T")
# of a document: "" is trained on, a banned one is trained away from; of a mismatched one only the
# log-probability is measured
Side = Literal["", "chosen", "rejected", "banned", "desirable", "undesirable", "mismatched"]

# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class Finding:
    """A result of the data check."""

    check: str
    level: Literal["info", "warn", "error"]
    message: str
    count: int = 0
    rows: tuple[str, ...] = ()  # ids of the first ones
    fix: str = ""


@dataclass(frozen=True)
class WeightedText:
    """Text of a document whose tokens have one weight in the loss: 0 where they are not trained."""

    text: str
    weight: float


@dataclass(frozen=True)
class DataReport:
    """Counts and lengths of all rendered rows of a role, before training. Lengths are tokens."""

    path: str
    format: str
    format_reason: str
    rows: int  # each keeps its slot in the step schedule
    documents: int  # one per conversation, or one per assistant turn
    tokens: int
    supervised_tokens: int
    # reason -> rows without a document
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    # reason -> rows that cannot be used
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    truncated: int = 0
    length_percentiles: dict[str, int] = field(default_factory=dict[str, int])  # p50, p90, p99, max
    # longest length of the bin -> documents
    length_counts: dict[str, int] = field(default_factory=dict[str, int])
    # beginning of the first scanned training row as the model sees it: texts of equal weight
    first_row: tuple[WeightedText, ...] = ()
    fingerprint: str = ""  # sha256 of the file
    findings: tuple[Finding, ...] = ()
    is_fully_checked: bool = False  # all texts were read, as `tunesmith data check` does
    # constraint -> rows that break it and are left out
    filtered: dict[str, int] = field(default_factory=dict[str, int])
    # constraint -> rows that are trained away from
    banned: dict[str, int] = field(default_factory=dict[str, int])
    task_rows: dict[str, int] = field(default_factory=dict[str, int])  # task -> rows
    task_tokens: dict[str, int] = field(default_factory=dict[str, int])  # task -> tokens
    # label, secrets masked -> training rows, of at most 20,000; empty if answers are no labels
    labels: dict[str, int] = field(default_factory=dict[str, int])


# ---------------------------------------------------------------- plan


DecidedBy = Literal["user", "rule", "checkpoint"]
Confidence = Literal["", "measured here", "published", "extrapolated"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The value of every setting that a run obeys, in the order of the rules.

    A setting of another stage, method or feature is None. Numbers that may be whole are
    `int | float`, so that they stay the same in JSON.
    """

    method: Literal["lora", "qlora", "full"]
    optim: Literal["adamw", "adamw_8bit"]
    loss: Literal["dpo", "orpo", "simpo", "kto"] | None = None  # preference rows
    beta: int | float | None = None  # preference rows, per nat; ORPO's lambda
    gamma: int | float | None = None  # SimPO's margin, nats per token
    nll_coefficient: int | float | None = None  # of the plain loss of chosen answers
    desirable_weight: int | float | None = None  # KTO's factors on both kinds of answers
    undesirable_weight: int | float | None = None
    train_on: str | tuple[str, ...] | None = None  # all, or roles; None: answers
    label_smoothing: int | float | None = None  # share of each label
    neftune_noise_alpha: int | float | None = None  # noise on embeddings
    dtype: Literal["bf16", "fp16", "fp32"]
    max_length: int  # tokens of a document
    pack_length: int  # tokens of a pack
    num_train_epochs: int | float
    batch_size: int | None = None  # rows per step; not with stage: cpt
    batch_tokens: int | None = None  # tokens per step; stage: cpt
    lora_r: int | None = None
    lora_alpha: int | float | None = None
    lora_dropout: int | float | None = None  # probability
    lora_target_modules: str | tuple[str, ...] | None = None  # a group, or names of layers
    use_rslora: bool | None = None
    use_dora: bool | None = None
    modules_to_save: tuple[str, ...] | None = None  # trained in full beside the adapter
    rank_pattern: dict[str, int] | None = None  # path of a layer -> rank, where it differs
    alpha_pattern: dict[str, int | float] | None = None  # path of a layer -> lora_alpha
    learning_rate: int | float  # peak
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ]
    warmup_ratio: int | float  # fraction of the steps
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None  # of some schedules
    weight_decay: int | float
    max_grad_norm: int | float  # 0: no clipping
    step_in_backward: bool  # update each weight as soon as its gradient is known
    attention: str  # backend
    share_prefixes: bool
    weight_layout: Literal["plain", "blocked"]
    metrics: tuple[str, ...]
    eval_steps: int  # steps between two evaluations on eval_data
    save_steps: int  # steps between two checkpoints
    adapter_sha256: str | None = None  # of the adapter that training starts from
    adapter_from: str | None = None  # its folder
    mixture: dict[str, int] | None = None  # task -> rows per epoch
    add_tokens: dict[str, int] | None = None  # text -> token id
    separator: str | None = None  # token that ends every text; stage: cpt
    between_stages: str | None = None  # how this stage takes over the weights of the previous one
    never: tuple[str, ...] | None = None  # constraints, each with its mode
    ban_coefficient: int | float | None = None  # of the unlikelihood loss
    guard_collapse: Literal["off", "warn", "rollback", "stop"]
    guard_forgetting: Literal["off", "warn", "rollback", "stop"]
    forgetting_margin: int | float  # bits per byte
    patience: int  # evaluations without improvement before the run stops
    probe_steps: int  # steps between two generation probes; 0: none
    probe_prompts: int
    rehearsal_ratio: int | float | None = None  # fraction of a step's tokens
    rehearsal_length: int | None = None  # tokens of a rehearsal document, at most
    rehearsal_margin: int | float | None = None  # bits per byte; only with an adaptive ratio
    rehearsal_tokens: int | None = None  # tokens that the base model generates for rehearsal
    new_rows_modules: tuple[str, ...] | None = None  # matrices with trained rows of new tokens
    new_rows_lr_factor: int | float | None = None  # learning rate of those rows, relative
    gradient_checkpointing: str  # kept or recomputed in the backward pass
    deterministic: bool = False  # torch's deterministic algorithms
    context_parallel_size: int = 1  # ranks that share each document
    dp_shard_size: int = 1  # ranks that hold the weights of the model once
    chat_template: str  # "auto": the model's own; "none"; or the path of a Jinja file
    on_overlong: Literal["drop", "truncate", "refuse"]
    seed: int
    stage: Literal["sft", "cpt", "preference"]
    output_dir: str
    now: str  # ISO 8601; the date that chat templates see


def require(setting: T | None) -> T:
    """Return a setting that a plan of this stage and method always has."""
    assert setting is not None
    return setting


@dataclass(frozen=True)
class PlanReason:
    """Who decided a setting, and why."""

    decided_by: DecidedBy
    reason: str
    source: str = ""
    confidence: Confidence = ""
    # what is usually advised, where it differs, and what following it would cost
    common_advice: str = ""


@dataclass(frozen=True)
class PlanValue:
    """The value of a setting with its reason: what a rule returns."""

    value: Any
    decided_by: DecidedBy
    reason: str
    source: str = ""
    confidence: Confidence = ""
    common_advice: str = ""

    def get_reason(self) -> PlanReason:
        """Return the reason without the value."""
        return PlanReason(
            self.decided_by, self.reason, self.source, self.confidence, self.common_advice
        )


@dataclass(frozen=True)
class Plan:
    """Everything that a run obeys. `train` accepts nothing else; `recipe` is what it was made from.

    In JSON, `config` and `reasons` are one mapping, `settings`: key -> PlanValue.
    """

    recipe: Json
    config: PlanConfig
    reasons: dict[str, PlanReason]  # by the key of `config`; only of the settings that it has
    machine: Machine
    model: ModelSpec
    data: dict[str, DataReport]  # role (data | rehearsal | eval_data | test_data) -> report
    steps: int  # optimizer steps
    tokens_per_epoch: int
    memory_bytes: dict[str, int]  # component -> predicted bytes, with "peak"
    warnings: tuple[str, ...] = ()
    disk_bytes: int = 0  # upper bound of the run folder
    # step | longest row | answers -> bytes
    phase_bytes: dict[str, int] = field(default_factory=dict[str, int])
    prefix_savings: float = 0.0  # fraction of the tokens
    # of training: one number, or the lower and the upper bound; empty when unknown
    seconds: tuple[float, ...] = ()
    total_seconds: float = 0.0  # with preflight and evaluation; 0 when unknown
    seconds_source: str = ""
    fits_on: str = ""  # the smallest preset with enough memory, if this machine has too little
    mesh: MeshPlan | None = None  # of a target

    @property
    def settings(self) -> dict[str, PlanValue]:
        """Every setting of this run with its reason, in the order in which they were decided."""
        return {
            key: PlanValue(getattr(self.config, key), **vars(reason))
            for key, reason in self.reasons.items()
        }

    def with_settings(self, **plan_values: PlanValue) -> Plan:
        """Return a copy with these settings in place of its own."""
        config, reasons = split_settings(self.settings | plan_values)
        return dataclasses.replace(self, config=config, reasons=reasons)

    @property
    def values(self) -> dict[str, Any]:
        """The value of every setting of this run."""
        return {key: getattr(self.config, key) for key in self.reasons}

    @property
    def rows_per_epoch(self) -> int:
        if self.config.mixture is not None:
            return sum(self.config.mixture.values())
        return self.data["data"].rows

    def list_paths(self) -> list[str]:
        """Return the paths that the plan names: the model, the data and what its recipe has."""
        paths = [str(self.model.path), self.config.output_dir]
        paths += [report.path for report in self.data.values()]
        return [*paths, *iter_paths(self.recipe)]

    def to_json(self) -> Json:
        """Return the fields as they are written, `settings` in place of `config` and `reasons`."""
        fields: Json = {"format": RUN_FORMAT}
        for name, value in vars(self).items():
            if name == "config":
                fields["settings"] = self.settings
            elif name != "reasons":
                fields[name] = value
        return fields

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "settings" in fields:
            fields = cast("Json", fields)
            settings = _check_settings(fields["settings"])
            config = {key: setting["value"] for key, setting in settings.items()}
            return fields | {"config": config, "reasons": settings}
        return cast("Any", fields)


def _check_settings(settings: Any) -> dict[str, Json]:
    """Return the settings of a plan.json. Raises ValueError if they are damaged or of others."""
    if not isinstance(settings, dict):
        raise ValueError("settings: not a mapping")  # which pydantic reports
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    for key, setting in cast("dict[str, Any]", settings).items():
        if key not in names:
            raise ValueError(f"settings: unknown setting {key!r}")
        if not isinstance(setting, dict) or "value" not in setting:
            raise ValueError(f"settings: {key} has no value")
    return cast("dict[str, Json]", settings)


def split_settings(
    plan_values: Mapping[str, PlanValue],
) -> tuple[PlanConfig, dict[str, PlanReason]]:
    """Return the values and the reasons. Raises TypeError for a key that PlanConfig lacks."""
    config = PlanConfig(**{key: plan_value.value for key, plan_value in plan_values.items()})
    return config, {key: plan_value.get_reason() for key, plan_value in plan_values.items()}


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Row:
    """A row of a data file. `id` is `name:line`, and stays with it up to the Batch."""

    id: str
    data: Json


@dataclass(frozen=True)
class NewToken:
    """A token that the recipe adds to the tokenizer."""

    text: str
    id: int
    subword_ids: tuple[int, ...]  # of its text before it was added
    is_ordinary: bool = True  # else a control token: only templates and answers can produce it


class RowWeight(float):
    """A weight that the row sets for a message, in place of that of its role."""


class CharSpan(NamedTuple):
    """Characters start:end of the content of a message, without surrounding white space."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """A parsed row: either `messages` or `text`."""

    id: str
    messages: tuple[Json, ...] = ()
    turn_weights: tuple[float, ...] = ()  # one per message; 0: not trained
    tools: tuple[Json, ...] = ()
    text: str | None = None
    prompt: str | None = None  # before `text`, not trained (completion rows without a template)
    rejected: Example | None = None  # the rejected answer of a pair
    # whether the row marks its answer as bad (True, or "whole") or as right (False)
    negative: bool | Literal["whole"] | None = None
    banned_spans: tuple[CharSpan, ...] = ()  # bad parts; nothing else of the row is trained
    violations: tuple[str, ...] = ()  # names of the constraints that it breaks
    choices: tuple[str, ...] = ()  # answers to choose from
    label: bool | None = None  # whether the answer is desirable, for KTO

    @property
    def is_bad(self) -> bool:
        """Whether the row says that its answer is wrong."""
        return bool(self.negative) or self.label is False


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that attend to each other. Sides of a pair are adjacent, the chosen one first."""

    id: str  # of the row
    tokens_L: np.ndarray  # int32
    weights_L: np.ndarray  # float32; of token i as a target, so the first one is 0
    side: Side = ""
    reference_logp: float | None = None  # of its targets before training, if the loss needs it
    task: str = ""  # of the recipe, "rehearsal", or none

    @property
    def is_correct(self) -> bool:
        """Whether its answer is one to learn."""
        return self.side in ("", "chosen", "desirable")

    def __len__(self) -> int:
        return len(self.tokens_L)


@dataclass(frozen=True)
class Pack:
    """Documents of one forward pass, which do not see each other."""

    documents: tuple[Document, ...]
    # how many input tokens each shares with the document before it; empty without sharing
    prefix_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackLayout:
    """Which tokens of a pack see each other: all that attention knows.

    Segment i is tokens starts[i] : starts[i] + lengths[i]. A token sees itself, the earlier tokens
    of its segment, and all tokens of its parent segment, of its parent, and so on to a root."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    # segment that each continues, always an earlier one; -1 is a root; empty: all are roots
    parents: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def get_path(self, segment: int) -> tuple[int, ...]:
        """Return the segments from the root down to this one."""
        path = [segment]
        while self.parents and self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def count_prefix_tokens(self, segment: int) -> int:
        """Return the number of tokens before a segment: the position of its first token."""
        return sum(self.lengths[i] for i in self.get_path(segment)[:-1])


@dataclass(frozen=True, eq=False)
class SharedTargets:
    """The targets of a pack whose documents share tokens: M different ones, at P positions.

    They are found on the host when the pack is made, because a GPU would have to wait for their
    number. They hold for a batch with the same `positions_S` and `targets_S`."""

    positions_S: torch.Tensor
    targets_S: torch.Tensor
    positions_P: torch.Tensor  # ascending
    position_S: torch.Tensor  # index of the position of each target
    target_S: torch.Tensor  # index of the different target of each target
    targets_M: torch.Tensor
    position_M: torch.Tensor  # index of the position of each different target

    def is_for(self, batch: Batch) -> bool:
        return self.positions_S is batch.positions_S and self.targets_S is batch.targets_S


@dataclass(frozen=True, eq=False)
class Batch:
    """A pack as tensors. Hidden state `positions_S[k]` predicts `targets_S[k]`.

    Documents that share tokens have their own targets, so a position can occur more than once."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each document
    layout: PackLayout
    positions_S: torch.Tensor  # int64, into T
    targets_S: torch.Tensor  # int64
    weights_S: torch.Tensor  # float32
    document_S: torch.Tensor  # int64, index of the document of each target
    ids: tuple[str, ...]  # of the documents
    real_tokens: int  # of the documents as rendered, as `tokens` of a step counts them
    sides: tuple[Side, ...] = ()  # of the documents; empty if none has a side
    reference_logps: tuple[float | None, ...] = ()  # of the documents, as `sides`
    num_targets: tuple[int, ...] = ()  # of the documents, whose targets follow each other in S
    shared_targets: SharedTargets | None = None  # if documents share tokens
    embedding_noise_TH: torch.Tensor | None = None  # added to embeddings (NEFTune)
    shard: TokenShard | None = None  # of which the tensors are; the layout is of the whole pack


# ---------------------------------------------------------------- generation and measurement


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to answer: greedily at temperature 0, else sampled with `seed`, whatever else is in
    the batch. `bad_words_ids` are token sequences that the answer must not contain."""

    tokens: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of the tokens of prompt and answer, also when greedy
    seed: int = 0
    stop: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    presence_penalty: float = 0.0  # of the tokens of the answer, also when greedy
    frequency_penalty: float = 0.0  # the same, for each time that a token occurs
    logit_bias: tuple[tuple[int, float], ...] = ()  # token, what is added to its logit
    num_logprobs: int = -1  # -1: none; 0: of the answer's tokens; n: of the n most likely, too
    num_prompt_logprobs: int = -1  # the same of the prompt's, whose stored keys are not used then
    end_ids: tuple[int, ...] = ()  # tokens that end the answer; empty: those of the batch
    adapter: str = ""  # key of an adapter of the bank, which stands for its content; "": none
    adapter_scale: float = 1.0
    cache_salt: str = ""  # prompts share stored keys and values only if it is equal


class TokenLogprobs(NamedTuple):
    """Log-probabilities before temperature, penalties and masks."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, in order


@dataclass(frozen=True)
class GenerationOutput:
    text: str  # without the end token or the stop string
    tokens: tuple[int, ...]
    finish_reason: Literal["end", "stop", "length"]
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()  # of `tokens`, if the request has num_logprobs


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Comparison:
    """A metric before and after on the same items: a paired difference and its 95% CI."""

    task: str
    metric: str
    before: Score
    after: Score
    difference: float
    low: float
    high: float
    higher_is_better: bool
    improved: int | None = None  # items, for metrics that are right or wrong
    worsened: int | None = None
    p_value: float | None = None  # exact: sign flips, of right and wrong items McNemar's
    min_detectable: float | None = None  # smallest difference detected with a power of 80%
    # Of two trained models, the interval with the variance between seeds, and the degrees of
    # freedom of that; without degrees it is a usual one, and the verdict open.
    seed_low: float | None = None
    seed_high: float | None = None
    seed_degrees: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that decides: with the seeds' variance, where seeds were measured."""
        if self.seed_low is None or self.seed_high is None or self.seed_degrees is None:
            return self.low, self.high
        return self.seed_low, self.seed_high


@dataclass(frozen=True)
class ScalePoint:
    """The scores of the trained adapter times `scale`."""

    scale: float
    eval_loss: Score  # on eval_data
    general_text: Score | None = None  # bits per byte
    # bits per byte lost against scale 0, in pairs; None in records of earlier versions
    general_lost: Score | None = None
    right: Score | None = None  # share of eval_data's rows that greedy decoding answers exactly


@dataclass(frozen=True)
class RunRecord:
    """The results of a run, all measured in it; `record.json`."""

    version: str
    plan: Plan
    preflight: tuple[CheckResult, ...]
    comparisons: tuple[Comparison, ...]
    steps: int
    tokens: int
    train_seconds: float
    peak_bytes: int
    adapter: str
    samples: tuple[tuple[GenerationSample, GenerationSample], ...] = ()  # before, after
    # task -> tokens, part of `tokens`
    task_tokens: dict[str, int] = field(default_factory=dict[str, int])
    shared_tokens: int = 0  # part of `tokens`, computed once in another document
    # inputs that had changed when the run was resumed with --allow-changes: field: old -> new
    input_changes: tuple[str, ...] = ()
    kl_scores: tuple[Score, ...] = ()  # KL(before || after) in nats, top-1 agreement
    scales: tuple[ScalePoint, ...] = ()  # empty without an adapter or eval_data
    rollbacks: tuple[Rollback, ...] = ()
    # step of the final weights: the best on eval_data, else the last
    selected_step: int | None = None
    # of all attempts, with loading, preflight and evaluation; 0 in records of earlier versions
    total_seconds: float = 0.0
    train_peak_bytes: int = 0  # of the steps; `peak_bytes` covers evaluation, too
    errors: ErrorAnalysis | None = None  # None without answers to test rows
    verdict: RunVerdict | None = None
