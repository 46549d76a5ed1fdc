"""AdamW and its learning rate. The rate is a pure function of the step, so nothing of the schedule needs saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def linear(progress: float) -> float:
    return 1 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    del progress
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear warm-up that ends at `peak`, then the schedule down to
    0 after the last step. Same as transformers' schedulers: step k uses factor k / warmup_steps while warming up."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * SCHEDULES[schedule]((step - warmup_steps) / max(1, total_steps - warmup_steps))


def make_adamw(parameters: Iterable[nn.Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW, betas 0.9 and 0.999, eps 1e-8; the learning rate is given with each `update`."""
    return torch.optim.AdamW(list(parameters), lr=0.0, weight_decay=weight_decay, fused=True)


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales the gradients so that their common norm is at most `max_norm` (0: never); returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), max_norm or math.inf))


def update(optimizer: torch.optim.AdamW, rate: float) -> None:
    """One step at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    # The fused step writes without telling autograd, but what was derived from a weight has to know (MasterLinear).
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.autograd.graph.increment_version(parameter)
