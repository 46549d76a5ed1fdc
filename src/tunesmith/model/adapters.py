"""What is trained: a low-rank adapter beside a frozen base, or every weight. And the adapter as files.

In: a stock network. `METHODS` makes its trainable part in place; `save_adapter` writes a PEFT folder that PEFT, vLLM and
llama.cpp converters read, `load_adapter` reads one back into a network that already has the same shape of adapter.
Left out: quantised bases, the maths of the layers (lora.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import InputError
from tunesmith.model.lora import LoraLinear, MasterLinear

PEFT_PREFIX = "base_model.model."


def linears(network: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> linear layer inside the decoder: everything but the head."""
    head = network.get_output_embeddings()
    return {p: m for p, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head}


def select(paths: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The paths that `lora_target_modules` asks for: "all-linear", or names such as q_proj or layers.0.mlp.up_proj."""
    if targets == "all-linear":
        return list(paths)
    names = [targets] if isinstance(targets, str) else list(targets)
    matches = {name: [p for p in paths if p == name or p.endswith("." + name)] for name in names}
    missing = [name for name, found in matches.items() if not found]
    if missing:
        available = sorted({p.rsplit(".", 1)[-1] for p in paths})
        raise InputError(
            f"no linear layer is called {', '.join(missing)}",
            where="lora_target_modules",
            fix=f"use all-linear or names from: {', '.join(available)}",
        )
    chosen = {p for found in matches.values() for p in found}
    return [p for p in paths if p in chosen]


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def add_lora(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """An adapter on every chosen linear; B = 0, so the network's output is unchanged. Scale as PEFT: alpha / r, with
    rsLoRA alpha / sqrt(r)."""
    rank, alpha = settings["lora_r"], settings["lora_alpha"]
    scale = alpha / (rank**0.5 if settings["use_rslora"] else rank)
    generator = torch.Generator().manual_seed(settings["seed"])
    found = linears(network)
    for path in select(list(found), settings["lora_target_modules"]):
        module = LoraLinear(found[path], rank=rank, scale=scale, dropout=settings["lora_dropout"], generator=generator)
        _replace(network, path, module)


def train_all(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Every weight becomes a trainable master of at least fp32; products still run in the compute dtype."""
    del settings
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    for path, linear in linears(network).items():
        _replace(network, path, MasterLinear(linear))


METHODS = {"lora": add_lora, "full": train_all}


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, tied ones once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    return {path: module for path, module in network.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def adapter_scaled(network: nn.Module, factor: float) -> Iterator[None]:
    """The adapter times `factor` inside the block: 0 is the base model, 1 the trained one. Nothing is copied."""
    layers = list(lora_layers(network).values())
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale *= factor
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(network).items():
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    return tensors


def save_adapter(network: nn.Module, folder: Path, settings: dict[str, Any], base_model: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings["lora_r"],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"],
        "use_rslora": settings["use_rslora"],
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in lora_layers(network)})
        if settings["lora_target_modules"] == "all-linear"
        else sorted(lora_layers(network)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(adapter_tensors(network), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(network: nn.Module, file: Path) -> None:
    """Reads adapter weights into the adapter that `add_lora` made; names and shapes must be the same."""
    stored, present = load_file(file), adapter_tensors(network)
    if stored.keys() != present.keys():
        odd = sorted(stored.keys() ^ present.keys())
        raise InputError(
            f"the adapter has other layers than this model: {odd[0]} and {len(odd) - 1} more", where=str(file)
        )
    for path, layer in lora_layers(network).items():
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            key = f"{PEFT_PREFIX}{path}.{name}.weight"
            if stored[key].shape != parameter.shape:
                raise InputError(f"{key} is {tuple(stored[key].shape)}, not {tuple(parameter.shape)}", where=str(file))
            parameter.data.copy_(stored[key])
