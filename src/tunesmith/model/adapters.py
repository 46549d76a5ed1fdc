"""The trainable part of a model: a low-rank adapter on a frozen base, or every weight.

In: a stock network and the plan's values. `METHODS` adds the trainable part in place. Left out:
quantising the base (quantization.py), the maths of the layers (lora.py, dora.py), which layers
(target_modules.py), rows of new tokens (new_embeddings.py), files (save.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.model.hub.adapter_config import compute_scaling
from tunesmith.model.lora import Fp32MasterLinear, LoraLinear, QuantizedLinear
from tunesmith.model.new_embeddings import NewTokenRows, add_trainable_rows
from tunesmith.model.target_modules import select_targets
from tunesmith.model.trained_modules import TrainedModules, train_modules


def find_linears(network: PreTrainedModel) -> dict[str, nn.Linear | QuantizedLinear]:
    """Return path -> linear layer of everything but the head."""
    head = network.get_output_embeddings()
    linears: dict[str, nn.Linear | QuantizedLinear] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear) and module is not head:
            linears[path] = module
    return linears


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def add_lora(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Add an adapter to every target linear, trainable rows for new tokens, and make the modules to
    save trainable: those have no adapter.

    B is 0, so the output of the network is unchanged."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if "rank_pattern" in settings:
        ranks |= settings["rank_pattern"]
    if "alpha_pattern" in settings:
        alphas |= settings["alpha_pattern"]
    generator = torch.Generator().manual_seed(settings["seed"])
    if settings.get("modules_to_save"):
        train_modules(network, settings["modules_to_save"])
    linears = find_linears(network)
    for path in select_targets(list(linears), settings["lora_target_modules"]):
        rank: int = ranks[path] if path in ranks else settings["lora_r"]
        alpha: float = alphas[path] if path in alphas else settings["lora_alpha"]
        layer = LoraLinear(
            linears[path],
            rank=rank,
            scale=compute_scaling(rank, alpha, use_rslora=settings["use_rslora"]),
            dropout=settings["lora_dropout"],
            generator=generator,
            dora=settings["use_dora"],
        )
        replace_module(network, path, layer)
    if "add_tokens" in settings:
        token_ids = list(settings["add_tokens"].values())
        add_trainable_rows(network, token_ids, settings["new_rows_modules"])


def make_all_trainable(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Turn every weight into a trainable master of at least fp32; products still run in the compute
    dtype."""
    del settings
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    for path, linear in find_linears(network).items():
        assert isinstance(linear, nn.Linear), "a quantised weight cannot be trained"
        replace_module(network, path, Fp32MasterLinear(linear))


METHODS = {"lora": add_lora, "qlora": add_lora, "full": make_all_trainable}


def get_trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> trainable parameter, tied ones once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def copy_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights, for `restore_weights`."""
    copies: dict[str, torch.Tensor] = {}
    for name, parameter in get_trainable_parameters(network).items():
        copies[name] = parameter.detach().clone()
    return copies


@torch.no_grad()
def restore_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write weights from `copy_weights` back."""
    for name, parameter in get_trainable_parameters(network).items():
        # not through `.data`, which would hide the change from Fp32MasterLinear
        parameter.copy_(weights[name])


def find_lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    """Return path -> adapted layer."""
    return {path: m for path, m in network.named_modules() if isinstance(m, LoraLinear)}


def scale_adapter(network: nn.Module, factor: float) -> None:
    """Multiply the adapter's scale by `factor`: 0 gives the base model, 1 the trained one. Rows of
    new tokens and modules trained in full are interpolated from their start."""
    for layer in _find_scaled_layers(network):
        layer.scale *= factor


ScaledLayer = LoraLinear | NewTokenRows | TrainedModules


def _find_scaled_layers(network: nn.Module) -> list[ScaledLayer]:
    return [module for module in network.modules() if isinstance(module, ScaledLayer)]


@contextmanager
def scaled_adapter(network: nn.Module, factor: float) -> Iterator[None]:
    """Apply `scale_adapter` inside the block."""
    layers = _find_scaled_layers(network)
    scales = [layer.scale for layer in layers]
    try:
        scale_adapter(network, factor)
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
