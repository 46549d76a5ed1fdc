"""How large an adapter has become, and how large its last step was, both beside the weights that it
stands beside.

In: a network whose layers are ours, its optimizer. Out: a share a layer. Products of low rank are
measured through their small factors: |U V|^2 = sum of (U'U) * (V V'), so no matrix of the size of a
weight is made. Without an adapter: the last step of each trained matrix beside the matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.model.adapters import find_lora_layers, get_trainable_parameters
from tunesmith.train.optimizer import compute_last_update


def compute_weight_norms(network: nn.Module) -> dict[str, float]:
    """Of the frozen weight beside each adapter; they do not change, so they are measured once."""
    return {
        path: float(layer.frozen.weight.float().norm())
        for path, layer in find_lora_layers(network).items()
    }


@torch.no_grad()
def compute_adapter_ratios(network: nn.Module, base_norms: dict[str, float]) -> dict[str, float]:
    """||scale B A|| / ||W|| of each layer (rules.md 6.1: an alarm above a half)."""
    layers = find_lora_layers(network)
    return {
        path: abs(layer.scale)
        * compute_product_norm(layer.lora_B, layer.lora_A)
        / max(base_norms[path], 1e-12)
        for path, layer in layers.items()
    }


@torch.no_grad()
def compute_update_ratios(
    network: nn.Module, optimizer: torch.optim.Optimizer, base_norms: dict[str, float]
) -> dict[str, float]:
    """What the last step changed of each layer's weight, over its norm: scale (dB A + B dA) beside
    W, or dW beside W. Empty before the first step, and where the optimizer keeps its moments in 8
    bits."""
    layers = find_lora_layers(network)
    ratios: dict[str, float] = {}
    for path, layer in layers.items():
        step_A, step_B = (
            compute_last_update(optimizer, layer.lora_A),
            compute_last_update(optimizer, layer.lora_B),
        )
        if step_A is not None and step_B is not None:
            stacked_B, stacked_A = (
                torch.cat([step_B, layer.lora_B], dim=1),
                torch.cat([layer.lora_A, step_A]),
            )
            ratios[path] = (
                abs(layer.scale)
                * compute_product_norm(stacked_B, stacked_A)
                / max(base_norms[path], 1e-12)
            )
    if not layers:
        for name, parameter in get_trainable_parameters(network).items():
            step = compute_last_update(optimizer, parameter) if parameter.ndim > 1 else None
            if step is not None:
                ratios[name] = float(step.norm() / parameter.norm().clamp(min=1e-12))
    return ratios


def compute_product_norm(factor_OR: Tensor, factor_RI: Tensor) -> float:
    """The Frobenius norm of left [O, R] @ right [R, I]."""
    factor_OR, factor_RI = factor_OR.double(), factor_RI.double()
    return float(
        ((factor_OR.t() @ factor_OR) * (factor_RI @ factor_RI.t())).sum().clamp(min=0).sqrt()
    )
