"""Which weights an adapter that was trained beside 4-bit ones is merged into: those of the files, or what 4 bits left.

In: a finished run, its witnesses, the user's word. Out: the choice, and how far from the run each base would be. An
adapter also learns to mend what quantisation did, so the files' own weights are rarely the nearer ones. Left out: what
the format of the export does on top (parity.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.export.parity import Base, Witness, live_logits, mean_kl, witness_logits
from tunesmith.export.source_run import Finished
from tunesmith.model.merge import add_to_network

BASES: tuple[Base, ...] = ("dequantized", "original")


@dataclass(frozen=True)
class BaseChoice:
    """`mean_kl`: in nats, to the run, of the adapter merged into each and rounded to the base's own type; empty where
    there is nothing to choose."""

    base: Base
    mean_kl: Mapping[str, float]


def choose_base(run: Finished, witnesses: Sequence[Witness], wish: str, *, merges: bool) -> BaseChoice:
    """`wish`: a base, or auto for the nearer one. `merges`: the export holds more than the adapter. InputError for a
    wish that there is not, or that has no effect."""
    if wish not in (*BASES, "auto"):
        raise InputError(f"there is no base {wish!r}", where="--base", fix=f"use one of {', '.join(BASES)}, auto")
    if merges and run.narrow:
        live = live_logits(run, witnesses)
        kl = {base: mean_kl(live, _merged_logits(run, witnesses, base)) for base in BASES}
        return BaseChoice(min(BASES, key=lambda base: (base != wish, kl[base])), {**kl})
    if wish != "auto":
        what = "this run's base was never in 4 bits" if merges else "the adapter is exported alone"
        raise InputError(f"there is no base to choose: {what}", where="--base", fix="leave --base out")
    return BaseChoice("original", {})


def _merged_logits(run: Finished, witnesses: Sequence[Witness], base: Base) -> tuple[Tensor, ...]:
    network = run.base_network(original=base == "original")
    add_to_network(network, run.changes)
    dtype: torch.dtype = getattr(torch, run.weights.dtype)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return witness_logits(network, witnesses)
