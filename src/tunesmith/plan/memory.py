"""What a training run holds in memory at its peak, component by component, before anything is loaded.

In: the model's shape and the plan's values. Out: bytes by component, with "peak". The saved activations are those of
our own layers (model/layers.py): per token and layer 4 H (two norm inputs, two norm outputs), 2 Q + 2 KV (q, k, v
and the attention's output) and 2 F (gate and up); where a family norms more, the inputs of those norms. Left out: a
correction from measured runs.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict, Unpack

from tunesmith.core.types import ModelSpec

PROCESS_BYTES = 560_000_000  # python, torch and transformers imported (480 MB), what the first products leave
SIZE_BYTES, SIZES = 3_000_000, 100  # code that oneDNN makes for a pack of a new size, and keeps; then parts come back
FRAGMENTS = 0.2  # of the activations: room in the heap that is free and of no use; measured, docs/plan.md
EVALUATION_BYTES = 60_000_000  # what is measured, held through the run, and what measuring leaves in the heap
CHUNK_TARGETS = 128
NORMED_OUTPUTS, NORMED_HEADS = ("gemma2", "gemma3"), ("qwen3", "gemma3")  # of attention and MLP; q and k
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


def activation_bytes(spec: ModelSpec, tokens: int, width: int, *, activations: str = "keep", dora: bool = False) -> int:
    """Saved for the backward of one pack, plus the temporaries of the widest layer. DoRA also keeps the outputs of the
    attention and of the MLP. `selective` leaves out gate and up, `recompute` keeps the inputs of all layers but one."""
    q, kv, layers = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_layers
    mlp = 2 * spec.intermediate_size
    layer = (6 if dora else 4) * spec.hidden_size + 2 * q + 2 * kv + mlp
    layer += 2 * spec.hidden_size * spec.model_type.startswith(NORMED_OUTPUTS)
    layer += (q + kv) * spec.model_type.startswith(NORMED_HEADS)
    saved = {
        "keep": layers * layer,
        "selective": layers * (layer - mlp),
        "recompute": layers * spec.hidden_size + layer,
    }[activations]
    temporary = 6 * spec.intermediate_size
    return tokens * (saved + temporary) * width


class Size(TypedDict):
    """What a run takes, apart from its packs. Some may be left out."""

    method: Method
    dtype: str
    rank: int
    dora: NotRequired[bool]
    new_rows: NotRequired[int]  # of new tokens, in embedding and head
    optim: NotRequired[str]
    activations: NotRequired[str]
    step_in_backward: NotRequired[bool]  # no gradient is kept but that of the largest tensor


def peak_memory(
    spec: ModelSpec, *, pack_tokens: int, packs: int = 1, layouts: int = 1, measured: bool = True, **size: Unpack[Size]
) -> dict[str, int]:
    """Bytes by component. `packs`: of the run, each of a size of its own. `layouts`: in how many the frozen matrices
    are kept (model/frozen.py). Those in 4 bits are widened one by one, and so are moments in 8 bits. `measured`: there
    are rows to measure on before the run."""
    width, dora = 2 if size["dtype"] == "bf16" else 4, size.get("dora", False)
    saved = activation_bytes(spec, pack_tokens, width, activations=size.get("activations", "keep"), dora=dora)
    parts = {
        "process": PROCESS_BYTES,
        **fixed_parts(spec, layouts=layouts, **size),
        "activations": saved,
        "fragments": int(saved * FRAGMENTS),
        "kernels": SIZE_BYTES * min(packs, SIZES) if width == 2 else 0,  # products in fp32 are not oneDNN's
        "evaluation": EVALUATION_BYTES if measured else 0,
        "head": CHUNK_TARGETS * spec.vocab_size * width * (1 if width == 2 else 4),
    }
    return parts | {"peak": sum(parts.values())}


def fixed_parts(spec: ModelSpec, *, layouts: int, **size: Unpack[Size]) -> dict[str, int]:
    """What does not depend on the packs."""
    method, width = size["method"], 2 if size["dtype"] == "bf16" else 4
    matrices = spec.block_parameters * (NF4_BYTES if method == "qlora" else width)
    frozen = 0 if method == "full" else int(matrices) + (spec.parameters - spec.block_parameters) * width
    narrow_copies = spec.block_parameters * width if method == "full" and width == 2 else 0
    return {
        "weights": frozen + (layouts - 1) * spec.block_parameters * width + narrow_copies,
        "widened": 2 * spec.hidden_size * spec.intermediate_size * width if method == "qlora" else 0,
        "trained": int(trained_parameters(spec, **size) * (4 + moment_bytes(**size))) + _gradient_bytes(spec, **size),
        "update": _update_bytes(spec, **size),
    }


def trained_parameters(spec: ModelSpec, **size: Unpack[Size]) -> int:
    if size["method"] == "full":
        return spec.parameters
    rows = size.get("new_rows", 0) * spec.hidden_size
    return lora_parameters(spec, size["rank"]) + (magnitudes(spec) if size.get("dora") else 0) + rows


def _gradient_bytes(spec: ModelSpec, **size: Unpack[Size]) -> int:
    """In fp32."""
    kept = spec.vocab_size * spec.hidden_size if size.get("step_in_backward") else trained_parameters(spec, **size)
    return 4 * kept


def moment_bytes(**size: Unpack[Size]) -> float:
    """Adam's two of each trained weight, beside 4 bytes for an fp32 master and 4 for its gradient."""
    return 2 * (1 + 4 / 256) if size.get("optim") == "adamw_8bit" else 8


def _update_bytes(spec: ModelSpec, **size: Unpack[Size]) -> int:
    """Both moments of the largest tensor in fp32, and two temporaries."""
    largest = spec.vocab_size * spec.hidden_size if size["method"] == "full" else 0
    return 4 * 4 * largest if size.get("optim") == "adamw_8bit" else 0
