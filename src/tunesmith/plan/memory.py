"""What a run takes in main memory at its peak, by component, and on disk.

In: the shape of the model and the settings of the plan. Out: bytes. Left out: what the forward
saves for its backward (activations.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tunesmith.core.model_spec import ModelSpec, PartShape
from tunesmith.plan.activations import (
    ALL_LINEAR,
    EXPERTS,
    ActivationSettings,
    Targets,
    estimate_activation_bytes,
)

# python, torch and transformers imported (480 MB), what the first matmuls leave (80 MB) and what
# the comparison with transformers before step 1 leaves
PROCESS_BYTES = 630_000_000
# code that oneDNN compiles for each new pack size, and caches up to this many sizes. It is a third
# of that where matmul.c multiplies with frozen weights, which a plan does not know
KERNEL_BYTES = 3_000_000
MAX_KERNEL_SIZES = 100
# the same of experts: each gets another number of tokens in every pack; measured with 16
EXPERT_KERNEL_BYTES = 200_000_000
# unusable free heap, relative to the activations; measured, docs/guides/plan.md
FRAGMENTATION_SHARE = 0.2
# what evaluation keeps through the run and leaves in the heap
EVALUATION_BYTES = 60_000_000
CHUNK_TARGETS = 128  # targets whose logits are computed at once
MAX_HEAD_COPY_BYTES = 2**29  # of the second copy of the head, as in model/lm_head.py
MASTER_BYTES = 4  # of a trained weight
GRADIENT_BYTES = 4
# 4 bits per weight, one byte per block of 64, 4 bytes per 256 blocks
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
MXFP4_BYTES = 0.5 + 1 / 32  # 4 bits per weight, one byte per group of 32
RETAINED_CHECKPOINTS = 2  # as core/run_dir.py keeps them
GENERAL_TEXT_TOKENS = 100_000  # of retention_data that are measured, at most
Method = Literal["lora", "qlora", "full"]
PART_NAMES = {"nccl": "NCCL", "cache": "KV cache"}  # in plan.json


def count_lora_parameters(spec: ModelSpec, rank: int, targets: Targets = ALL_LINEAR) -> int:
    """Return the parameters of adapters: rank * (inputs + outputs) of each linear.

    Names and expressions count as all linears but those of experts."""
    return rank * sum(part.inputs + part.outputs for part in _list_parts(spec, targets))


def count_dora_magnitudes(spec: ModelSpec, targets: Targets = ALL_LINEAR) -> int:
    """Return DoRA's magnitudes: one per output of each linear."""
    return sum(part.outputs for part in _list_parts(spec, targets))


def _list_parts(spec: ModelSpec, targets: Targets) -> list[PartShape]:
    """Return the parts of the layers that `lora_target_modules` names."""
    words = {targets} if isinstance(targets, str) else set(targets)
    if not words <= spec.parts.keys():  # all-linear, or names of layers
        words |= spec.parts.keys() - {EXPERTS}
    return [part for word, part in spec.parts.items() if word in words]


class CacheSize(NamedTuple):
    """The rows that are generated side by side, and the tokens that they have room for."""

    rows: int
    tokens: int


NO_CACHE = CacheSize(0, 0)


def compute_cache_bytes(spec: ModelSpec, cache: CacheSize, dtype_bytes: int) -> int:
    """Return the bytes of keys and values, and of the states of recurrent layers."""
    token_bytes = spec.cache_values * dtype_bytes
    row_bytes = 0
    if spec.recurrent is not None:
        layers = spec.parts["recurrent"].layers
        row_bytes = layers * spec.recurrent.compute_state_bytes(dtype_bytes)
    return cache.tokens * token_bytes + cache.rows * row_bytes


