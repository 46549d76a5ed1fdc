"""Trained weights as files: a PEFT folder for an adapter, a transformers folder for a fully trained model.

Both hold what serving must know to behave as training did: the tokenizer, the chat template and the end tokens. Weights
are safetensors, never pickles. Left out: optimizer state (train/checkpoint.py), merging and other formats (export).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.errors import InputError
from tunesmith.model.adapters import lora_layers
from tunesmith.model.tensorfile import write_tensors

PEFT_PREFIX = "base_model.model."
SERVING_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(network).items():
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    return tensors


def save_adapter(network: nn.Module, folder: Path, settings: dict[str, Any], base: Path) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
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
    write_tensors(adapter_tensors(network), folder / "adapter_model.safetensors", metadata={"format": "pt"})


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


def save_model(network: nn.Module, folder: Path, base: Path, dtype: torch.dtype) -> None:
    """Writes all weights in `dtype` under their stock names, beside the base's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in network.named_parameters()}
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")


def save_serving_files(folder: Path, base: Path, *, template: Path | None, end_ids: Sequence[int]) -> None:
    """The tokenizer, the chat template that was trained with, and the end tokens that were trained."""
    for name in SERVING_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if template is not None:
        shutil.copyfile(template, folder / "chat_template.jinja")
    generation_file = base / "generation_config.json"
    generation = json.loads(generation_file.read_text(encoding="utf-8")) if generation_file.is_file() else {}
    generation["eos_token_id"] = list(end_ids)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
