"""How large an adapter has become, and how large its last step was, both beside the weights that it stands beside.

In: a network whose layers are ours, its optimizer. Out: a share a layer. Products of low rank are measured through
their small factors: |U V|^2 = sum of (U'U) * (V V'), so no matrix of the size of a weight is made. Without an adapter:
the last step of each trained matrix beside the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.model.adapters import lora_layers, trainable
from tunesmith.train.optimizer import last_step


def weight_norms(network: nn.Module) -> dict[str, float]:
    """Of the frozen weight beside each adapter; they do not change, so they are measured once."""
    return {path: float(layer.frozen.weight.float().norm()) for path, layer in lora_layers(network).items()}


@torch.no_grad()
def adapter_shares(network: nn.Module, weights: dict[str, float]) -> dict[str, float]:
    """||scale B A|| / ||W|| of each layer (rules.md 6.1: an alarm above a half)."""
    layers = lora_layers(network)
    return {
        path: abs(layer.scale) * product_norm(layer.lora_B, layer.lora_A) / max(weights[path], 1e-12)
        for path, layer in layers.items()
    }


@torch.no_grad()
def update_shares(network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, float]) -> dict[str, float]:
    """What the last step changed of each layer's weight, over its norm: scale (dB A + B dA) beside W, or dW beside W.
    Empty before the first step, and where the optimizer keeps its moments in 8 bits."""
    layers = lora_layers(network)
    found: dict[str, float] = {}
    for path, layer in layers.items():
        step_A, step_B = last_step(optimizer, layer.lora_A), last_step(optimizer, layer.lora_B)
        if step_A is not None and step_B is not None:
            left, right = torch.cat([step_B, layer.lora_B], dim=1), torch.cat([layer.lora_A, step_A])
            found[path] = abs(layer.scale) * product_norm(left, right) / max(weights[path], 1e-12)
    if not layers:
        for name, parameter in trainable(network).items():
            step = last_step(optimizer, parameter) if parameter.ndim > 1 else None
            if step is not None:
                found[name] = float(step.norm() / parameter.norm().clamp(min=1e-12))
    return found


def product_norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of left [O, R] @ right [R, I]."""
    left, right = left.double(), right.double()
    return float(((left.t() @ left) * (right @ right.t())).sum().clamp(min=0).sqrt())
