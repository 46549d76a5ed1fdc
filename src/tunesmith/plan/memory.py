"""What a training run holds in memory at its peak, component by component, before anything is
loaded.

In: the model's shape and the plan's values. Out: bytes by component, with "peak". The saved
activations are those of our own layers (model/layers.py): per token and layer 4 H (two norm inputs,
two norm outputs), 2 Q + 2 KV (q, k, v and the attention's output) and 2 F (gate and up); where a
family norms more, the inputs of those norms. Left out: a correction from measured runs."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict, Unpack

from tunesmith.core.types import ModelSpec

# python, torch and transformers imported (480 MB), what the first products leave
PROCESS_BYTES = 560_000_000
KERNEL_BYTES, MAX_KERNEL_SIZES = (
    3_000_000,
    100,
)  # code that oneDNN makes for a pack of a new size, and keeps; then parts come back
# of the activations: room in the heap that is free and of no use; measured, docs/guides/plan.md
FRAGMENTATION_SHARE = 0.2
# what is measured, held through the run, and what measuring leaves in the heap
EVALUATION_BYTES = 60_000_000
CHUNK_TARGETS = 128
OUTPUT_NORM_TYPES, QK_NORM_TYPES = (
    ("gemma2", "gemma3"),
    ("qwen3", "gemma3"),
)  # of attention and MLP; q and k
NF4_BYTES = (
    0.5 + (1 + 4 / 256) / 64
)  # a weight of 4 bits, a byte a block of 64, 4 bytes for 256 of those
Method = Literal["lora", "qlora", "full"]


def count_lora_parameters(spec: ModelSpec, rank: int) -> int:
    """Adapters on all linear layers: rank * (inputs + outputs) of each."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    h, f = spec.hidden_size, spec.intermediate_size
    return spec.num_layers * rank * ((h + q) + 2 * (h + kv) + (q + h) + 3 * (h + f))


def count_dora_magnitudes(spec: ModelSpec) -> int:
    """DoRA's on all linear layers: one for each output."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return spec.num_layers * (q + 2 * kv + 2 * spec.hidden_size + 2 * spec.intermediate_size)


def estimate_activation_bytes(
    spec: ModelSpec,
    tokens: int,
    dtype_bytes: int,
    *,
    checkpointing: str = "none",
    use_dora: bool = False,
) -> int:
    """Saved for the backward of one pack, plus the temporaries of the widest layer. DoRA also keeps
    the outputs of the attention and of the MLP. `selective` leaves out gate and up, `recompute`
    keeps the inputs of all layers but one."""
    q, kv, layers = (
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
        spec.num_layers,
    )
    mlp = 2 * spec.intermediate_size
    layer_values = (6 if use_dora else 4) * spec.hidden_size + 2 * q + 2 * kv + mlp
    layer_values += 2 * spec.hidden_size * spec.model_type.startswith(OUTPUT_NORM_TYPES)
    layer_values += (q + kv) * spec.model_type.startswith(QK_NORM_TYPES)
    saved = {
        "none": layers * layer_values,
        "selective": layers * (layer_values - mlp),
        "full": layers * spec.hidden_size + layer_values,
    }[checkpointing]
    temporary = 6 * spec.intermediate_size
    return tokens * (saved + temporary) * dtype_bytes


class ModelFootprint(TypedDict):
    """What a run takes, apart from its packs. Some may be left out."""

    method: Method
    dtype: str
    rank: int
    dora: NotRequired[bool]
    new_rows: NotRequired[int]  # of new tokens, in embedding and head
    optim: NotRequired[str]
    gradient_checkpointing: NotRequired[str]
    step_in_backward: NotRequired[bool]  # no gradient is kept but that of the largest tensor


def estimate_peak_memory(
    spec: ModelSpec,
    *,
    pack_tokens: int,
    packs: int = 1,
    layouts: int = 1,
    has_evaluation: bool = True,
    **footprint: Unpack[ModelFootprint],
) -> dict[str, int]:
    """Bytes by component. `packs`: of the run, each of a size of its own. `layouts`: in how many
    the frozen matrices are kept (model/frozen.py). Those in 4 bits are widened one by one, and so
    are moments in 8 bits. `measured`: there are rows to measure on before the run."""
    dtype_bytes, use_dora = 2 if footprint["dtype"] == "bf16" else 4, footprint.get("dora", False)
    saved = estimate_activation_bytes(
        spec,
        pack_tokens,
        dtype_bytes,
        checkpointing=footprint.get("gradient_checkpointing", "none"),
        use_dora=use_dora,
    )
    parts = {
        "process": PROCESS_BYTES,
        **estimate_fixed_memory(spec, layouts=layouts, **footprint),
        "activations": saved,
        "fragments": int(saved * FRAGMENTATION_SHARE),
        "kernels": KERNEL_BYTES * min(packs, MAX_KERNEL_SIZES)
        if dtype_bytes == 2
        else 0,  # products in fp32 are not oneDNN's
        "evaluation": EVALUATION_BYTES if has_evaluation else 0,
        "head": CHUNK_TARGETS * spec.vocab_size * dtype_bytes * (1 if dtype_bytes == 2 else 4),
    }
    return parts | {"peak": sum(parts.values())}


def estimate_fixed_memory(
    spec: ModelSpec, *, layouts: int, **footprint: Unpack[ModelFootprint]
) -> dict[str, int]:
    """What does not depend on the packs."""
    method, dtype_bytes = footprint["method"], 2 if footprint["dtype"] == "bf16" else 4
    matrices = spec.block_parameters * (NF4_BYTES if method == "qlora" else dtype_bytes)
    frozen = (
        0
        if method == "full"
        else int(matrices) + (spec.parameters - spec.block_parameters) * dtype_bytes
    )
    narrow_copies = (
        spec.block_parameters * dtype_bytes if method == "full" and dtype_bytes == 2 else 0
    )
    return {
        "weights": frozen + (layouts - 1) * spec.block_parameters * dtype_bytes + narrow_copies,
        "widened": 2 * spec.hidden_size * spec.intermediate_size * dtype_bytes
        if method == "qlora"
        else 0,
        "trained": int(
            count_trained_parameters(spec, **footprint) * (4 + compute_moment_bytes(**footprint))
        )
        + _estimate_gradient_bytes(spec, **footprint),
        "update": _estimate_update_bytes(spec, **footprint),
    }


def count_trained_parameters(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    if footprint["method"] == "full":
        return spec.parameters
    rows = footprint.get("new_rows", 0) * spec.hidden_size
    return (
        count_lora_parameters(spec, footprint["rank"])
        + (count_dora_magnitudes(spec) if footprint.get("dora") else 0)
        + rows
    )


def _estimate_gradient_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """In fp32."""
    num_gradients = (
        spec.vocab_size * spec.hidden_size
        if footprint.get("step_in_backward")
        else count_trained_parameters(spec, **footprint)
    )
    return 4 * num_gradients


def compute_moment_bytes(**footprint: Unpack[ModelFootprint]) -> float:
    """Adam's two of each trained weight, beside 4 bytes for an fp32 master and 4 for its
    gradient."""
    return 2 * (1 + 4 / 256) if footprint.get("optim") == "adamw_8bit" else 8


def _estimate_update_bytes(spec: ModelSpec, **footprint: Unpack[ModelFootprint]) -> int:
    """Both moments of the largest tensor in fp32, and two temporaries."""
    largest = spec.vocab_size * spec.hidden_size if footprint["method"] == "full" else 0
    return 4 * 4 * largest if footprint.get("optim") == "adamw_8bit" else 0
