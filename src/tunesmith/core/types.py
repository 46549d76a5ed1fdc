"""Every object that flows through tunesmith, in the order in which it flows.

    Recipe (wish) -> Plan (every value with its reason) -> Batches -> Events -> RunRecord -> Report

All are frozen. Only `Batch` holds tensors; the rest holds plain values and can be written as JSON.
Shape letters: T tokens of a pack, S supervised targets of a pack, V vocabulary, L tokens of a
document."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tunesmith.core.events import (
    CheckResult,
    GenerationSample,
    Rollback,
    Score,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

__version__ = "0.1.0"

Json = dict[str, Any]
Side = Literal[
    "", "chosen", "rejected", "banned"
]  # "" is trained as it is, a banned one is trained away from

# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class Machine:
    """What this machine has. Bytes are what is there, `available_bytes` what is free now."""

    device: Literal["cpu", "cuda"]
    device_name: str
    cores: int
    memory_bytes: int
    available_bytes: int
    disk_free_bytes: int
    has_bf16_matmul: bool  # bf16 matrix products run in hardware
    compiler: str | None  # path of a C compiler, for the CPU kernels
    versions: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class ModelSpec:
    """What a model folder says about itself; read from config.json and the safetensors headers,
    weights untouched."""

    name: str
    path: Path
    architecture: str  # LlamaForCausalLM
    model_type: str  # llama
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    tie_word_embeddings: bool
    parameters: int
    dtype: str
    origin: str = ""  # where the weights come from, for people

    @property
    def block_parameters(self) -> int:
        """Parameters of the matrices inside the decoder layers: what a token's forward multiplies
        with."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.num_layers * self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Finding:
    """One thing the data check has to say. `rows` names at most a few, `count` counts all; `fix` is
    what to do."""

    check: str
    level: Literal["info", "warn", "error"]
    message: str
    count: int = 0
    rows: tuple[str, ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class DataReport:
    """What a parse-only pass over one data file found; lengths in tokens of the rendered
    documents."""

    path: str
    format: str
    format_reason: str
    rows: int  # data rows read; each keeps its slot in the step schedule
    documents: int  # what they became: one a conversation, or one an assistant turn
    tokens: int
    supervised_tokens: int
    dropped: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # reason -> rows without a document
    rejected: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # reason -> rows that cannot be used
    truncated: int = 0
    length_percentiles: dict[str, int] = field(default_factory=dict[str, int])  # p50, p90, p99, max
    fingerprint: str = ""  # sha256 over the bytes of the file
    findings: tuple[Finding, ...] = ()
    filtered: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # constraint -> rows that break it
    banned: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # constraint -> rows that are trained away from
    task_rows: dict[str, int] = field(default_factory=dict[str, int])  # named task -> rows
    task_tokens: dict[str, int] = field(default_factory=dict[str, int])  # named task -> tokens


# ---------------------------------------------------------------- decision


@dataclass(frozen=True)
class PlanValue:
    """One value of the plan. `by`: the user said so, a rule decided, or the model's own files
    did."""

    value: Any
    decided_by: Literal["you", "rule", "checkpoint"]
    reason: str
    source: str = ""
    confidence: Literal["", "measured here", "published", "extrapolated"] = ""
    # the usual one, where this differs from it and what obeying it would cost
    common_advice: str = ""


@dataclass(frozen=True)
class Plan:
    """Every value that a run obeys. `train` accepts nothing else; `recipe` is the wish that it came
    from."""

    recipe: Json
    choices: dict[str, PlanValue]
    machine: Machine
    model: ModelSpec
    data: dict[str, DataReport]  # role (data | rehearsal | eval_data | test_data) -> report
    steps: int
    tokens_per_epoch: int
    memory_bytes: dict[str, int]  # component -> predicted bytes, with "peak"
    warnings: tuple[str, ...] = ()
    disk_bytes: int = 0  # what the run folder holds at most
    phase_bytes: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # step | longest row | answers -> bytes
    prefix_savings: float = 0.0  # of the tokens, by sharing prefixes
    seconds: tuple[
        float, ...
    ] = ()  # of training: one number, or the least and the most; empty where nothing is known
    total_seconds: float = 0.0  # of the run with its proof and measures; 0: not known
    seconds_source: str = ""
    fits_on: str = ""  # the smallest machine of the table that has room, if this one has not

    def __getitem__(self, key: str) -> Any:
        return self.choices[key].value

    @property
    def rows_per_epoch(self) -> int:
        return (
            sum(self["mixture"].values()) if "mixture" in self.choices else self.data["data"].rows
        )


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file. `id` is `name:line`, and survives to the Batch."""

    id: str
    data: Json


@dataclass(frozen=True)
class NewToken:
    """A token that the recipe adds. `pieces`: its text's ids until then. Not `ordinary`: only
    template and answers."""

    text: str
    id: int
    subword_ids: tuple[int, ...]
    is_ordinary: bool = True


class CharSpan(NamedTuple):
    """Characters start:end of what a message says, counted without the white space around it."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """One row, understood. Either `messages` (with `turn_weights`, one a message; 0 = not trained)
    or `text`."""

    id: str
    messages: tuple[Json, ...] = ()
    turn_weights: tuple[float, ...] = ()
    tools: tuple[Json, ...] = ()
    text: str | None = None
    # with `text`: the part before it, not trained (completion rows without a template)
    prompt: str | None = None
    # the worse answer to the same question: together they are a pair
    rejected: Example | None = None
    # the row says that its answer is bad; False: that it is right
    negative: bool | Literal["whole"] | None = None
    banned_spans: tuple[CharSpan, ...] = ()  # what is bad in it: nothing else of it is trained
    violations: tuple[str, ...] = ()  # the constraints that it breaks
    choices: tuple[str, ...] = ()  # answers to choose from, in rows that say so


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that may see each other. `weights_L[i]` is the weight of token i *as a target*;
    weights_L[0] is 0. The two sides of a pair stand next to each other, the chosen one first."""

    id: str  # the row's id
    tokens_L: np.ndarray  # int32
    weights_L: np.ndarray  # float32
    side: Side = ""
    # log-probability of its targets before training, if it was kept
    reference_logp: float | None = None
    task: str = ""  # a named one of the recipe, "rehearsal", or nothing

    @property
    def is_correct(self) -> bool:
        """Its answer is one to give: neither the rejected one of a pair nor a banned one."""
        return self.side not in ("rejected", "banned")

    def __len__(self) -> int:
        return len(self.tokens_L)


@dataclass(frozen=True)
class Pack:
    """Documents computed in one forward, side by side, blind to each other. The first `shared[i]`
    fed tokens of document i are those of document i - 1 and computed once; empty: nothing is
    shared."""

    documents: tuple[Document, ...]
    prefix_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackLayout:
    """Who may see whom in a pack: the only description that attention gets. Segment i is tokens
    starts[i] : starts[i] + lengths[i]; a token sees the earlier tokens of its own segment, itself
    included, and all of the segments that its own one continues: its parent, the parent's parent,
    up to a root."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    # a parent stands before its children, -1: a root; empty: all are roots
    parents: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def get_path(self, segment: int) -> tuple[int, ...]:
        """From the root down to the segment, itself included."""
        path = [segment]
        while self.parents and self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def count_prefix_tokens(self, segment: int) -> int:
        """How many tokens a segment continues: the position of its first token."""
        return sum(self.lengths[i] for i in self.get_path(segment)[:-1])


@dataclass(frozen=True, eq=False)
class Batch:
    """A pack as tensors. Targets are a list apart: hidden state `positions_S[k]` predicts
    `targets_S[k]`. Where documents share tokens each of them has its own targets, so a place may
    stand there more than once."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each document
    layout: PackLayout
    positions_S: torch.Tensor  # int64, into T
    targets_S: torch.Tensor  # int64
    weights_S: torch.Tensor  # float32
    document_S: torch.Tensor  # int64, into ids: which document a target belongs to
    ids: tuple[str, ...]
    real_tokens: int  # tokens of the documents as rendered, what `tokens` of a step counts
    sides: tuple[Side, ...] = ()  # of each document; () when none is a side of a pair
    reference_logps: tuple[float | None, ...] = ()  # of each document, beside `sides`


# ---------------------------------------------------------------- generation and measurement


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to answer. Greedy at temperature 0; a sampled answer depends on `seed`, not on
    what runs beside it. `banned`: token sequences that it may not hold."""

    tokens: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class GenerationOutput:
    text: str  # without the end token or the stop string
    tokens: tuple[int, ...]
    finish_reason: Literal["end", "stop", "length"]
    prompt_tokens: int


# ---------------------------------------------------------------- outcome


@dataclass(frozen=True)
class Comparison:
    """One metric before and after on the same items: the difference is paired, its interval a
    bootstrap over items. `gains` and `losses`: items that got better or worse, where an item is
    right or wrong; `p` is McNemar's, exact."""

    task: str
    metric: str
    before: Score
    after: Score
    difference: float
    low: float
    high: float
    higher_is_better: bool
    improved: int | None = None
    worsened: int | None = None
    p_value: float | None = None
    # difference that so many items would have shown with a chance of 80%
    min_detectable: float | None = None


@dataclass(frozen=True)
class ScalePoint:
    """The trained adapter times `scale`: the held-out loss on `eval_data`, and the bits per byte of
    general text."""

    scale: float
    eval_loss: Score
    general_text: Score | None = None


@dataclass(frozen=True)
class RunRecord:
    """What a run amounts to; `record.json`. Everything here was measured in this run."""

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
    task_tokens: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # of `tokens`, those of a named task
    shared_tokens: int = 0  # of `tokens`, those that were computed in another document
    input_changes: tuple[
        str, ...
    ] = ()  # what had changed when the run was resumed with --allow-drift: field: was -> is
    kl_scores: tuple[
        Score, ...
    ] = ()  # how far from the model before: KL(before || after) in nats, top-1 agreement
    scales: tuple[
        ScalePoint, ...
    ] = ()  # gain against forgetting; empty without an adapter or eval_data
    rollbacks: tuple[Rollback, ...] = ()
    # whose weights the adapter has: of the best look at eval_data, else the last step
    selected_step: int | None = None
