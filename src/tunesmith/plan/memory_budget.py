"""How much memory a run takes on its machine, by component and by phase.

In: the shape of the model, the machine, the tokens of a pack, and the settings of the plan. Out:
bytes. The components are those of memory.py on a CPU and of memory_gpu.py on a GPU. Left out: what
to do if it does not fit (build.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.core.types import Machine, ModelSpec
from tunesmith.plan.memory import (
    CacheSize,
    MemoryParts,
    compute_cache_bytes,
    get_dtype_bytes,
)

MIN_COMPLETE_TOKENS = 256  # the default of lm-eval's max_gen_toks
# by these, an answer longer than expected is wrong wherever it ends, or none is graded
LENGTH_INDEPENDENT_METRICS = ("exact_match", "normalized_match", "multiple_choice", "bits_per_byte")
# answers generated at once, and the largest KV cache, as in model/generation/engine.py
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
BLOCK_TOKENS = 64  # rows of the cache grow to a multiple of this, as in model/cache_blocks.py
# the usual rule of thumb, relative to the size of the model
USUAL_MULTIPLES = {"full": "x4 to x12", "lora": "x1.5", "qlora": "x1.5"}


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
    parts: MemoryParts, longest_row: MemoryParts, spec: ModelSpec, *, cache: CacheSize, dtype: str
) -> dict[str, int]:
    """Return the peak memory of a step, of the longest row alone, and of generating answers.

    `parts` and `longest_row` are those of the two packs."""
    phase_bytes = {
        "step": parts.peak - parts.cache,
        "longest row": longest_row.peak - longest_row.cache,
    }
    if cache.rows:
        cache_bytes = compute_cache_bytes(spec, cache, get_dtype_bytes(dtype))
        phase_bytes["generation"] = parts.fixed + cache_bytes
    return phase_bytes


def compute_multiple(spec: ModelSpec, peak_bytes: int) -> float:
    """Return a peak relative to the size of the 16-bit weights."""
    return peak_bytes / (2 * spec.parameters)
