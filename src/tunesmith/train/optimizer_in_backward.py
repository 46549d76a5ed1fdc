"""Updates that are taken while the gradients are computed: each weight's as soon as its gradient is
complete, which is then let go. Saves the gradients of all weights but one; the updates are the same
to the bit.

In: an optimizer and its parameters. A backward inside `taken` updates them. Left out: clipping,
which needs the norm of all gradients before the first update, and so does going back from a step
that is not finite or does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tunesmith.core.errors import GateError, MachineError
from tunesmith.model.oom import OutOfMemory, memory_errors
from tunesmith.train.optimizer import step_optimizer


class OptimizerInBackward:
    """`norm`: of all gradients of the last backward."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.grad_norm = 0.0

    @contextmanager
    def updating(self, step: int, learning_rate: float) -> Iterator[None]:
        """One step at this learning rate. Raises GateError for a gradient that is not finite and
        MachineError when memory runs out: other weights are those of the next step by then."""
        squared_norm = 0.0

        def apply_gradient(name: str, parameter: nn.Parameter) -> None:
            nonlocal squared_norm
            assert parameter.grad is not None
            squared_norm += float(torch.linalg.vector_norm(parameter.grad)) ** 2
            if not math.isfinite(squared_norm):
                raise GateError(
                    f"step {step}: the gradient of {name} is not finite, and other weights were updated already",
                    fix="resume from the newest checkpoint; with max_grad_norm over 0 such a step is left out",
                )
            step_optimizer(
                self.optimizer, learning_rate
            )  # of the only parameter that has a gradient now
            parameter.grad = None

        handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: apply_gradient(name, p)
            )
            for name, parameter in self.parameters.items()
        ]
        try:
            with memory_errors():
                yield
        except OutOfMemory as error:
            raise MachineError(
                f"{error.message}, in the middle of an update",
                where=f"step {step}",
                fix="resume from the newest checkpoint with a smaller pack_length; with max_grad_norm over 0 such a"
                " step is taken again in smaller packs",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self.grad_norm = math.sqrt(squared_norm)
