"""AdamW, its state and its learning rate.

The learning rate is a pure function of the step, so no scheduler state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.frozen_weight import import_bitsandbytes

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
