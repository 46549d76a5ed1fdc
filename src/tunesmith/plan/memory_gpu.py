"""What a run takes in the memory of a GPU at its peak, by component.

In: the shape of the model and the settings of the plan. Out: bytes by component. The
activations are those of plan/activations.py, and counted on a GPU that is not there
(tests/fakecuda). On several GPUs, bytes are those of one: its shard of the weights, and the layers
that are gathered at once. Left out: offloading, paged optimizers.
"""

from __future__ import annotations

import dataclasses

from tunesmith.core.mesh import SINGLE_GPU, Mesh
from tunesmith.core.types import ModelSpec
from tunesmith.plan.activations import (
    ActivationSettings,
    compute_saved_bytes,
    compute_temporary_bytes,
    count_recomputed_values,
)
from tunesmith.plan.memory import (
    CHUNK_TARGETS,
    GRADIENT_BYTES,
    MASTER_BYTES,
    NO_CACHE,
    CacheSize,
    Footprint,
    MemoryParts,
    compute_cache_bytes,
    compute_frozen_bytes,
    estimate_fixed_memory,
)

LOGIT_BYTES = 12  # three fp32 copies of each logit
TRITON_CHUNK_TARGETS = 2048  # as in model/lm_head.py
GATHERED_LAYERS = 2  # that which computes, and the next, or one that only another rank needs
CONTEXT_BYTES = 2**29  # CUDA and its libraries: .14 GiB on a T4, .5 on large cards
FRAGMENTATION_SHARE = 0.1  # of a step's temporary memory; 5 to 15% published
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
        fragments=int(FRAGMENTATION_SHARE * (activations + head)),
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
