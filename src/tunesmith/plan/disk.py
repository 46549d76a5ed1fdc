"""What a run folder holds on disk at its fullest: checkpoints, and the states of the base where they are kept.

In: the model's shape and the plan's values. Out: bytes. A checkpoint holds each trained weight in fp32 and its moments.
The trained weights are written when no checkpoint is, and take less than one. Left out: events, measures, answers and
the tokenizer's files, a few megabytes.
"""

from __future__ import annotations

from typing import Unpack

from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import Size, moment_bytes, trained_parameters

NEWEST = 2  # as runfolder.py keeps them
GENERAL_TOKENS = 100_000  # of general text are measured, where there are so many; 6.2 of the rules


def disk_needed(spec: ModelSpec, *, checkpoints: int, kept_tokens: int = 0, **size: Unpack[Size]) -> int:
    """`checkpoints`: see `most_checkpoints`; `kept_tokens`: see `base_states`."""
    each = int(trained_parameters(spec, **size) * (4 + moment_bytes(**size)))
    return checkpoints * each + base_states(spec, kept_tokens, **size)


def most_checkpoints(*, steps: int, save_steps: int, eval_steps: int | None) -> int:
    """At one time: the newest two, the last one that is known to be good, the best one where held-out rows are looked
    at (`eval_steps`), and the one that is being written. No more than the run can write: those that are due, the best
    at each look, and the one of an interrupt."""
    written = 1 + (steps - 1) // save_steps + ((steps - 1) // eval_steps if eval_steps else 0)
    return min(NEWEST + 1 + bool(eval_steps) + 1, written)


def base_states(spec: ModelSpec, tokens: int, **size: Unpack[Size]) -> int:
    """Final hidden states on the measured tokens, and the head where it is trained: what a model is compared with when
    no switch brings its base back."""
    width = 2 if size["dtype"] == "bf16" else 4
    head = spec.vocab_size if size["method"] == "full" or size.get("new_rows") else 0
    return (tokens + head) * width * spec.hidden_size if tokens else 0
