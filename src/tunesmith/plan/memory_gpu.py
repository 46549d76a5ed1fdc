"""What a training run holds in a GPU's memory at its peak, component by component.

In: the model's shape and the plan's values. Out: bytes by component, with "peak". The formulas are
those of the published component models, checked against published peaks of other trainers
(tests/plan/test_gpu.py), each with its own `Stack`. Ours has not been measured on a GPU: its
activations are counted as those of the stock modules, which keep more. Left out: several GPUs,
offloading, pages that wait in main memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import (
    CHUNK_TARGETS,
    NF4_BYTES,
    count_trained_parameters,
    estimate_fixed_memory,
)

LOGIT_BYTES = 12  # bytes of each logit that is there at once: three copies of 4


@dataclass(frozen=True)
class GpuSoftware:
    """What a trainer keeps. Bytes are a weight's, with its gradient and moments."""

    adapter_bytes: float = 16  # fp32: weight, gradient, two moments
    trained_bytes: float = 16  # of all weights in full fine-tuning
    quantised_bytes: float = NF4_BYTES
    rest_bytes: float = 2  # embeddings, head and norms beside weights in 4 bits
    saved_share: float = 1  # of what the modules of a layer save; .58 under torch.compile
    logit_tokens: int = CHUNK_TARGETS  # whose logits are there at once
    context_bytes: int = 2**29  # of CUDA and its libraries: .14 GiB on a T4, .5 on large cards
    fragmentation_share: float = 0.1  # of what comes and goes in a step; 5 to 15% published


def estimate_gpu_memory(
    spec: ModelSpec,
    *,
    pack_tokens: int,
    software: GpuSoftware | None = None,
    cache_tokens: int = 0,
    **footprint: Any,
) -> dict[str, int]:
    """Bytes by component. `cache_tokens`: held at once while answers are generated, between steps.
    `stack`: of another trainer, which keeps no narrow copies beside what it trains."""
    is_tunesmith, software = software is None, software or GpuSoftware()
    dtype_bytes = 2 if footprint["dtype"] == "bf16" else 4
    parts = {"context": software.context_bytes}
    if is_tunesmith:
        parts |= estimate_fixed_memory(spec, layouts=1, **footprint)
    else:
        parts |= _estimate_other_trainer(spec, software, **footprint)
    head = LOGIT_BYTES * min(pack_tokens, software.logit_tokens) * spec.vocab_size
    activations, recomputed_bytes = _estimate_activations(
        spec, pack_tokens, dtype_bytes, software, footprint.get("gradient_checkpointing", "none")
    )
    parts["activations"] = activations + max(recomputed_bytes - head, 0)
    parts["head"] = head
    parts["fragments"] = int(software.fragmentation_share * (parts["activations"] + head))
    step_bytes = sum(parts[name] for name in ("activations", "head", "fragments"))
    # Either a step's activations are there or the keys and values of the answers.
    parts["answers"] = max(0, compute_cache_bytes(spec, cache_tokens, dtype_bytes) - step_bytes)
    return parts | {"peak": sum(parts.values())}


def compute_cache_bytes(spec: ModelSpec, tokens: int, dtype_bytes: int) -> int:
    """Keys and values of every layer."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype_bytes * tokens


def count_saved_elements(spec: ModelSpec) -> int:
    """Kept for the backward by the stock modules of a layer, a token: 12 h + 3 q + kv + 3 f (gated
    MLP, attention that never holds its scores)."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return 12 * spec.hidden_size + 3 * q + kv + 3 * spec.intermediate_size


def _estimate_activations(
    spec: ModelSpec, tokens: int, dtype_bytes: int, software: GpuSoftware, policy: str
) -> tuple[int, int]:
    """What stays from the forward to the backward, and the most that is computed anew at once, in
    place of logits."""
    layer = tokens * count_saved_elements(spec) * dtype_bytes * software.saved_share
    if policy == "full":
        return spec.num_layers * tokens * spec.hidden_size * dtype_bytes, int(layer)
    if policy == "selective":
        mlp = tokens * 3 * spec.intermediate_size * dtype_bytes * software.saved_share
        return int(spec.num_layers * (layer - mlp)), int(mlp)
    return int(spec.num_layers * layer), 0


def _estimate_other_trainer(
    spec: ModelSpec, software: GpuSoftware, **footprint: Any
) -> dict[str, int]:
    num_trained = count_trained_parameters(spec, **footprint)
    if footprint["method"] == "full":
        return {"weights": 0, "trained": int(num_trained * software.trained_bytes)}
    rest = spec.parameters - spec.block_parameters
    quantised = spec.block_parameters * software.quantised_bytes + rest * software.rest_bytes
    weights = quantised if footprint["method"] == "qlora" else 2 * spec.parameters
    return {"weights": int(weights), "trained": int(num_trained * software.adapter_bytes)}
