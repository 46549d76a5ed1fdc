"""Norms of updates, relative to the weights that they modify.

In: a network with our layers, and its optimizer. Out: a ratio per layer. Low-rank products are
measured through their small factors, ||U V||^2 = sum of (U'U) * (V V'), so no matrix of the size of
a weight is made. Without an adapter: the last update of each trained matrix over the matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunesmith.core.ranks import Ranks
from tunesmith.model.adapters import find_lora_layers, get_trainable_parameters
from tunesmith.model.compare_layers import read_weight
from tunesmith.model.experts import ExpertLora, find_expert_loras, split_experts
from tunesmith.model.lora import LoraLinear
from tunesmith.train.optimizer import compute_last_update

MIN_NORM = 1e-12


AdaptedLayer = LoraLinear | ExpertLora


def compute_weight_norms(network: nn.Module) -> dict[str, float]:
    """Return the Frobenius norm of the frozen weight of each adapted layer, which never changes."""
    norms: dict[str, float] = {}
    for path in find_lora_layers(network):
        norms[path] = float(read_weight(network, f"{path}.weight").float().norm())
    for path, lora in find_expert_loras(network).items():
        matrices = (lora.frozen.get_matrix(expert) for expert in range(lora.num_experts))
        norms[path] = math.hypot(*(float(matrix.float().norm()) for matrix in matrices))
    return norms


def _find_layers(network: nn.Module) -> dict[str, AdaptedLayer]:
    return {**find_lora_layers(network), **find_expert_loras(network)}


def _split_factors(layer: AdaptedLayer, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A of a layer, of a stack of experts one pair per expert."""
    if isinstance(layer, LoraLinear):
        return b, a
    factor_A, factor_B = split_experts(a, b, layer.num_experts)
    return factor_B, factor_A


@torch.no_grad()
def compute_update_ratios(
    network: nn.Module, optimizer: torch.optim.Optimizer, base_norms: dict[str, float]
) -> dict[str, float]:
    """Return the norm of each layer's last update over that of its weight.

    The update is scale (dB A + B dA), or dW without an adapter. Empty before the first step, and
    with 8-bit moments."""
    layers = _find_layers(network)
    ratios: dict[str, float] = {}
    for path, layer in layers.items():
        step_A = compute_last_update(optimizer, layer.lora_A)
        step_B = compute_last_update(optimizer, layer.lora_B)
        if step_A is not None and step_B is not None:
            current_B, current_A = _split_factors(layer, layer.lora_B, layer.lora_A)
            step_B, step_A = _split_factors(layer, step_B, step_A)
            stacked_B = torch.cat([step_B, current_B], dim=-1)
            stacked_A = torch.cat([current_A, step_A], dim=-2)
            norm = abs(layer.scale) * compute_product_norm(stacked_B, stacked_A)
            ratios[path] = norm / max(base_norms[path], MIN_NORM)
    if layers:
        return ratios
    for name, parameter in get_trainable_parameters(network).items():
        step = compute_last_update(optimizer, parameter) if parameter.ndim > 1 else None
        if step is not None:
            ratios[name] = float(step.norm() / parameter.norm().clamp(min=MIN_NORM))
    return ratios


@torch.no_grad()
def sum_update_ratios(
    pieces: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, float]:
    """Return the same of matrices of which each rank trains a piece. All ranks call it."""
    matrices = {name: piece for name, piece in pieces.items() if piece.ndim > 1}
    squares = torch.zeros(2, len(matrices), dtype=torch.float64)
    for index, piece in enumerate(matrices.values()):
        step = compute_last_update(optimizer, piece)
        if step is not None:
            squares[0, index] = step.double().square().sum()
            squares[1, index] = piece.double().square().sum()
    ranks.sum_(squares)  # of all copies: their number is in both sums
    if not squares.any():
        return {}
    norms = squares.sqrt()
    ratios = norms[0] / norms[1].clamp(min=MIN_NORM)
    return dict(zip(matrices, ratios.tolist(), strict=True))


def compute_product_norm(factor_OR: Tensor, factor_RI: Tensor) -> float:
    """Return the Frobenius norm of factor_OR [O, R] @ factor_RI [R, I], of a stack of pairs that of
    all products together."""
    factor_OR = factor_OR.double()
    factor_RI = factor_RI.double()
    squared = ((factor_OR.mT @ factor_OR) * (factor_RI @ factor_RI.mT)).sum()
    return float(squared.clamp(min=0).sqrt())
