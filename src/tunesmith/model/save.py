"""Trained weights as files: a PEFT folder for an adapter, a transformers folder for a fully trained
model.

Both hold what serving must know to behave as training did: the tokenizer, the chat template and the
end tokens. Weights are safetensors, never pickles. Left out: optimizer state (train/checkpoint.py),
merging and other formats (export). Legend: I inputs, O outputs, R rank."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.core.errors import InputError
from tunesmith.core.types import NewToken
from tunesmith.data.tokenizer.tokenizer_json import append_tokens
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MAGNITUDE,
    PREFIX,
    TOKEN_ROWS_SUFFIX,
    AdapterFolder,
)
from tunesmith.model.hub.files import TEMPLATES_DIR
from tunesmith.model.hub.validate import read_header, read_json
from tunesmith.model.new_embeddings import collect_new_rows
from tunesmith.model.safetensors_io import find_nonfinite, write_tensors

SERVING_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PEFT_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": MAGNITUDE,
}  # ours -> PEFT's


def collect_adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32."""
    return {
        key: parameter.detach().cpu().contiguous()
        for key, parameter in _collect_adapter_parameters(network).items()
    }


def _collect_adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    rows = {
        f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}": rows.rows_KH
        for path, rows in collect_new_rows(network).items()
    }
    return rows | {
        f"{PREFIX}{path}.{PEFT_NAMES[name]}": parameter
        for path, layer in find_lora_layers(network).items()
        for name, parameter in layer.named_parameters()
        if name in PEFT_NAMES
    }


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
        "use_dora": settings["use_dora"],
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in find_lora_layers(network)})
        if settings["lora_target_modules"] == "all-linear"
        else sorted(find_lora_layers(network)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if rows := collect_new_rows(network):
        config["trainable_token_indices"] = {
            path.rpartition(".")[2]: matrix_rows.ids for path, matrix_rows in rows.items()
        }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(
        collect_adapter_tensors(network), folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"}
    )


def rescale_adapter(folder: Path, factor: float, rows: Mapping[str, TokenRowTensors]) -> None:
    """Changes the files of an adapter so that it adds `factor` times as much: `lora_alpha` says so.
    Its weights stay as they are, but for the rows of new tokens, which become those of `rows`."""
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    alpha = config["lora_alpha"] * factor
    config["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if rows:
        tensors = read_adapter_tensors(folder / ADAPTER_WEIGHTS_FILE)
        new_tensors = {
            f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}": matrix_rows.rows_KH.contiguous()
            for path, matrix_rows in rows.items()
        }
        all_tensors = {name: new_tensors.get(name, tensor) for name, tensor in tensors.items()}
        write_tensors(all_tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(network: nn.Module, file: Path) -> None:
    """Reads adapter weights into the adapter that `add_lora` made; names and shapes must be the
    same."""
    stored, present = read_adapter_tensors(file), _collect_adapter_parameters(network)
    if stored.keys() != present.keys():
        mismatched = sorted(stored.keys() ^ present.keys())
        raise InputError(
            f"the adapter has other layers than this model: {mismatched[0]} and {len(mismatched) - 1} more",
            where=str(file),
        )
    for key, parameter in present.items():
        if stored[key].shape != parameter.shape:
            raise InputError(
                f"{key} is {tuple(stored[key].shape)}, not {tuple(parameter.shape)}",
                where=str(file),
            )
        with (
            torch.no_grad()
        ):  # not through `.data`, which would hide the change from what is derived from it
            parameter.copy_(stored[key])


def read_adapter_tensors(file: Path) -> dict[str, Tensor]:
    """By PEFT's names. InputError for a damaged file and for values that are not finite."""
    read_header(file)
    tensors = load_file(file)
    if name := find_nonfinite(tensors):
        fix = "train the adapter again; nothing can go on from it"
        raise InputError(
            f"the tensor {name} holds values that are not finite", where=str(file), fix=fix
        )
    return tensors


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """What an adapter makes of one linear, in fp32: W + scale * B A, its rows as long as
    `magnitude_O` in DoRA."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None

    def scale_by(self, factor: float) -> LoraTensors:
        """Magnitudes stay: a row keeps the length that was trained, and turns less."""
        return replace(self, scale=self.scale * factor)

    def merge_into(self, weight_OI: Tensor) -> Tensor:
        """The adapted weight, from one in fp32 on any device."""
        device = weight_OI.device
        merged_OI = weight_OI + self.scale * (self.b_OR.to(device) @ self.a_RI.to(device))
        if self.magnitude_O is None:
            return merged_OI
        return merged_OI * (self.magnitude_O.to(device) / merged_OI.norm(dim=1))[:, None]


@dataclass(frozen=True, eq=False)
class TokenRowTensors:
    """What an adapter makes of an embedding or a head: rows from `first` on are these, in fp32."""

    first_id: int
    rows_KH: Tensor

    def scale_by(self, factor: float, start_VH: Tensor) -> TokenRowTensors:
        """Between the rows of a matrix where they began, at 0, and what they are, at 1."""
        start_KH = start_VH[self.first_id : self.first_id + len(self.rows_KH)].to(self.rows_KH)
        return replace(self, rows_KH=torch.lerp(start_KH, self.rows_KH, factor))

    def count_rows(self, current_rows: int) -> int:
        """Rows of the matrix, which had `rows`."""
        return max(current_rows, self.first_id + len(self.rows_KH))

    def merge_into(self, weight_VH: Tensor) -> Tensor:
        """The matrix with the rows, from one in fp32 on any device; longer where it was too
        short."""
        padding = weight_VH.new_zeros(
            self.count_rows(len(weight_VH)) - len(weight_VH), weight_VH.shape[1]
        )
        merged_VH = torch.cat((weight_VH, padding))
        merged_VH[self.first_id : self.first_id + len(self.rows_KH)] = self.rows_KH.to(weight_VH)
        return merged_VH


def parse_token_rows(
    tensors: Mapping[str, Tensor], ids: Sequence[int]
) -> dict[str, TokenRowTensors]:
    """By the path of the matrix, from tensors under PEFT's names; `ids` are consecutive."""
    row_tensors = {
        name: tensor for name, tensor in tensors.items() if name.endswith(TOKEN_ROWS_SUFFIX)
    }
    return {
        n.removeprefix(PREFIX).removesuffix(f".{TOKEN_ROWS_SUFFIX}"): TokenRowTensors(
            ids[0], t.float()
        )
        for n, t in row_tensors.items()
    }


def parse_loras(tensors: Mapping[str, Tensor], scale: float) -> dict[str, LoraTensors]:
    """By the path of the linear, from tensors under PEFT's names."""
    loras: dict[str, LoraTensors] = {}
    linear_names = [name for name in tensors if not name.endswith(TOKEN_ROWS_SUFFIX)]
    for path in dict.fromkeys(
        name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in linear_names
    ):
        a_RI, b_OR = (tensors[f"{PREFIX}{path}.lora_{half}.weight"].float() for half in "AB")
        magnitude_O = tensors.get(f"{PREFIX}{path}.{MAGNITUDE}")
        loras[path] = LoraTensors(
            a_RI, b_OR, scale, None if magnitude_O is None else magnitude_O.float()
        )
    return loras


@contextmanager
def stock_with_adapter(network: nn.Module, adapter: AdapterFolder) -> Iterator[None]:
    """The stock network with an adapter inside the block, as PEFT adds it: W x + scale * B A x,
    each linear by itself, in fp32; with magnitudes, times them over the norms of W + scale * B A;
    rows of new tokens in their matrices. The oracle of a run that goes on with an adapter."""
    tensors, hooks = read_adapter_tensors(adapter.weights_path), []
    for path, lora in parse_loras(tensors, adapter.scaling).items():
        hooks.append(
            network.get_submodule(path).register_forward_hook(
                functools.partial(_add_adapter_output, lora=lora)
            )
        )
    matrices: list[tuple[Tensor, Tensor]] = []
    for path, rows in parse_token_rows(tensors, adapter.new_token_ids).items():
        current_KH = network.get_parameter(f"{path}.weight").detach()[
            rows.first_id : rows.first_id + len(rows.rows_KH)
        ]
        matrices.append((current_KH, current_KH.clone()))
        current_KH.copy_(rows.rows_KH)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for current_KH, original_KH in matrices:
            current_KH.copy_(original_KH)


def _add_adapter_output(
    linear: Any, inputs: tuple[Tensor, ...], out: Tensor, *, lora: LoraTensors
) -> Tensor:
    a_RI, b_OR = (half.to(out.device) for half in (lora.a_RI, lora.b_OR))
    delta = lora.scale * F.linear(F.linear(inputs[0].float(), a_RI), b_OR)
    if lora.magnitude_O is None:
        return out + delta.to(out.dtype)
    weight, bias = linear.weight.float(), 0 if linear.bias is None else linear.bias.float()
    gain_O = lora.magnitude_O.to(out.device) / (weight + lora.scale * (b_OR @ a_RI)).norm(dim=1)
    return (gain_O * (out.float() - bias + delta) + bias).to(out.dtype)


def save_model(network: nn.Module, folder: Path, base: Path, dtype: torch.dtype) -> None:
    """Writes all weights in `dtype` under their stock names, beside the base's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: p.detach().to("cpu", dtype).contiguous() for name, p in network.named_parameters()
    }
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(folder, base, len(network.get_input_embeddings().weight))  # type: ignore[operator]


def save_config(folder: Path, base: Path, vocab_size: int) -> None:
    """The base's config.json for an embedding of so many rows."""
    config = read_json(base / "config.json")
    if config["vocab_size"] == vocab_size:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        text = json.dumps(config | {"vocab_size": vocab_size}, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def save_serving_files(
    folder: Path,
    base: Path,
    *,
    templates: Mapping[str, str],
    end_ids: Sequence[int],
    new_tokens: Sequence[NewToken] = (),
) -> None:
    """The tokenizer with the `new` tokens, the chat templates that were trained with (by name), and
    the end tokens that were trained."""
    for name in SERVING_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if new_tokens:
        (folder / "tokenizer.json").write_bytes(
            append_tokens((base / "tokenizer.json").read_bytes(), new_tokens)
        )
    for name, source in templates.items():
        template_file = (
            folder / "chat_template.jinja"
            if name == "default"
            else folder / TEMPLATES_DIR / f"{name}.jinja"
        )
        template_file.parent.mkdir(exist_ok=True)
        template_file.write_text(source, encoding="utf-8", newline="")
    generation_file = base / "generation_config.json"
    generation = (
        json.loads(generation_file.read_text(encoding="utf-8")) if generation_file.is_file() else {}
    )
    generation["eos_token_id"] = list(end_ids)
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
