"""Trained weights as files: a PEFT folder for an adapter, a transformers folder for a fully trained model.

Both hold what serving must know to behave as training did: the tokenizer, the chat template and the end tokens. Weights
are safetensors, never pickles. Left out: optimizer state (train/checkpoint.py), merging and other formats (export).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.errors import InputError
from tunesmith.model.adapters import lora_layers
from tunesmith.model.files import TEMPLATES
from tunesmith.model.folder import read_header
from tunesmith.model.tensorfile import first_not_finite, write_tensors

PEFT_PREFIX = "base_model.model."
SERVING_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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
    stored, present = read_adapter_tensors(file), adapter_tensors(network)
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


def read_adapter_tensors(file: Path) -> dict[str, Tensor]:
    """By PEFT's names. InputError for a damaged file and for values that are not finite."""
    read_header(file)
    tensors = load_file(file)
    if name := first_not_finite(tensors):
        fix = "train the adapter again; nothing can go on from it"
        raise InputError(f"the tensor {name} holds values that are not finite", where=str(file), fix=fix)
    return tensors


@contextmanager
def beside_stock(network: nn.Module, file: Path, scale: float) -> Iterator[None]:
    """The stock network with the adapter of `file` inside the block, as PEFT adds it: W x + scale * B A x, each linear
    by itself, in fp32. The oracle of a run that goes on with an adapter."""
    tensors, hooks = read_adapter_tensors(file), []
    paths = {key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in tensors}
    for path in sorted(paths):
        linear: Any = network.get_submodule(path)
        a, b = (tensors[f"{PEFT_PREFIX}{path}.lora_{half}.weight"].to(linear.weight.device).float() for half in "AB")
        hooks.append(linear.register_forward_hook(functools.partial(_add, a_RI=a, b_OR=b, scale=scale)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, *, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return out + (scale * F.linear(F.linear(inputs[0].float(), a_RI), b_OR)).to(out.dtype)


def save_model(network: nn.Module, folder: Path, base: Path, dtype: torch.dtype) -> None:
    """Writes all weights in `dtype` under their stock names, beside the base's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in network.named_parameters()}
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")


def save_serving_files(folder: Path, base: Path, *, templates: Mapping[str, str], end_ids: Sequence[int]) -> None:
    """The tokenizer, the chat templates that were trained with (by name), and the end tokens that were trained."""
    for name in SERVING_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name, source in templates.items():
        place = folder / "chat_template.jinja" if name == "default" else folder / TEMPLATES / f"{name}.jinja"
        place.parent.mkdir(exist_ok=True)
        place.write_text(source, encoding="utf-8", newline="")
    generation_file = base / "generation_config.json"
    generation = json.loads(generation_file.read_text(encoding="utf-8")) if generation_file.is_file() else {}
    generation["eos_token_id"] = list(end_ids)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
