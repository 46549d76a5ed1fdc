"""What a run folder holds on disk at its fullest: checkpoints, and the states of the base where
they are kept.

In: the model's shape and the plan's values. Out: bytes. A checkpoint holds each trained weight in
fp32 and its moments. The trained weights are written when no checkpoint is, and take less than one.
Left out: events, measures, answers and the tokenizer's files, a few megabytes."""

from __future__ import annotations

from typing import Unpack

from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import ModelFootprint, compute_moment_bytes, count_trained_parameters

RETAINED_CHECKPOINTS = 2  # as runfolder.py keeps them
# of general text are measured, where there are so many; 6.2 of the rules
GENERAL_TEXT_TOKENS = 100_000


def estimate_disk_bytes(
    spec: ModelSpec,
    *,
    checkpoints: int,
    cached_tokens: int = 0,
    **footprint: Unpack[ModelFootprint],
) -> int:
    """`checkpoints`: see `most_checkpoints`; `kept_tokens`: see `base_states`."""
    checkpoint_bytes = int(
        count_trained_parameters(spec, **footprint) * (4 + compute_moment_bytes(**footprint))
    )
    return checkpoints * checkpoint_bytes + estimate_base_states_bytes(
        spec, cached_tokens, **footprint
    )


def count_max_checkpoints(*, steps: int, save_steps: int, eval_steps: int | None) -> int:
    """At one time: the newest two, the last one that is known to be good, the best one where
    held-out rows are looked at (`eval_steps`), and the one that is being written. No more than the
    run can write: those that are due, the best at each look, and the one of an interrupt."""
    written = 1 + (steps - 1) // save_steps + ((steps - 1) // eval_steps if eval_steps else 0)
    return min(RETAINED_CHECKPOINTS + 1 + bool(eval_steps) + 1, written)


def estimate_base_states_bytes(
    spec: ModelSpec, tokens: int, **footprint: Unpack[ModelFootprint]
) -> int:
    """Final hidden states on the measured tokens, and the head where it is trained: what a model is
    compared with when no switch brings its base back."""
    dtype_bytes = 2 if footprint["dtype"] == "bf16" else 4
    head_rows = spec.vocab_size if footprint["method"] == "full" or footprint.get("new_rows") else 0
    return (tokens + head_rows) * dtype_bytes * spec.hidden_size if tokens else 0
