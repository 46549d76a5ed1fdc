"""The trainable part of a model: a low-rank adapter on a frozen base, or every weight.

In: a stock network and the plan's values. `METHODS` adds the trainable part in place. Left out:
quantizing the base (quantization.py), the maths of the layers (lora.py, dora.py), which layers
(target_modules.py), rows of new tokens (new_embeddings.py), files (save.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.core.errors import InputError
from tunesmith.model.experts import ExpertLora, Experts, is_stock_experts
from tunesmith.model.hub.adapter_config import compute_scaling
from tunesmith.model.hub.expert_names import is_target_parameter
from tunesmith.model.lora import Fp32MasterLinear, LoraLinear, QuantizedLinear
from tunesmith.model.new_embeddings import NewTokenRows, add_trainable_rows
from tunesmith.model.target_modules import (
    ROUTER,
    SETTING,
    find_layer,
    find_part,
    select_targets,
)
from tunesmith.model.trained_modules import TrainedModules, train_modules
from tunesmith.model.weight_shards import gather_parents


def find_linears(network: PreTrainedModel) -> dict[str, nn.Linear | QuantizedLinear]:
    """Return path -> linear of the decoder layers, without routers, which stay as they are."""
    linears: dict[str, nn.Linear | QuantizedLinear] = {}
    for path, module in network.named_modules():
        is_target = find_layer(path) is not None and find_part(path) != ROUTER
        if is_target and isinstance(module, nn.Linear | QuantizedLinear):
            linears[path] = module
    return linears


def find_expert_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of all experts of a layer, transformers' or ours."""
    modules: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if isinstance(module, Experts) or is_stock_experts(module):
            modules[path] = module
    return modules


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
    stacks = find_expert_modules(network)
    model_type = network.config.get_text_config().model_type
    targets = select_targets([*linears, *stacks], settings["lora_target_modules"], model_type)
    parameters = [
        path for path in targets if is_target_parameter(path, model_type, has_experts=bool(stacks))
    ]
    _check_target_parameters(parameters, settings)
    for path in targets:
        rank: int = ranks[path] if path in ranks else settings["lora_r"]
        alpha: float = alphas[path] if path in alphas else settings["lora_alpha"]
        scale = compute_scaling(rank, alpha, use_rslora=settings["use_rslora"])
        if path not in linears or settings["use_dora"]:
            gather_parents(network, f"{path}.weight")  # the adapter starts from the weights
        if path not in linears:
            replace_experts(network, path).add_lora(rank=rank, scale=scale, generator=generator)
            continue
        layer = LoraLinear(
            linears[path],
            rank=rank,
            scale=scale,
            dropout=settings["lora_dropout"],
            generator=generator,
            dora=settings["use_dora"],
        )
        replace_module(network, path, layer)
    if "add_tokens" in settings:
        token_ids = list(settings["add_tokens"].values())
        add_trainable_rows(network, token_ids, settings["new_rows_modules"])


def _check_target_parameters(parameters: Sequence[str], settings: dict[str, Any]) -> None:
    """Raise InputError for what PEFT's `target_parameters` cannot do: it changes weights, so there
    is no input to drop, and it has no DoRA."""
    for key in ("lora_dropout", "use_dora"):
        if settings[key] and parameters:
            message = f"{key} is {settings[key]}, but an adapter of {parameters[0]} has none"
            fix = f"leave {key} out, or set {SETTING}: attention"
            raise InputError(message, where=key, fix=fix)


def replace_experts(network: nn.Module, path: str) -> Experts:
    """Return our module of experts at a path, which replaces that of transformers."""
    module = network.get_submodule(path)
    if not isinstance(module, Experts):
        module = Experts(module)
        replace_module(network, path, module)
    return module


def make_all_trainable(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Turn every weight into a trainable master of at least fp32; products still run in the compute
    dtype.

    Raises InputError for a model with experts, which have no gradient of their own here."""
    del settings
    if find_expert_modules(network):
        message = f"full does not train the experts of {type(network).__name__}"
        fix = f"use method: lora; {SETTING}: [attention, experts] adapts the experts too"
        raise InputError(message, where="method", fix=fix)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    for path, linear in find_linears(network).items():
        assert isinstance(linear, nn.Linear), "a quantized weight cannot be trained"
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


ScaledLayer = LoraLinear | ExpertLora | NewTokenRows | TrainedModules


def _find_scaled_layers(network: nn.Module) -> list[ScaledLayer]:
    return [module for module in network.modules() if isinstance(module, ScaledLayer)]


@contextmanager
def scaled_adapter(network: nn.Module, factor: float) -> Iterator[None]:
    """Apply `scale_adapter` inside the block."""
    scales = get_adapter_scales(network)
    try:
        scale_adapter(network, factor)
        yield
    finally:
        set_adapter_scales(network, scales)


def get_adapter_scales(network: nn.Module) -> list[float]:
    """Return the scale of each adapted layer, for `set_adapter_scales`."""
    return [layer.scale for layer in _find_scaled_layers(network)]


def set_adapter_scales(network: nn.Module, scales: Sequence[float]) -> None:
    """Set the scale of each adapted layer."""
    for layer, scale in zip(_find_scaled_layers(network), scales, strict=True):
        layer.scale = scale
