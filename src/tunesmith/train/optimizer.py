"""AdamW, its state and its learning rate. The rate is a pure function of the step, so nothing of
the schedule needs saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.frozen_weight import import_bitsandbytes


def linear(progress: float) -> float:
    return 1 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    del progress
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
}


def compute_learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str
) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear warm-up that ends at `peak`, then
    the schedule down to 0 after the last step. Same as transformers' schedulers: step k uses factor
    k / warmup_steps while warming up."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * SCHEDULES[schedule]((step - warmup_steps) / max(1, total_steps - warmup_steps))


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    weight_decay: float,
    kind: str = "adamw",
    rows: Sequence[nn.Parameter] = (),
    rows_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW, betas 0.9 and 0.999, eps 1e-8; the learning rate is given with each `update`, and
    `rows` take `rows_times` of it. Only matrices decay, as in transformers' Trainer: 0 is no better
    value for a norm or a bias. Nor for a magnitude of DoRA, where the Trainer does decay: it starts
    at the length of a row of the base."""
    other_parameters = [p for p in parameters if all(p is not row for row in rows)]
    groups = [
        {
            "params": [p for p in other_parameters if p.ndim > 1],
            "weight_decay": weight_decay,
            "times": 1.0,
        },
        {"params": [p for p in other_parameters if p.ndim < 2], "weight_decay": 0.0, "times": 1.0},
        {"params": list(rows), "weight_decay": weight_decay, "times": rows_lr_factor},
    ]
    return OPTIMIZERS[kind]([group for group in groups if group["params"]])


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Fused; both moments in fp32."""
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def adamw_8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Moments in 8 bits with an fp32 scale for 256 of them (Dettmers 2022), those of fewer than
    4,096 weights in fp32; on CUDA in pages that may leave the device. Raises InputError without
    bitsandbytes."""
    library = import_bitsandbytes().optim
    on_device = groups[0]["params"][0].device.type == "cuda"
    return (library.PagedAdamW8bit if on_device else library.AdamW8bit)(groups, lr=0.0)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
}
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


def get_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter; empty before its first update."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in MOMENTS if name in state}


@torch.no_grad()
def compute_last_update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
    """What the last update added to a parameter, weight decay aside, from AdamW's own moments. None
    before the first one, and where moments are kept in 8 bits."""
    state = optimizer.state.get(parameter, {})
    group = next(
        (g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None
    )
    if group is None or "exp_avg" not in state:
        return None
    (beta1, beta2), updates = group["betas"], float(state["step"])
    mean, square = (
        state["exp_avg"] / (1 - beta1**updates),
        state["exp_avg_sq"] / (1 - beta2**updates),
    )
    return -group["lr"] * mean / (square.sqrt() + group["eps"])


def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    tensors: dict[str, Tensor],
    updates: int,
) -> None:
    """The moments of a parameter as they were after `updates`."""
    if isinstance(optimizer, torch.optim.AdamW):
        # Copies: what was read may be the file itself, mapped into memory, and would change with
        # it.
        copies = {name: tensor.to(parameter.device, copy=True) for name, tensor in tensors.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **copies}
        return
    bnb_optimizer: Any = optimizer  # bitsandbytes': its tables come with the first state
    for group_index, group in enumerate(bnb_optimizer.param_groups):
        for parameter_index, p in enumerate(group["params"]):
            if p is parameter:
                bnb_optimizer.init_state(group, p, group_index, parameter_index)
    for name, tensor in tensors.items():
        bnb_optimizer.state[parameter][name].copy_(tensor)
    bnb_optimizer.state[parameter]["step"] = updates


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales the gradients so that their common norm is at most `max_norm` (0: never); returns the
    norm before."""
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), max_norm or math.inf))


def step_optimizer(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step at this learning rate, of all parameters that have a gradient."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["times"]
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer.step()
    # The fused step writes without telling autograd, but what was derived from a weight has to know
    # (MasterLinear).
    for parameter in updated:
        torch.autograd.graph.increment_version(parameter)
