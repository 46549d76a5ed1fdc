"""What a run takes in main memory at its peak, by component, and on disk.

In: the shape of the model and the settings of the plan. Out: bytes. Left out: what the forward
saves for its backward (activations.py), and a correction from earlier runs
(session/run_history.py)."""

from __future__ import annotations

from typing import Literal, NamedTuple, NotRequired, TypedDict, Unpack

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
MASTER_BYTES = 4  # of a trained weight
# 4 bits per weight, one byte per block of 64, 4 bytes per 256 blocks
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
MXFP4_BYTES = 0.5 + 1 / 32  # 4 bits per weight, one byte per group of 32
RETAINED_CHECKPOINTS = 2  # as core/run_dir.py keeps them
GENERAL_TEXT_TOKENS = 100_000  # of retention_data that are measured, at most
Method = Literal["lora", "qlora", "full"]


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


class ModelFootprint(TypedDict):
    """The settings that decide what a run takes apart from its packs."""

    method: Method
    dtype: str
    rank: int
    targets: NotRequired[Targets]  # of the adapter; all linears
    dora: NotRequired[bool]
    new_rows: NotRequired[int]  # trained rows of new tokens, in embedding and head
    module_parameters: NotRequired[int]  # of modules trained in full beside the adapter
    optim: NotRequired[str]
    gradient_checkpointing: NotRequired[str]
    step_in_backward: NotRequired[bool]  # keeps only the gradient of the largest tensor


def estimate_peak_memory(
    spec: ModelSpec,
    *,
    pack_tokens: int,
    packs: int = 1,
    layouts: int = 1,
    has_evaluation: bool = True,
    **footprint: Unpack[ModelFootprint],
) -> dict[str, int]:
    """Return bytes by component, with "peak".

    `packs` is the number of packs in the run, each of a different size; `layouts` how many copies
    of the frozen matrices are kept (model/frozen_weight.py). 4-bit weights and 8-bit moments are
    dequantized one at a time."""
    is_bf16 = footprint["dtype"] == "bf16"
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    saved = estimate_activation_bytes(spec, pack_tokens, collect_settings(**footprint))
    # fp32 matmuls are not oneDNN's, and their loss has temporaries
    kernel_bytes = KERNEL_BYTES * min(packs, MAX_KERNEL_SIZES)
    kernel_bytes += EXPERT_KERNEL_BYTES * bool(spec.num_experts)
    logit_bytes = CHUNK_TARGETS * spec.vocab_size * dtype_bytes
    parts = {
        "process": PROCESS_BYTES,
        **estimate_fixed_memory(spec, layouts=layouts, **footprint),
        "activations": saved,
        "fragments": int(saved * FRAGMENTATION_SHARE),
        "kernels": kernel_bytes if is_bf16 else 0,
        "evaluation": EVALUATION_BYTES if has_evaluation else 0,
        "head": logit_bytes if is_bf16 else 4 * logit_bytes,
    }
    return parts | {"peak": sum(parts.values())}


def collect_settings(**footprint: Unpack[ModelFootprint]) -> ActivationSettings:
    """Return what decides the activations. Full fine-tuning reads the inputs of all linears."""
    return ActivationSettings(
        dtype_bytes=get_dtype_bytes(footprint["dtype"]),
        targets=footprint.get("targets", ALL_LINEAR),
        use_dora=footprint.get("dora", False),
        checkpointing=footprint.get("gradient_checkpointing", "none"),
    )


def estimate_fixed_memory(
    spec: ModelSpec, *, layouts: int, **footprint: Unpack[ModelFootprint]
) -> dict[str, int]:
    """Return the bytes by component that do not depend on the packs."""
    method = footprint["method"]
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    # adapted layers alone have a second copy, and experts are not among them
    block_bytes = (spec.block_parameters - spec.expert_parameters) * dtype_bytes
    weight_bytes = (layouts - 1) * block_bytes
    if method != "full":
        weight_bytes += compute_frozen_bytes(spec, method, dtype_bytes)
    elif dtype_bytes == 2:  # bf16 copies of the fp32 master weights
        weight_bytes += block_bytes
    dequantized_bytes = 2 * spec.hidden_size * spec.intermediate_size * dtype_bytes
    state_bytes = 4 + compute_moment_bytes(**footprint)  # master weight and moments
    trained_bytes = int(count_trained_parameters(spec, **footprint) * state_bytes)
    return {
        "weights": weight_bytes,
        "widened": dequantized_bytes if method == "qlora" or spec.packed_parameters else 0,
        "trained": trained_bytes + _estimate_gradient_bytes(spec, **footprint),
        "update": _estimate_update_bytes(spec, **footprint),
    }


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


