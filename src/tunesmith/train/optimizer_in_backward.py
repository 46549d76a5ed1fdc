"""Optimizer in backward: update each weight as soon as its gradient is complete, then free it.

This saves the memory of all gradients but one; the updates are bitwise the same. (PyTorch's
tutorial "How to save memory by fusing the optimizer step into the backward pass"; torchtune:
optimizer_in_bwd.)

In: an optimizer and its parameters. A backward pass inside `updating` updates them. Left out:
clipping, which needs the norm of all gradients before the first update, and undoing a step that is
non-finite or does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tunesmith.core.errors import GateError, MachineError
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.train.optimizer import step_optimizer


class OptimizerInBackward:
    """Hooks that update weights in the backward pass; `grad_norm` is that of the last one."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.grad_norm = 0.0

    @contextmanager
    def updating(self, step: int, learning_rate: float) -> Iterator[None]:
        """Update weights in the backward pass inside this context.

        Raise GateError for a non-finite gradient and MachineError when out of memory: by then some
        weights are those of the next step."""
        squared_norm = 0.0

        def apply_gradient(name: str, parameter: nn.Parameter) -> None:
            nonlocal squared_norm
            assert parameter.grad is not None
            squared_norm += float(torch.linalg.vector_norm(parameter.grad)) ** 2
            if not math.isfinite(squared_norm):
                raise GateError(
                    f"the gradient of {name} is not finite, but other weights are already updated",
                    where=f"step {step}",
                    fix="resume from the newest checkpoint; with max_grad_norm > 0 such a step is "
                    "skipped",
                )
            # Only this parameter has a gradient now.
            step_optimizer(self.optimizer, learning_rate)
            parameter.grad = None

        handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: apply_gradient(name, p)
            )
            for name, parameter in self.parameters.items()
        ]
        try:
            with machine_errors():
                yield
        except OutOfMemory as error:
            raise MachineError(
                f"{error.message}, in the middle of an update",
                where=f"step {step}",
                fix="resume from the newest checkpoint with a smaller pack_length; with "
                "max_grad_norm > 0 such a step is retried with smaller packs",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self.grad_norm = math.sqrt(squared_norm)
