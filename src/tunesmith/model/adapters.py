"""What is trained: a low-rank adapter beside a frozen base, or every weight.

In: a stock network and the plan's values. `METHODS` makes its trainable part in place. Left out: how a base becomes
quantised (quantized.py), the maths of the layers (lora.py, dora.py), which layers (targets.py), rows of new tokens
(new_rows.py), files (saved.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.model.hub.adapter_config import scale_of
from tunesmith.model.lora import LoraLinear, MasterLinear, QuantizedLinear
from tunesmith.model.new_embeddings import NewRows, train_rows
from tunesmith.model.target_modules import select


def linears(network: PreTrainedModel) -> dict[str, nn.Linear | QuantizedLinear]:
    """Path -> linear layer inside the decoder: everything but the head."""
    head = network.get_output_embeddings()
    return {p: m for p, m in network.named_modules() if isinstance(m, nn.Linear | QuantizedLinear) and m is not head}


def replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def add_lora(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """An adapter on every chosen linear; B = 0, so the network's output is unchanged. Scale as PEFT: alpha / r, with
    rsLoRA alpha / sqrt(r). With new tokens their rows too."""
    shape: dict[str, Any] = {
        "rank": settings["lora_r"],
        "scale": scale_of(settings["lora_r"], settings["lora_alpha"], rslora=settings["use_rslora"]),
        "dropout": settings["lora_dropout"],
        "generator": torch.Generator().manual_seed(settings["seed"]),
        "dora": settings["use_dora"],
    }
    found = linears(network)
    for path in select(list(found), settings["lora_target_modules"]):
        replace(network, path, LoraLinear(found[path], **shape))
    if "add_tokens" in settings:
        train_rows(network, list(settings["add_tokens"].values()), settings["modules_to_save"])


def train_all(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Every weight becomes a trainable master of at least fp32; products still run in the compute dtype."""
    del settings
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    for path, linear in linears(network).items():
        assert isinstance(linear, nn.Linear), "a quantised weight cannot be trained"
        replace(network, path, MasterLinear(linear))


METHODS = {"lora": add_lora, "qlora": add_lora, "full": train_all}


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, tied ones once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what is trained, for `put_back`."""
    return {name: parameter.detach().clone() for name, parameter in trainable(network).items()}


@torch.no_grad()
def put_back(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in trainable(network).items():
        parameter.copy_(weights[name])  # not through `.data`, which would hide the change from MasterLinear


def lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    return {path: module for path, module in network.named_modules() if isinstance(module, LoraLinear)}


def scale_adapter(network: nn.Module, factor: float) -> None:
    """The adapter times `factor`: 0 is the base model, 1 the trained one. Rows of new tokens go from their start to
    what they are. Nothing is copied."""
    for layer in _scaled_layers(network):
        layer.scale *= factor


def _scaled_layers(network: nn.Module) -> list[LoraLinear | NewRows]:
    return [module for module in network.modules() if isinstance(module, LoraLinear | NewRows)]


@contextmanager
def adapter_scaled(network: nn.Module, factor: float) -> Iterator[None]:
    """The adapter times `factor` inside the block, as `scale_adapter` makes it."""
    layers = _scaled_layers(network)
    scales = [layer.scale for layer in layers]
    try:
        scale_adapter(network, factor)
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