@dataclass(frozen=True)
class Footprint:
    """The settings that decide what a run takes apart from its packs."""

    method: Method
    dtype: str
    rank: int = 0  # of the adapter
    targets: Targets = ALL_LINEAR
    use_dora: bool = False
    new_rows: int = 0  # trained rows of new tokens, in embedding and head
    module_parameters: int = 0  # of modules trained in full beside the adapter
    optim: str = "adamw"
    gradient_checkpointing: str = "none"
    step_in_backward: bool = False  # keeps only the gradient of the largest tensor

    @property
    def dtype_bytes(self) -> int:
        return get_dtype_bytes(self.dtype)

    @property
    def moment_bytes(self) -> float:
        """Bytes of Adam's two moments per trained weight."""
        return 2 * (1 + 4 / 256) if self.optim == "adamw_8bit" else 8

    @property
    def activation_settings(self) -> ActivationSettings:
        """What decides the activations. Full fine-tuning reads the inputs of all linears."""
        return ActivationSettings(
            self.dtype_bytes, self.targets, self.use_dora, checkpointing=self.gradient_checkpointing
        )


@dataclass(frozen=True)
class MemoryParts:
    """The bytes of one device at the peak of a run, by component."""

    process: int = 0
    context: int = 0  # CUDA and its libraries
    nccl: int = 0
    weights: int = 0  # frozen, and low-precision copies of trained ones
    widened: int = 0  # dequantized
    gathered: int = 0  # of sharded weights, and the gradients that are not yet summed
    trained: int = 0  # with gradients and moments
    update: int = 0  # temporaries of the optimizer
    kernels: int = 0
    evaluation: int = 0
    activations: int = 0
    head: int = 0  # logits
    fragments: int = 0
    cache: int = 0  # of answers: what it takes beyond a step

    @property
    def step(self) -> int:
        """What a step holds, and answers do not."""
        return self.activations + self.head + self.fragments

    @property
    def peak(self) -> int:
        return sum(vars(self).values())

    @property
    def fixed(self) -> int:
        """What is there between two steps."""
        return self.peak - self.step - self.cache

    def to_dict(self) -> dict[str, int]:
        """Return the components that a plan stores, and "peak"."""
        parts = {PART_NAMES.get(name, name): size for name, size in vars(self).items() if size}
        return parts | {"peak": self.peak}


def estimate_peak_memory(
    spec: ModelSpec,
    run: Footprint,
    *,
    pack_tokens: int,
    packs: int = 1,
    layouts: int = 1,
    has_evaluation: bool = True,
    cache: CacheSize = NO_CACHE,
) -> MemoryParts:
    """Return the bytes on a CPU.

    `packs` is the number of packs in the run, each of a different size; `layouts` how many copies
    of the frozen matrices are kept (model/frozen_weight.py). 4-bit weights and 8-bit moments are
    dequantized one at a time."""
    saved = estimate_activation_bytes(spec, pack_tokens, run.activation_settings)
    # fp32 matmuls are not oneDNN's, and their loss has temporaries
    is_bf16 = run.dtype == "bf16"
    kernel_bytes = KERNEL_BYTES * min(packs, MAX_KERNEL_SIZES)
    kernel_bytes += EXPERT_KERNEL_BYTES * bool(spec.num_experts)
    logit_bytes = CHUNK_TARGETS * spec.vocab_size * run.dtype_bytes
    parts = dataclasses.replace(
        estimate_fixed_memory(spec, run, layouts=layouts),
        process=PROCESS_BYTES,
        activations=saved,
        fragments=int(saved * FRAGMENTATION_SHARE),
        kernels=kernel_bytes if is_bf16 else 0,
        evaluation=EVALUATION_BYTES if has_evaluation else 0,
        head=logit_bytes if is_bf16 else 4 * logit_bytes,
    )
    # memory holds either the activations of a step or the KV cache of the answers
    cache_bytes = compute_cache_bytes(spec, cache, run.dtype_bytes)
    head_bytes = spec.vocab_size * spec.hidden_size * 2
    if cache.rows and is_bf16 and head_bytes <= MAX_HEAD_COPY_BYTES:
        cache_bytes += head_bytes
    return dataclasses.replace(parts, cache=max(0, cache_bytes - parts.step))


