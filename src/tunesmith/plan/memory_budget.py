"""How much memory a run takes on the device of a machine, by component and by what it is doing.

In: the model's shape, the machine, the tokens of a pack, and the plan's values. Out: bytes. The
components are those of memory.py on a CPU and of gpu.py on a GPU. Left out: what is free, and what
to do where it does not fit."""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Machine, ModelSpec
from tunesmith.plan.memory import estimate_peak_memory
from tunesmith.plan.memory_gpu import compute_cache_bytes, estimate_gpu_memory

# The answers that are written side by side, and what their keys and values may take: as in
# infer/engine.py.
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
FIXED_PARTS = (
    "process",
    "context",
    "weights",
    "widened",
    "trained",
    "update",
    "kernels",
    "evaluation",
)
USUAL_MULTIPLES = {
    "full": "x4 to x12",
    "lora": "x1.5",
    "qlora": "x1.5",
}  # of the mission document, of the model's size


def estimate_memory(
    spec: ModelSpec,
    machine: Machine,
    *,
    pack_tokens: int,
    packs: int,
    layouts: int,
    cache_tokens: int,
    has_evaluation: bool,
    **footprint: Any,
) -> dict[str, int]:
    """Bytes by component, with "peak"."""
    if machine.device == "cuda":
        return estimate_gpu_memory(
            spec, pack_tokens=pack_tokens, cache_tokens=cache_tokens, **footprint
        )
    parts = estimate_peak_memory(
        spec,
        pack_tokens=pack_tokens,
        packs=packs,
        layouts=layouts,
        has_evaluation=has_evaluation,
        **footprint,
    )
    # Either a step's activations are there or the keys and values of the answers.
    cache_size_bytes = compute_cache_bytes(
        spec, cache_tokens, 2 if footprint["dtype"] == "bf16" else 4
    )
    answer_bytes = max(0, cache_size_bytes - parts["activations"] - parts["head"])
    return parts | {"answers": answer_bytes, "peak": parts["peak"] + answer_bytes}


def apply_memory_factor(parts: dict[str, int], factor: float) -> dict[str, int]:
    """With what earlier runs took beyond their prediction, or short of it."""
    if factor == 1:
        return parts
    correction = int(parts["peak"] * (factor - 1))
    return parts | {"correction": correction, "peak": parts["peak"] + correction}


def estimate_cache_tokens(
    spec: ModelSpec,
    machine: Machine,
    *,
    num_prompts: int,
    longest: int,
    answer_share: float,
    dtype: str,
) -> int:
    """Held at once while answers are written. `share`: of a row's tokens that are its answer, which
    has room for half as many more, and 16 (`evaluate.tasks.answer_length`)."""
    dtype_bytes = 2 if dtype == "bf16" else 4
    needed_tokens = min(MAX_BATCH_ROWS[machine.device], num_prompts) * int(
        (1 + answer_share / 2) * longest + 16
    )
    return min(
        needed_tokens, CACHE_BYTES[machine.device] // compute_cache_bytes(spec, 1, dtype_bytes)
    )


def estimate_phase_bytes(
    parts: dict[str, int],
    longest_row_parts: dict[str, int],
    spec: ModelSpec,
    *,
    cache_tokens: int,
    dtype: str,
) -> dict[str, int]:
    """The most that is held in a step, with the longest row alone, and while answers are written.
    `parts` and `longest` are the components of the two packs."""
    fixed_bytes = sum(parts.get(name, 0) for name in FIXED_PARTS)
    step_bytes = parts["peak"] - parts.get("answers", 0)
    phase_bytes = {
        "step": step_bytes,
        "longest row": longest_row_parts["peak"] - longest_row_parts.get("answers", 0),
    }
    if cache_tokens:
        phase_bytes["answers"] = fixed_bytes + compute_cache_bytes(
            spec, cache_tokens, 2 if dtype == "bf16" else 4
        )
    return phase_bytes


def compute_multiple(spec: ModelSpec, peak_bytes: int) -> float:
    """Of the size of the weights in 16 bits."""
    return peak_bytes / (2 * spec.parameters)