def count_trained_parameters(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    if footprint["method"] == "full":
        return spec.parameters
    targets = footprint.get("targets", ALL_LINEAR)
    num_trained = count_lora_parameters(spec, footprint["rank"], targets)
    num_trained += footprint.get("new_rows", 0) * spec.hidden_size
    num_trained += footprint.get("module_parameters", 0)
    if footprint.get("dora"):
        num_trained += count_dora_magnitudes(spec, targets)
    return num_trained


def _estimate_gradient_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """Return the bytes of gradients in fp32."""
    if footprint.get("step_in_backward"):
        return 4 * spec.vocab_size * spec.hidden_size
    return 4 * count_trained_parameters(spec, **footprint)


def compute_moment_bytes(**footprint: Unpack[ModelFootprint]) -> float:
    """Return the bytes of Adam's two moments per trained weight."""
    return 2 * (1 + 4 / 256) if footprint.get("optim") == "adamw_8bit" else 8


def _estimate_update_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """Return the bytes of dequantized moments and temporaries of the largest tensors."""
    largest = spec.vocab_size * spec.hidden_size if footprint["method"] == "full" else 0
    update = 4 * 4 * largest if footprint.get("optim") == "adamw_8bit" else 0
    matrix = spec.vocab_size * spec.hidden_size
    has_trained_matrix = footprint.get("module_parameters", 0) >= matrix
    # measured: the gradient of an embedding or a head is summed through three fp32 copies
    return update + (3 * 4 * matrix if has_trained_matrix else 0)


# ---------------------------------------------------------------- disk


def estimate_disk_bytes(
    spec: ModelSpec,
    *,
    checkpoints: int,
    cached_tokens: int = 0,
    **footprint: Unpack[ModelFootprint],
) -> int:
    """Return the bytes of the run folder at its largest.

    A checkpoint has each trained weight in fp32 and its moments. The final weights are smaller, and
    written when no checkpoint is. Events, results and tokenizer files, a few megabytes, are left
    out. See `count_max_checkpoints` and `estimate_base_states_bytes`."""
    state_bytes = 4 + compute_moment_bytes(**footprint)
    checkpoint_bytes = int(count_trained_parameters(spec, **footprint) * state_bytes)
    base_states_bytes = estimate_base_states_bytes(spec, cached_tokens, **footprint)
    return checkpoints * checkpoint_bytes + base_states_bytes


def count_max_checkpoints(*, steps: int, save_steps: int, eval_steps: int | None) -> int:
    """Return the largest number of checkpoints at one time, which the run can actually write.

    Kept are the newest two, the last good one, the best one if there is eval_data (`eval_steps`),
    and the one being written. Written are those that are due, the best at each evaluation, and that
    of an interrupt."""
    written = 1 + (steps - 1) // save_steps
    if eval_steps:
        written += (steps - 1) // eval_steps
    return min(RETAINED_CHECKPOINTS + 1 + bool(eval_steps) + 1, written)


def estimate_base_states_bytes(
    spec: ModelSpec, tokens: int, **footprint: Unpack[ModelFootprint]
) -> int:
    """Return the bytes of the base's final hidden states on the evaluated tokens, and of its head
    if it is trained. They are kept when no switch brings the base back."""
    if not tokens:
        return 0
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    has_trained_head = footprint["method"] == "full" or footprint.get("new_rows")
    head_rows = spec.vocab_size if has_trained_head else 0
    return (tokens + head_rows) * dtype_bytes * spec.hidden_size
