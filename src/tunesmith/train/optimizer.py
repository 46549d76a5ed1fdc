"""AdamW, its state and its learning rate.

The learning rate is a pure function of the step, so no scheduler state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import GateError, MachineError
from tunesmith.model.frozen_weight import import_bitsandbytes
from tunesmith.model.machine_errors import OutOfMemory, machine_errors

ScheduleKwargs = Mapping[str, Any]  # PlanConfig.lr_scheduler_kwargs
NO_KWARGS: ScheduleKwargs = {}


def linear(step: int, total_steps: int, kwargs: ScheduleKwargs) -> float:
    del kwargs
    return 1 - step / max(1, total_steps)


def cosine(step: int, total_steps: int, kwargs: ScheduleKwargs) -> float:
    del kwargs
    return 0.5 * (1 + math.cos(math.pi * (step / max(1, total_steps))))


def constant(step: int, total_steps: int, kwargs: ScheduleKwargs) -> float:
    del step, total_steps, kwargs
    return 1.0


def inverse_sqrt(step: int, total_steps: int, kwargs: ScheduleKwargs) -> float:
    del total_steps
    return 1 / math.sqrt(1 + step / kwargs["timescale"])


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def warmup_stable_decay(step: int, total_steps: int, kwargs: ScheduleKwargs) -> float:
    """Return 1, and in the last `num_decay_steps` a decay to `min_lr_ratio`."""
    decayed = step - (total_steps - kwargs["num_decay_steps"])
    if decayed < 0 or not kwargs["num_decay_steps"]:
        return 1.0
    floor = kwargs["min_lr_ratio"]
    return DECAYS[kwargs["decay_type"]](decayed / kwargs["num_decay_steps"]) * (1 - floor) + floor


# Takes a step after warm-up and the number of these; the names are those of transformers.
SCHEDULES: dict[str, Callable[[int, int, ScheduleKwargs], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "constant_with_warmup": constant,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
}


def compute_learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str,
    kwargs: ScheduleKwargs = NO_KWARGS,
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    A linear warmup that ends at `peak`, then the schedule, as in transformers' schedulers: step k
    of the warmup uses peak * k / warmup_steps, or starts at `min_lr_ratio` where there is one."""
    if step < warmup_steps:
        if floor := kwargs.get("min_lr_ratio", 0.0):
            return peak * (step / warmup_steps * (1 - floor) + floor)
        return peak * step / warmup_steps
    return peak * SCHEDULES[schedule](step - warmup_steps, total_steps - warmup_steps, kwargs)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    weight_decay: float,
    kind: str = "adamw",
    rows: Sequence[nn.Parameter] = (),
    rows_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """Return AdamW with betas 0.9 and 0.999 and eps 1e-8.

    `step_optimizer` sets the learning rate of each step; `rows` (of new tokens) use
    `rows_lr_factor` times it. Only matrices decay, as in transformers' Trainer: 0 is no better
    value for a norm or a bias. A DoRA magnitude, which the Trainer does decay, starts at the norm
    of a row of the base weight and does not decay here."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        if all(parameter is not row for row in rows):
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": list(rows), "weight_decay": weight_decay, "lr_factor": rows_lr_factor},
    ]
    return OPTIMIZERS[kind]([group for group in groups if group["params"]])


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, both moments in fp32."""
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def adamw_8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW (Dettmers 2022).

    Moments have 8 bits and an fp32 scale per 256 values; those of fewer than 4,096 weights have 32
    bits. On CUDA they are paged. Raise InputError without bitsandbytes."""
    library = import_bitsandbytes().optim
    on_cuda = groups[0]["params"][0].device.type == "cuda"
    return (library.PagedAdamW8bit if on_cuda else library.AdamW8bit)(groups, lr=0.0)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
}
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


def get_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the moments of a parameter; empty before its first update."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in MOMENTS if name in state}


@torch.no_grad()
def compute_last_update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
    """Return what the last update added to a parameter, weight decay aside.

    It is derived from AdamW's moments; None before the first update and with 8-bit moments."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg" not in state:
        return None
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            beta1, beta2 = group["betas"]
            updates = float(state["step"])
            mean = state["exp_avg"] / (1 - beta1**updates)
            square = state["exp_avg_sq"] / (1 - beta2**updates)
            return -group["lr"] * mean / (square.sqrt() + group["eps"])
    return None


def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    tensors: dict[str, Tensor],
    updates: int,
) -> None:
    """Set the moments of a parameter and its number of updates."""
    if isinstance(optimizer, torch.optim.AdamW):
        # Copies: the tensors may be mapped from the checkpoint file, which would change with them.
        copies = {name: tensor.to(parameter.device, copy=True) for name, tensor in tensors.items()}
        # where torch puts it: the fused step refuses a mixture of devices
        updates_made = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = {"step": updates_made, **copies}
        return
    bnb_optimizer: Any = optimizer  # bitsandbytes makes its tables with the first state
    for group_index, group in enumerate(bnb_optimizer.param_groups):
        for parameter_index, p in enumerate(group["params"]):
            if p is parameter:
                bnb_optimizer.init_state(group, p, group_index, parameter_index)
    for name, tensor in tensors.items():
        bnb_optimizer.state[parameter][name].copy_(tensor)
    bnb_optimizer.state[parameter]["step"] = updates


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    combine_norms: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """Clip the global gradient norm to `max_norm` (0: do not clip); return the norm before, which
    stays on its device. `combine_norms` returns the norm of all pieces from that of these."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient]
    norm = combine_norms(torch.nn.utils.get_total_norm(gradients))  # pyright: ignore
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm or math.inf, norm)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of each group, from which `compute_last_update` derives the update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def step_optimizer(
    optimizer: torch.optim.Optimizer, learning_rate: float, should_skip: Tensor | None = None
) -> None:
    """Update all parameters that have a gradient with this learning rate.

    torch's AdamW changes nothing where `should_skip`, a boolean on its device, is true: a GPU
    decides that itself, so nobody waits for the value before the update is launched."""
    set_learning_rate(optimizer, learning_rate)
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # torch's name for what a gradient scaler found; None for none
    optimizer.found_inf = None if should_skip is None else should_skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.found_inf = None  # type: ignore[attr-defined]
    # The fused step writes without telling autograd, but values that are cached per weight version
    # must notice (Fp32MasterLinear).
    for parameter in updated:
        torch.autograd.graph.increment_version(parameter)


# ---------------------------------------------------------------- fp16


SCALE_KIND = "loss scale"  # of the events of repeated steps
INITIAL_SCALE = 65536.0  # as in torch's GradScaler
GROWTH_STEPS = 2000
MAX_SCALE = 2.0**24
MIN_SCALE = 1.0  # below, gradients overflow without any scale


@dataclass
class LossScale:
    """The factor by which a loss in fp16 is multiplied before its backward.

    fp16 ends at 65,504 and has no values below 6e-8, to which most gradients of activations would
    be rounded. A scale lifts them (Micikevicius et al. 2018, section 3.2). It is a power of two, so
    it rounds nothing itself. A step whose gradients overflow is repeated with half the scale: no
    row is lost, unlike with torch's GradScaler, which leaves such steps out. `finite_steps` counts
    the updates since it last changed, `overflows` how often a step was repeated."""

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


# ---------------------------------------------------------------- steps in the backward


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