def estimate_fixed_memory(spec: ModelSpec, run: Footprint, *, layouts: int) -> MemoryParts:
    """Return the bytes of weights, gradients and moments, which do not depend on the packs."""
    # adapted layers alone have a second copy, and experts are not among them
    block_bytes = (spec.block_parameters - spec.expert_parameters) * run.dtype_bytes
    weight_bytes = (layouts - 1) * block_bytes
    if run.method != "full":
        weight_bytes += compute_frozen_bytes(spec, run.method, run.dtype_bytes)
    elif run.dtype_bytes == 2:  # bf16 copies of the fp32 master weights
        weight_bytes += block_bytes
    dequantized_bytes = 2 * spec.hidden_size * spec.intermediate_size * run.dtype_bytes
    num_trained = count_trained_parameters(spec, run)
    num_gradients = spec.vocab_size * spec.hidden_size if run.step_in_backward else num_trained
    state_bytes = int(num_trained * (MASTER_BYTES + run.moment_bytes))
    return MemoryParts(
        weights=weight_bytes,
        widened=dequantized_bytes if run.method == "qlora" or spec.packed_parameters else 0,
        trained=state_bytes + GRADIENT_BYTES * num_gradients,
        update=_estimate_update_bytes(spec, run),
    )


def get_dtype_bytes(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def compute_frozen_bytes(spec: ModelSpec, method: str, dtype_bytes: int) -> int:
    """Return the bytes of the weights below an adapter: experts in MXFP4 stay so, and QLoRA holds
    the other matrices of the layers in 4 bits."""
    wide_parameters = spec.block_parameters - spec.packed_parameters
    rest_bytes = (spec.parameters - spec.block_parameters) * dtype_bytes
    weight_bytes = NF4_BYTES if method == "qlora" else dtype_bytes
    packed_bytes = spec.packed_parameters * MXFP4_BYTES
    return rest_bytes + int(wide_parameters * weight_bytes + packed_bytes)


def count_trained_parameters(spec: ModelSpec, run: Footprint) -> int:
    if run.method == "full":
        return spec.parameters
    num_trained = count_lora_parameters(spec, run.rank, run.targets)
    num_trained += run.new_rows * spec.hidden_size + run.module_parameters
    return num_trained + count_dora_magnitudes(spec, run.targets) * run.use_dora


def _estimate_update_bytes(spec: ModelSpec, run: Footprint) -> int:
    """Return the bytes of dequantized moments and temporaries of the largest tensors."""
    matrix = spec.vocab_size * spec.hidden_size
    has_wide_moments = run.method == "full" and run.optim == "adamw_8bit"
    # measured: the gradient of an embedding or a head is summed through three fp32 copies
    has_trained_matrix = run.module_parameters >= matrix
    return 4 * 4 * matrix * has_wide_moments + 3 * 4 * matrix * has_trained_matrix


# ---------------------------------------------------------------- disk


def estimate_disk_bytes(
    spec: ModelSpec, run: Footprint, *, checkpoints: int, cached_tokens: int = 0
) -> int:
    """Return the bytes of the run folder at its largest.

    A checkpoint has each trained weight in fp32 and its moments. The final weights are smaller, and
    written when no checkpoint is. Events, results and tokenizer files, a few megabytes, are left
    out. See `count_max_checkpoints` and `_estimate_base_states_bytes`."""
    state_bytes = MASTER_BYTES + run.moment_bytes
    checkpoint_bytes = int(count_trained_parameters(spec, run) * state_bytes)
    return checkpoints * checkpoint_bytes + _estimate_base_states_bytes(spec, run, cached_tokens)


def count_max_checkpoints(*, steps: int, save_steps: int, eval_steps: int | None) -> int:
    """Return the largest number of checkpoints at one time, which the run can actually write.

    Kept are the newest two, the last good one, the best one if there is eval_data (`eval_steps`),
    and the one being written. Written are those that are due, the best at each evaluation, and that
    of an interrupt."""
    written = 1 + (steps - 1) // save_steps
    if eval_steps:
        written += (steps - 1) // eval_steps
    return min(RETAINED_CHECKPOINTS + 1 + bool(eval_steps) + 1, written)


def _estimate_base_states_bytes(spec: ModelSpec, run: Footprint, tokens: int) -> int:
    """Return the bytes of the base's final hidden states on the evaluated tokens, and of its head
    if it is trained. They are kept when no switch brings the base back."""
    if not tokens:
        return 0
    head_rows = spec.vocab_size if run.method == "full" or run.new_rows else 0
    return (tokens + head_rows) * run.dtype_bytes * spec.hidden_size
