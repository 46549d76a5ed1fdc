"""How much memory a run takes on the device of a machine, by component and by what it is doing.

In: the model's shape, the machine, the tokens of a pack, and the plan's values. Out: bytes. The components are those of
memory.py on a CPU and of gpu.py on a GPU. Left out: what is free, and what to do where it does not fit.
"""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Machine, ModelSpec
from tunesmith.plan.memory import peak_memory
from tunesmith.plan.memory_gpu import cache_bytes, gpu_memory

# The answers that are written side by side, and what their keys and values may take: as in infer/engine.py.
ANSWERS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
FIXED = ("process", "context", "weights", "widened", "trained", "update", "kernels", "evaluation")
MULTIPLES = {"full": "x4 to x12", "lora": "x1.5", "qlora": "x1.5"}  # of the mission document, of the model's size


def needed(
    spec: ModelSpec,
    machine: Machine,
    *,
    pack_tokens: int,
    packs: int,
    layouts: int,
    cache_tokens: int,
    measured: bool,
    **size: Any,
) -> dict[str, int]:
    """Bytes by component, with "peak"."""
    if machine.device == "cuda":
        return gpu_memory(spec, pack_tokens=pack_tokens, cache_tokens=cache_tokens, **size)
    parts = peak_memory(spec, pack_tokens=pack_tokens, packs=packs, layouts=layouts, measured=measured, **size)
    # Either a step's activations are there or the keys and values of the answers.
    cache = cache_bytes(spec, cache_tokens, 2 if size["dtype"] == "bf16" else 4)
    answers = max(0, cache - parts["activations"] - parts["head"])
    return parts | {"answers": answers, "peak": parts["peak"] + answers}


def corrected(parts: dict[str, int], factor: float) -> dict[str, int]:
    """With what earlier runs took beyond their prediction, or short of it."""
    if factor == 1:
        return parts
    more = int(parts["peak"] * (factor - 1))
    return parts | {"correction": more, "peak": parts["peak"] + more}


def answer_tokens(spec: ModelSpec, machine: Machine, *, questions: int, longest: int, share: float, dtype: str) -> int:
    """Held at once while answers are written. `share`: of a row's tokens that are its answer, which has room for half
    as many more, and 16 (`evaluate.tasks.answer_length`)."""
    width = 2 if dtype == "bf16" else 4
    wanted = min(ANSWERS[machine.device], questions) * int((1 + share / 2) * longest + 16)
    return min(wanted, CACHE_BYTES[machine.device] // cache_bytes(spec, 1, width))


def phases(
    parts: dict[str, int], longest: dict[str, int], spec: ModelSpec, *, cache_tokens: int, dtype: str
) -> dict[str, int]:
    """The most that is held in a step, with the longest row alone, and while answers are written. `parts` and `longest`
    are the components of the two packs."""
    fixed = sum(parts.get(name, 0) for name in FIXED)
    step = parts["peak"] - parts.get("answers", 0)
    found = {"step": step, "longest row": longest["peak"] - longest.get("answers", 0)}
    if cache_tokens:
        found["answers"] = fixed + cache_bytes(spec, cache_tokens, 2 if dtype == "bf16" else 4)
    return found


def multiple(spec: ModelSpec, peak_bytes: int) -> float:
    """Of the size of the weights in 16 bits."""
    return peak_bytes / (2 * spec.parameters)
