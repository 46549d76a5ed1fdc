"""Which weights an adapter that was trained beside 4-bit ones is merged into: those of the files,
or what 4 bits left.

In: a finished run, its witnesses, the user's word. Out: the choice, and how far from the run each
base would be. An adapter also learns to mend what quantisation did, so the files' own weights are
rarely the nearer ones. Left out: what the format of the export does on top (parity.py)."""

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
    """`mean_kl`: in nats, to the run, of the adapter merged into each and rounded to the base's own
    type; empty where there is nothing to choose."""

    base: BaseKind
    mean_kl: Mapping[str, float]


def choose_base(
    run: SourceRun, examples: Sequence[ParityExample], requested: str, *, is_merged: bool
) -> MergeBase:
    """`wish`: a base, or auto for the nearer one. `merges`: the export holds more than the adapter.
    InputError for a wish that there is not, or that has no effect."""
    if requested not in (*BASES, "auto"):
        raise InputError(
            f"there is no base {requested!r}",
            where="--base",
            fix=f"use one of {', '.join(BASES)}, auto",
        )
    if is_merged and run.quantized_paths:
        run_logits = compute_live_logits(run, examples)
        kl_by_base = {
            base: compute_mean_kl(run_logits, _compute_merged_logits(run, examples, base))
            for base in BASES
        }
        return MergeBase(
            min(BASES, key=lambda base: (base != requested, kl_by_base[base])), {**kl_by_base}
        )
    if requested != "auto":
        reason = (
            "this run's base was never in 4 bits" if is_merged else "the adapter is exported alone"
        )
        raise InputError(
            f"there is no base to choose: {reason}", where="--base", fix="leave --base out"
        )
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
