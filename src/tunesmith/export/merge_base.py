"""Choose the weights that an adapter trained on a 4-bit base is merged into.

In: a SourceRun, its parity examples, the user's choice. Out: the base, original or dequantized, and
the KL of each to the run. An adapter also compensates quantization errors, so the original weights
are rarely closer. Left out: the error of the export's format (parity.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.export.parity import (
    BaseKind,
    ParityExample,
    compute_example_logits,
    compute_live_logits,
    compute_mean_kl,
)
from tunesmith.export.source_run import SourceRun
from tunesmith.model.merge import merge_into_network

BASES: tuple[BaseKind, ...] = ("dequantized", "original")


@dataclass(frozen=True)
class MergeBase:
    """The base, and the mean KL to the run in nats of the adapter merged into each one, rounded to
    the base's dtype; empty where there is no choice."""

    base: BaseKind
    mean_kl: Mapping[str, float]


def choose_base(
    run: SourceRun, examples: Sequence[ParityExample], requested: str, *, is_merged: bool
) -> MergeBase:
    """Return the requested base, or for `auto` the one that is closer to the run.

    is_merged: the export contains more than the adapter. Raises InputError for an unknown base, and
    for a choice without effect.
    """
    where = "--base"
    if requested not in (*BASES, "auto"):
        fix = f"use one of {', '.join(BASES)}, auto"
        raise InputError(f"unknown base {requested!r}", where=where, fix=fix)
    if is_merged and run.quantized_paths:
        run_logits = compute_live_logits(run, examples)
        kl_by_base: dict[str, float] = {}
        for base in BASES:
            merged_logits = _compute_merged_logits(run, examples, base)
            kl_by_base[base] = compute_mean_kl(run_logits, merged_logits)
        chosen = min(BASES, key=lambda base: (base != requested, kl_by_base[base]))
        return MergeBase(chosen, kl_by_base)
    if requested != "auto":
        reason = "only the adapter is exported"
        if is_merged:
            reason = "this run's base was not quantized to 4 bits"
        raise InputError(f"no base to choose: {reason}", where=where, fix="leave --base out")
    return MergeBase("original", {})


def _compute_merged_logits(
    run: SourceRun, examples: Sequence[ParityExample], base: BaseKind
) -> tuple[Tensor, ...]:
    network = run.load_base_network(is_original=base == "original")
    merge_into_network(network, run.changes)
    dtype: torch.dtype = getattr(torch, run.model_spec.dtype)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return compute_example_logits(network, examples)
