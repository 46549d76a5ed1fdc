"""What a run takes in the memory of a GPU at its peak, by component.

In: the shape of the model and the settings of the plan. Out: bytes by component, with "peak". The
formulas are those of published component models, checked against published peaks of other trainers
(tests/unit/plan/test_memory_gpu.py), each with its own GpuSoftware. Our own activations are those
of plan/memory.py, and counted on a GPU that is not there (tests/fakecuda). On several GPUs, bytes
are those of one: its shard of the weights, and the layers that are gathered at once. Left out:
offloading, paged optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.mesh import SINGLE_GPU, Mesh
from tunesmith.core.types import ModelSpec
from tunesmith.plan.activations import (
    EXPERTS,
    NO_PART,
    ActivationSettings,
    compute_saved_bytes,
    compute_temporary_bytes,
    count_recomputed_values,
)
from tunesmith.plan.memory import (
    CHUNK_TARGETS,
    MASTER_BYTES,
    NF4_BYTES,
    NO_CACHE,
    CacheSize,
    collect_settings,
    compute_cache_bytes,
    compute_frozen_bytes,
    count_trained_parameters,
    estimate_fixed_memory,
    get_dtype_bytes,
)

LOGIT_BYTES = 12  # three fp32 copies of each logit
TRITON_CHUNK_TARGETS = 2048  # as in model/lm_head.py
GATHERED_LAYERS = 2  # that which computes, and the next, or one that only another rank needs
FSDP_LAYERS = 3  # that which computes, the next one, and the buffer that gathers it
NCCL_BYTES = 10**9  # channels of NCCL and the contexts of other GPUs: assumed, not measured


@dataclass(frozen=True)
class GpuSoftware:
    """The memory that a trainer needs; the first four are bytes per weight."""

    adapter_bytes: float = 16  # of an adapter, with gradient and two moments, in fp32
    trained_bytes: float = 16  # in full fine-tuning
    quantized_bytes: float = NF4_BYTES  # of 4-bit weights
    rest_bytes: float = 2  # of embeddings, head and norms, with 4-bit weights
    saved_share: float = 1  # of what the modules of a layer save; .58 with torch.compile
    logit_tokens: int = CHUNK_TARGETS  # tokens whose logits are in memory at once
    logit_bytes: int = LOGIT_BYTES
    context_bytes: int = 2**29  # CUDA and its libraries: .14 GiB on a T4, .5 on large cards
    fragmentation_share: float = 0.1  # of a step's temporary memory; 5 to 15% published
    nccl_bytes: int = NCCL_BYTES


def estimate_gpu_memory(
    spec: ModelSpec,
    *,
    pack_tokens: int,
    software: GpuSoftware | None = None,
    cache: CacheSize = NO_CACHE,
    has_triton: bool = True,
    mesh: Mesh = SINGLE_GPU,
    **footprint: Any,
) -> dict[str, int]:
    """Return bytes by component, of one GPU of the mesh, which has `pack_tokens` of a pack.

    `cache` is there while answers are generated, between steps. `has_triton` says whether our
    kernels run, or plain torch. `software` describes another trainer, which has no low-precision
    copies of what it trains."""
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    policy = footprint.get("gradient_checkpointing", "none")
    if software is None:
        software = GpuSoftware()
        if has_triton:  # which writes the gradients of the logits in their place
            software = GpuSoftware(logit_tokens=TRITON_CHUNK_TARGETS, logit_bytes=dtype_bytes)
        fixed_parts = estimate_fixed_memory(spec, layouts=1, **footprint)
        if mesh.shard > 1:
            fixed_parts |= _estimate_sharded(spec, mesh.shard, fixed_parts, **footprint)
        settings = collect_settings(**footprint)._replace(
            norm_bytes=dtype_bytes if has_triton else 4, is_gpu=True
        )
        saved, temporary = _estimate_our_activations(spec, settings)
        activations = pack_tokens * saved
        temporary_bytes = pack_tokens * temporary
    else:
        fixed_parts = _estimate_other_trainer(spec, software, mesh.shard, **footprint)
        activations, temporary_bytes = _estimate_activations(
            spec, pack_tokens, dtype_bytes, software, policy
        )
    parts = {"context": software.context_bytes, **fixed_parts}
    if mesh.num_gpus > 1:
        parts["NCCL"] = software.nccl_bytes
    head = software.logit_bytes * min(pack_tokens, software.logit_tokens) * spec.vocab_size
    # the backward of the head is over before that of the layers begins
    parts["activations"] = activations + max(temporary_bytes - head, 0)
    parts["head"] = head
    parts["fragments"] = int(software.fragmentation_share * (parts["activations"] + head))
    step_bytes = parts["activations"] + parts["head"] + parts["fragments"]
    # memory holds either the activations of a step or the KV cache of the answers
    parts["KV cache"] = max(0, compute_cache_bytes(spec, cache, dtype_bytes) - step_bytes)
    return parts | {"peak": sum(parts.values())}


def _estimate_sharded(
    spec: ModelSpec, shard: int, fixed_parts: dict[str, int], **footprint: Any
) -> dict[str, int]:
    """Return the components that change when `shard` GPUs hold the weights of the layers once.

    Adapters, and the embeddings and head below them, stay whole on each GPU. In full fine-tuning
    everything is sharded and gathered in fp32, matrices also in the dtype of the products.
    Gradients of a layer stay until the next one computes, those of the rest until the end."""
    dtype_bytes = get_dtype_bytes(footprint["dtype"])
    method: str = footprint["method"]
    rest_parameters = spec.parameters - spec.block_parameters
    gathered = GATHERED_LAYERS * compute_gathered_bytes(spec, method, dtype_bytes)
    if method == "full":
        copy_bytes = dtype_bytes if dtype_bytes < MASTER_BYTES else 0
        gathered += rest_parameters * MASTER_BYTES + spec.head_parameters * copy_bytes
        layer_parameters = spec.block_parameters // spec.num_layers
        return {
            "weights": 0,
            "trained": fixed_parts["trained"] // shard,
            "update": fixed_parts["update"] // shard,
            "gathered": gathered + MASTER_BYTES * (layer_parameters + rest_parameters),
        }
    rest_bytes = rest_parameters * dtype_bytes
    block_bytes = compute_frozen_bytes(spec, method, dtype_bytes) - rest_bytes
    return {"weights": rest_bytes + block_bytes // shard, "gathered": gathered}


def compute_gathered_bytes(spec: ModelSpec, method: str, dtype_bytes: int) -> int:
    """Return the bytes of a layer while it is gathered."""
    if method == "full":
        copy_bytes = dtype_bytes if dtype_bytes < MASTER_BYTES else 0
        return spec.block_parameters // spec.num_layers * (MASTER_BYTES + copy_bytes)
    rest_bytes = (spec.parameters - spec.block_parameters) * dtype_bytes
    return (compute_frozen_bytes(spec, method, dtype_bytes) - rest_bytes) // spec.num_layers


def _estimate_our_activations(spec: ModelSpec, settings: ActivationSettings) -> tuple[int, int]:
    """Return the bytes per token that our layers save for the backward pass, and the most that one
    of them computes with. Of recomputed layers, the activations of one are in memory: at first
    of the last, which is not recomputed and gone when the others are."""
    saved = compute_saved_bytes(spec, settings)
    temporary = compute_temporary_bytes(spec, settings.dtype_bytes)
    if settings.checkpointing == "selective":
        recomputed_bytes = count_recomputed_values(spec) * settings.dtype_bytes
        temporary += recomputed_bytes // spec.num_layers
    return saved, temporary


def count_saved_elements(spec: ModelSpec) -> int:
    """Return the values per token that the stock modules of all layers save: 12 h + 3 q + kv + 3 f
    in a dense layer (gated MLP, attention without stored scores).

    Recurrent layers and experts save as much of their inner values, relative to their widths."""
    attention = spec.parts.get("attention", NO_PART)
    recurrent = spec.parts.get("recurrent", NO_PART)
    kv = attention.layers * spec.num_kv_heads * spec.head_dim
    q = (attention.inner_outputs + attention.inner_inputs) // 2 - kv
    inner = 3 * q + kv + 3 * (recurrent.inner_outputs + recurrent.inner_inputs) // 2
    return 12 * spec.num_layers * spec.hidden_size + inner + _count_mlp_elements(spec)


def _count_mlp_elements(spec: ModelSpec) -> int:
    """Return the values per token that all MLPs and the experts of a token save."""
    return 3 * sum(spec.parts.get(word, NO_PART).inner_outputs for word in ("mlp", EXPERTS)) // 2


def _estimate_activations(
    spec: ModelSpec, tokens: int, dtype_bytes: int, software: GpuSoftware, policy: str
) -> tuple[int, int]:
    """Return the bytes saved for the backward pass, and the most that is recomputed at once (when
    the logits are gone)."""
    value_bytes = tokens * dtype_bytes * software.saved_share
    saved = value_bytes * count_saved_elements(spec)
    if policy == "full":
        inputs = spec.num_layers * tokens * spec.hidden_size * dtype_bytes
        return inputs, int(saved / spec.num_layers)
    if policy == "selective":
        mlps = value_bytes * _count_mlp_elements(spec)
        return int(saved - mlps), int(mlps / spec.num_layers)
    return int(saved), 0


def _estimate_other_trainer(
    spec: ModelSpec, software: GpuSoftware, shard: int, **footprint: Any
) -> dict[str, int]:
    """Return the fixed components of another trainer. Sharded, it shards all it has, and embeddings
    and head are not gathered while the layers are."""
    num_trained = count_trained_parameters(spec, **footprint)
    rest = spec.parameters - spec.block_parameters
    block_bytes = spec.block_parameters * (
        software.quantized_bytes if footprint["method"] == "qlora" else 2
    )
    rest_bytes = rest * (software.rest_bytes if footprint["method"] == "qlora" else 2)
    if footprint["method"] == "full":
        parts = {"weights": 0.0, "trained": num_trained * software.trained_bytes}
    else:
        trained_bytes = num_trained * software.adapter_bytes
        parts = {"weights": block_bytes + rest_bytes, "trained": trained_bytes}
    if shard > 1:
        parts = {name: num_bytes / shard for name, num_bytes in parts.items()}
        parts["gathered"] = FSDP_LAYERS * block_bytes / spec.num_layers
    return {name: int(num_bytes) for name, num_bytes in parts.items()}
