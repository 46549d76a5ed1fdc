"""An operation that changes nothing in the forward pass and raises an error in the backward."""

from typing import Any

import torch
from torch import Tensor


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del gradients
        raise ctx.error


def fail_in_backward(x: Tensor, error: Exception) -> Tensor:
    """Return the same values, whose backward pass raises the error."""
    result: Any = _FailingBackward.apply(x, error)
    return result
