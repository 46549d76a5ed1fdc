"""How much memory a run takes on its machine, by component and by phase.

In: the shape of the model, the machine, the tokens of a pack, and the settings of the plan. Out:
bytes. The components are those of memory.py on a CPU and of memory_gpu.py on a GPU. Left out: what
to do if it does not fit (build.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tunesmith.core.mesh import SINGLE_GPU, Mesh
from tunesmith.core.types import Machine, ModelSpec
from tunesmith.plan.hardware_presets import find_missing_for_triton
from tunesmith.plan.memory import (
    CacheSize,
    compute_cache_bytes,
    estimate_peak_memory,
    get_dtype_bytes,
)
from tunesmith.plan.memory_gpu import estimate_gpu_memory

MIN_COMPLETE_TOKENS = 256  # the default of lm-eval's max_gen_toks
# by these, an answer longer than expected is wrong wherever it ends, or none is graded
LENGTH_INDEPENDENT_METRICS = ("exact_match", "normalized_match", "multiple_choice", "bits_per_byte")
# answers generated at once, and the largest KV cache, as in model/generation/engine.py
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
MAX_HEAD_COPY_BYTES = 2**29  # of the second copy of the head, as in model/lm_head.py
BLOCK_TOKENS = 64  # rows of the cache grow to a multiple of this, as in model/cache_blocks.py
FIXED_PARTS = (
    "process",
    "context",
    "weights",
    "widened",
    "gathered",
    "NCCL",
    "trained",
    "update",
    "kernels",
    "evaluation",
)
# the usual rule of thumb, relative to the size of the model
USUAL_MULTIPLES = {"full": "x4 to x12", "lora": "x1.5", "qlora": "x1.5"}


def estimate_memory(
    spec: ModelSpec,
    machine: Machine,
    *,
    pack_tokens: int,
    packs: int,
    layouts: int,
    cache: CacheSize,
    has_evaluation: bool,
    mesh: Mesh = SINGLE_GPU,
    **footprint: Any,
) -> dict[str, int]:
    """Return bytes by component, with "peak", of one device."""
    if machine.device == "cuda":
        return estimate_gpu_memory(
            spec,
            pack_tokens=pack_tokens,
            cache=cache,
            has_triton=not find_missing_for_triton(machine),
            mesh=mesh,
            **footprint,
        )
    parts = estimate_peak_memory(
        spec,
        pack_tokens=pack_tokens,
        packs=packs,
        layouts=layouts,
        has_evaluation=has_evaluation,
        **footprint,
    )
    # memory holds either the activations of a step or the KV cache of the answers
    cache_bytes = compute_cache_bytes(spec, cache, get_dtype_bytes(footprint["dtype"]))
    head_bytes = spec.vocab_size * spec.hidden_size * 2
    if cache.rows and footprint["dtype"] == "bf16" and head_bytes <= MAX_HEAD_COPY_BYTES:
        cache_bytes += head_bytes
    step_bytes = parts["activations"] + parts["head"] + parts["fragments"]
    answer_bytes = max(0, cache_bytes - step_bytes)
    return parts | {"KV cache": answer_bytes, "peak": parts["peak"] + answer_bytes}


def apply_memory_factor(parts: dict[str, int], factor: float) -> dict[str, int]:
    """Return the components corrected by the ratio of measured to predicted memory."""
    if factor == 1:
        return parts
    correction = int(parts["peak"] * (factor - 1))
    return parts | {"correction": correction, "peak": parts["peak"] + correction}


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
    parts: dict[str, int],
    longest_row_parts: dict[str, int],
    spec: ModelSpec,
    *,
    cache: CacheSize,
    dtype: str,
) -> dict[str, int]:
    """Return the peak memory of a step, of the longest row alone, and of generating answers.

    `parts` and `longest_row_parts` are the components of the two packs."""
    phase_bytes = {
        "step": parts["peak"] - parts.get("KV cache", 0),
        "longest row": longest_row_parts["peak"] - longest_row_parts.get("KV cache", 0),
    }
    if cache.rows:
        fixed_bytes = sum(parts.get(name, 0) for name in FIXED_PARTS)
        cache_bytes = compute_cache_bytes(spec, cache, get_dtype_bytes(dtype))
        phase_bytes["generation"] = fixed_bytes + cache_bytes
    return phase_bytes


def compute_multiple(spec: ModelSpec, peak_bytes: int) -> float:
    """Return a peak relative to the size of the 16-bit weights."""
    return peak_bytes / (2 * spec.parameters)
