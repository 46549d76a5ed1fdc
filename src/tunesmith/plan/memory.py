"""What a training run holds in memory at its peak, component by component, before anything is loaded.

In: the model's shape and the plan's values. Out: bytes by component, with "peak". The saved activations are those of
our own layers (model/layers.py): per token and layer 4 H (two norm inputs, two norm outputs), 2 Q + 2 KV (q, k, v
and the attention's output) and 2 F (gate and up). Left out: a correction from measured runs.
"""

from __future__ import annotations

from typing import Literal

from tunesmith.types import ModelSpec

PROCESS_BYTES = 480_000_000  # python, torch and transformers imported; measured on Linux, torch 2.13
ALLOCATOR_SHARE = 0.6  # of the activations: packs differ in size, so the heap fragments; measured over 14 steps
EVALUATION_BYTES = 500_000_000  # what measuring before the run leaves behind in the heap; measured on the demo
CHUNK_TARGETS = 128
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a weight of 4 bits, a byte a block of 64, 4 bytes for 256 of those
Method = Literal["lora", "qlora", "full"]


def lora_parameters(spec: ModelSpec, rank: int) -> int:
    """Adapters on all linear layers: rank * (inputs + outputs) of each."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    h, f = spec.hidden_size, spec.intermediate_size
    return spec.num_layers * rank * ((h + q) + 2 * (h + kv) + (q + h) + 3 * (h + f))


def magnitudes(spec: ModelSpec) -> int:
    """DoRA's on all linear layers: one for each output."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return spec.num_layers * (q + 2 * kv + 2 * spec.hidden_size + 2 * spec.intermediate_size)


def activation_bytes(spec: ModelSpec, tokens: int, width: int, *, dora: bool = False) -> int:
    """Saved for the backward of one pack, plus the temporaries of the widest layer. DoRA also keeps the outputs of the
    attention and of the MLP."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    saved = spec.num_layers * ((6 if dora else 4) * spec.hidden_size + 2 * q + 2 * kv + 2 * spec.intermediate_size)
    temporary = 6 * spec.intermediate_size
    return int(tokens * (saved + temporary) * width * (1 + ALLOCATOR_SHARE))


def peak_memory(
    spec: ModelSpec,
    *,
    method: Method,
    dtype: str,
    rank: int,
    pack_tokens: int,
    layouts: int = 1,
    dora: bool = False,
) -> dict[str, int]:
    """Bytes by component. fp32 masters and Adam's two moments: 16 bytes a trained parameter, gradient included.
    `layouts`: in how many the frozen matrices are kept (model/frozen.py). Those in 4 bits are widened one by one."""
    width = 2 if dtype == "bf16" else 4
    trained = trained_parameters(spec, method=method, rank=rank, dora=dora)
    matrices = spec.block_parameters * (NF4_BYTES if method == "qlora" else width)
    frozen = 0 if method == "full" else int(matrices) + (spec.parameters - spec.block_parameters) * width
    narrow_copies = spec.block_parameters * width if method == "full" and dtype == "bf16" else 0
    parts = {
        "process": PROCESS_BYTES,
        "weights": frozen + (layouts - 1) * spec.block_parameters * width + narrow_copies,
        "widened": 2 * spec.hidden_size * spec.intermediate_size * width if method == "qlora" else 0,
        "trained": trained * 16,
        "activations": activation_bytes(spec, pack_tokens, width, dora=dora),
        "evaluation": EVALUATION_BYTES,
        "head": CHUNK_TARGETS * spec.vocab_size * width * (1 if dtype == "bf16" else 4),
    }
    return parts | {"peak": sum(parts.values())}


def trained_parameters(spec: ModelSpec, *, method: Method, rank: int, dora: bool) -> int:
    if method == "full":
        return spec.parameters
    return lora_parameters(spec, rank) + (magnitudes(spec) if dora else 0)


def disk_needed(spec: ModelSpec, *, method: Method, dtype: str, rank: int, dora: bool = False) -> int:
    """Bytes that a run holds on disk at most: three checkpoints (two are kept while a third is written) of a weight
    and two moments in fp32, and the trained weights."""
    trained = trained_parameters(spec, method=method, rank=rank, dora=dora)
    final = trained * (2 if method == "full" and dtype == "bf16" else 4)
    return 3 * 12 * trained + final
