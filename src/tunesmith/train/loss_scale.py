"""The factor by which a loss in fp16 is multiplied before its backward.

    scale = LossScale.from_dtype(model.dtype)     None: bf16 and fp32 need no scale
    (loss * scale.value).backward()
    scale.remove_from_gradients(parameters)       gradients as if there were no scale

fp16 ends at 65,504 and has no values below 6e-8, to which most gradients of activations would be
rounded. A scale lifts them (Micikevicius et al. 2018, section 3.2). It is a power of two, so it
rounds nothing itself. A step whose gradients overflow is repeated with half the scale: no row is
lost, unlike with torch's GradScaler, which leaves such steps out. After GROWTH_STEPS finite steps
it doubles. Left out: finding out that a gradient overflowed (the norm of all, which the loop reads
anyway), and losses that are not finite themselves, which no scale helps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

SCALE_KIND = "loss scale"  # of the events of repeated steps
INITIAL_SCALE = 65536.0  # as in torch's GradScaler
GROWTH_STEPS = 2000
MAX_SCALE = 2.0**24
MIN_SCALE = 1.0  # below, gradients overflow without any scale


@dataclass
class LossScale:
    """The scale of the next step. `finite_steps` counts the updates since it last changed,
    `overflows` how often a step was repeated."""

    value: float = INITIAL_SCALE
    finite_steps: int = 0
    overflows: int = 0

    @classmethod
    def from_dtype(cls, dtype: torch.dtype) -> LossScale | None:
        """Return a scale for fp16, None for other dtypes."""
        return cls() if dtype == torch.float16 else None

    @torch.no_grad()
    def remove_from_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.value)  # pyright: ignore[reportPrivateImportUsage]

    def count_update(self) -> None:
        """Count an update whose gradients were finite; double the scale when it is due."""
        self.finite_steps += 1
        if self.finite_steps >= GROWTH_STEPS:
            self.value = min(2 * self.value, MAX_SCALE)
            self.finite_steps = 0

    def halve(self) -> bool:
        """Halve the scale after gradients overflowed; return False if they do without a scale."""
        if self.value <= MIN_SCALE:
            return False
        self.value /= 2
        self.finite_steps = 0
        self.overflows += 1
        return True
