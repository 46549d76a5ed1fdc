"""What is trained: a low-rank adapter beside a frozen base, or every weight.

In: a stock network and the plan's values. `METHODS` makes its trainable part in place. Left out:
how a base becomes quantised (quantized.py), the maths of the layers (lora.py, dora.py), which
layers (targets.py), rows of new tokens (new_rows.py), files (saved.py)."""

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


def find_linears(network: PreTrainedModel) -> dict[str, nn.Linear | QuantizedLinear]:
    """Path -> linear layer inside the decoder: everything but the head."""
    head = network.get_output_embeddings()
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and module is not head
    }


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def add_lora(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """An adapter on every chosen linear; B = 0, so the network's output is unchanged. Scale as
    PEFT: alpha / r, with rsLoRA alpha / sqrt(r). With new tokens their rows too."""
    lora_kwargs: dict[str, Any] = {
        "rank": settings["lora_r"],
        "scale": compute_scaling(
            settings["lora_r"], settings["lora_alpha"], use_rslora=settings["use_rslora"]
        ),
        "dropout": settings["lora_dropout"],
        "generator": torch.Generator().manual_seed(settings["seed"]),
        "dora": settings["use_dora"],
    }
    layers = find_linears(network)
    for path in select_targets(list(layers), settings["lora_target_modules"]):
        replace_module(network, path, LoraLinear(layers[path], **lora_kwargs))
    if "add_tokens" in settings:
        add_trainable_rows(
            network, list(settings["add_tokens"].values()), settings["modules_to_save"]
        )


def make_all_trainable(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Every weight becomes a trainable master of at least fp32; products still run in the compute
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
    """Name -> parameter, tied ones once."""
    return {
        name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
    }


def copy_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what is trained, for `put_back`."""
    return {
        name: parameter.detach().clone()
        for name, parameter in get_trainable_parameters(network).items()
    }


@torch.no_grad()
def restore_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in get_trainable_parameters(network).items():
        parameter.copy_(
            weights[name]
        )  # not through `.data`, which would hide the change from MasterLinear


def find_lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    return {
        path: module for path, module in network.named_modules() if isinstance(module, LoraLinear)
    }


def scale_adapter(network: nn.Module, factor: float) -> None:
    """The adapter times `factor`: 0 is the base model, 1 the trained one. Rows of new tokens go
    from their start to what they are. Nothing is copied."""
    for layer in _find_scaled_layers(network):
        layer.scale *= factor


def _find_scaled_layers(network: nn.Module) -> list[LoraLinear | NewTokenRows]:
    return [module for module in network.modules() if isinstance(module, LoraLinear | NewTokenRows)]


@contextmanager
def scaled_adapter(network: nn.Module, factor: float) -> Iterator[None]:
    """The adapter times `factor` inside the block, as `scale_adapter` makes it."""
    layers = _find_scaled_layers(network)
    scales = [layer.scale for layer in layers]
    try:
        scale_adapter(network, factor)
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
