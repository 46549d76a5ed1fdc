"""What a run takes in memory at its peak, by component and by phase, and on disk.

In: the shape of the model, the machine and the settings of the plan. Out: bytes. On several GPUs,
they are those of one: its shard of the weights, and the layers that are gathered at once. Left out:
what the forward saves for its backward (activations.py, counted by tests/fakecuda on a GPU that is
not there), and offloading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tunesmith.core.mesh import SINGLE_GPU, Machine, Mesh
from tunesmith.core.model_spec import ModelSpec, PartShape
from tunesmith.plan.activations import (
    ALL_LINEAR,
    EXPERTS,
    ActivationSettings,
    Targets,
    compute_saved_bytes,
    compute_temporary_bytes,
    count_recomputed_values,
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
BUILT_IN_TOKENS = 17_000  # of the general texts that ship
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
        """Return what decides the activations. Full fine-tuning reads the inputs of all linears."""
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
        """Return what a step holds, and answers do not."""
        return self.activations + self.head + self.fragments

    @property
    def peak(self) -> int:
        return sum(vars(self).values())

    @property
    def fixed(self) -> int:
        """Return what is there between two steps."""
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


# ---------------------------------------------------------------- a GPU

LOGIT_BYTES = 12  # three fp32 copies of each logit
TRITON_CHUNK_TARGETS = 2048  # as in model/lm_head.py
GATHERED_LAYERS = 2  # that which computes, and the next, or one that only another rank needs
CONTEXT_BYTES = 2**29  # CUDA and its libraries: .14 GiB on a T4, .5 on large cards
GPU_FRAGMENTATION_SHARE = 0.1  # of a step's temporary memory; 5 to 15% published
NCCL_BYTES = 10**9  # channels of NCCL and the contexts of other GPUs: assumed, not measured


def estimate_gpu_memory(
    spec: ModelSpec,
    run: Footprint,
    *,
    pack_tokens: int,
    cache: CacheSize = NO_CACHE,
    has_triton: bool = True,
    mesh: Mesh = SINGLE_GPU,
) -> MemoryParts:
    """Return the bytes of one GPU of the mesh, which has `pack_tokens` of a pack.

    `cache` is there while answers are generated, between steps. `has_triton` says whether our
    kernels run, or plain torch."""
    parts = estimate_fixed_memory(spec, run, layouts=1)
    if mesh.shard > 1:
        parts = _shard_parts(spec, run, mesh.shard, parts)
    norm_bytes = run.dtype_bytes if has_triton else 4
    settings = run.activation_settings._replace(norm_bytes=norm_bytes, is_gpu=True)
    saved, temporary = _estimate_activations(spec, settings)
    head = LOGIT_BYTES * min(pack_tokens, CHUNK_TARGETS) * spec.vocab_size
    if has_triton:  # which writes the gradients of the logits in their place
        head = run.dtype_bytes * min(pack_tokens, TRITON_CHUNK_TARGETS) * spec.vocab_size
    # the backward of the head is over before that of the layers begins
    activations = pack_tokens * saved + max(pack_tokens * temporary - head, 0)
    parts = dataclasses.replace(
        parts,
        context=CONTEXT_BYTES,
        nccl=NCCL_BYTES if mesh.num_gpus > 1 else 0,
        activations=activations,
        head=head,
        fragments=int(GPU_FRAGMENTATION_SHARE * (activations + head)),
    )
    # memory holds either the activations of a step or the KV cache of the answers
    cache_bytes = compute_cache_bytes(spec, cache, run.dtype_bytes)
    return dataclasses.replace(parts, cache=max(0, cache_bytes - parts.step))


def _shard_parts(spec: ModelSpec, run: Footprint, shard: int, parts: MemoryParts) -> MemoryParts:
    """Return the components of a GPU when `shard` GPUs hold the weights of the layers once.

    Adapters, and the embeddings and head below them, stay whole on each GPU. In full fine-tuning
    everything is sharded and gathered in fp32, matrices also in the dtype of the products.
    Gradients of a layer stay until the next one computes, those of the rest until the end."""
    rest_parameters = spec.parameters - spec.block_parameters
    gathered = GATHERED_LAYERS * _compute_gathered_bytes(spec, run)
    if run.method == "full":
        copy_bytes = run.dtype_bytes if run.dtype_bytes < MASTER_BYTES else 0
        gathered += rest_parameters * MASTER_BYTES + spec.head_parameters * copy_bytes
        layer_parameters = spec.block_parameters // spec.num_layers
        return dataclasses.replace(
            parts,
            weights=0,
            trained=parts.trained // shard,
            update=parts.update // shard,
            gathered=gathered + GRADIENT_BYTES * (layer_parameters + rest_parameters),
        )
    rest_bytes = rest_parameters * run.dtype_bytes
    block_bytes = compute_frozen_bytes(spec, run.method, run.dtype_bytes) - rest_bytes
    return dataclasses.replace(parts, weights=rest_bytes + block_bytes // shard, gathered=gathered)


def _compute_gathered_bytes(spec: ModelSpec, run: Footprint) -> int:
    """Return the bytes of a layer while it is gathered."""
    if run.method == "full":
        copy_bytes = run.dtype_bytes if run.dtype_bytes < MASTER_BYTES else 0
        return spec.block_parameters // spec.num_layers * (MASTER_BYTES + copy_bytes)
    rest_bytes = (spec.parameters - spec.block_parameters) * run.dtype_bytes
    frozen_bytes = compute_frozen_bytes(spec, run.method, run.dtype_bytes)
    return (frozen_bytes - rest_bytes) // spec.num_layers


def _estimate_activations(spec: ModelSpec, settings: ActivationSettings) -> tuple[int, int]:
    """Return the bytes per token that our layers save for the backward pass, and the most that one
    of them computes with. Of recomputed layers, the activations of one are in memory: at first
    of the last, which is not recomputed and gone when the others are."""
    saved = compute_saved_bytes(spec, settings)
    temporary = compute_temporary_bytes(spec, settings.dtype_bytes)
    if settings.checkpointing == "selective":
        recomputed_bytes = count_recomputed_values(spec) * settings.dtype_bytes
        temporary += recomputed_bytes // spec.num_layers
    return saved, temporary


# ---------------------------------------------------------------- answers and phases

MIN_COMPLETE_TOKENS = 256  # the default of lm-eval's max_gen_toks
# by these, an answer longer than expected is wrong wherever it ends, or none is graded
_OF_LABELS = ("accuracy", "macro_f1", "multiple_choice")
LENGTH_INDEPENDENT_METRICS = (*_OF_LABELS, "exact_match", "normalized_match", "bits_per_byte")
# answers generated at once, and the largest KV cache, as in model/generation/engine.py
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
BLOCK_TOKENS = 64  # rows of the cache grow to a multiple of this, as in model/paged_cache.py
# the usual rule of thumb, relative to the size of the model
USUAL_MULTIPLES = {"full": "x4 to x12", "lora": "x1.5", "qlora": "x1.5"}


def needs_complete_answers(metrics: Sequence[str], *, has_constraints: bool) -> bool:
    """Return whether the end of an answer may change a grade when it is longer than expected.

    A constraint may be violated late."""
    return has_constraints or not set(metrics) <= set(LENGTH_INDEPENDENT_METRICS)


def compute_answer_limit(expected_tokens: float, *, needs_end: bool) -> int:
    """Return the new tokens that an answer may have, given those of the longest expected answer.

    needs_end: answers longer than expected need room to end, or their grades say nothing."""
    limit = math.ceil(1.5 * expected_tokens) + 16
    return max(limit, MIN_COMPLETE_TOKENS) if needs_end else limit


def estimate_cache(
    spec: ModelSpec,
    machine: Machine,
    *,
    num_prompts: int,
    longest: int,
    answer_share: float,
    needs_end: bool,
    dtype: str,
) -> CacheSize:
    """Return what the KV cache has room for while answers are generated.

    `answer_share` is the fraction of a row's tokens that are its answer; see
    `compute_answer_limit` for `needs_end`. All rows have the room of the longest one."""
    answer_tokens = answer_share * longest
    limit = compute_answer_limit(answer_tokens, needs_end=needs_end)
    row_tokens = min(int(longest - answer_tokens) + limit, max(longest, spec.context_length))
    row_bytes = compute_cache_bytes(spec, CacheSize(1, row_tokens), get_dtype_bytes(dtype))
    fitting_rows = max(1, CACHE_BYTES[machine.device] // max(1, row_bytes))
    rows = min(MAX_BATCH_ROWS[machine.device], num_prompts, fitting_rows)
    return CacheSize(rows, rows * math.ceil(row_tokens / BLOCK_TOKENS) * BLOCK_TOKENS)


def estimate_phase_bytes(
    parts: MemoryParts, longest_row: MemoryParts, spec: ModelSpec, *, cache: CacheSize, dtype: str
) -> dict[str, int]:
    """Return the peak memory of a step, of the longest row alone, and of generating answers.

    `parts` and `longest_row` are those of the two packs."""
    phase_bytes = {
        "step": parts.peak - parts.cache,
        "longest row": longest_row.peak - longest_row.cache,
    }
    if cache.rows:
        cache_bytes = compute_cache_bytes(spec, cache, get_dtype_bytes(dtype))
        phase_bytes["generation"] = parts.fixed + cache_bytes
    return phase_bytes


def compute_multiple(spec: ModelSpec, peak_bytes: int) -> float:
    """Return a peak relative to the size of the 16-bit weights."""
    return peak_bytes / (2 * spec.parameters)


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
