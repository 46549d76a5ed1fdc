"""Save and load trained weights: a PEFT folder for an adapter, a transformers folder for a full
model.

Both also hold what serving needs to behave as training did: the tokenizer, the chat template and
the end tokens. Weights are safetensors, never pickles. Left out: optimizer state
(train/checkpoint.py), merging (merge.py) and other formats (export). Legend: I inputs, O outputs,
R rank, K new tokens, V vocabulary, H hidden."""

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
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MAGNITUDE,
    PREFIX,
    TOKEN_ROWS_SUFFIX,
    AdapterFolder,
)
from tunesmith.model.hub.validate import TEMPLATES_DIR, read_header, read_model_json
from tunesmith.model.new_embeddings import collect_new_rows
from tunesmith.model.safetensors_io import find_nonfinite, write_tensors
from tunesmith.model.target_modules import EMBEDDING, HEAD
from tunesmith.model.trained_modules import get_trained_modules

STATE_FILE = "state.safetensors"  # trained weights and optimizer moments of a checkpoint
SERVING_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# parameter of a LoraLinear -> PEFT's name
PEFT_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": MAGNITUDE,
}


# ---------------------------------------------------------------- adapter folder


def collect_adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the fp32 tensors of the adapter under PEFT's names, on the CPU."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, parameter in _collect_adapter_parameters(network).items():
        tensor = parameter.detach().cpu().contiguous()
        # a file holds no tensor twice: those of a tied head are copied
        tensors[key] = tensor.clone() if id(parameter) in seen else tensor
        seen.add(id(parameter))
    return tensors


def _collect_adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    for path, rows in collect_new_rows(network).items():
        parameters[f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}"] = rows.rows_KH
    for path, layer in find_lora_layers(network).items():
        for name, parameter in layer.named_parameters():
            if name in PEFT_NAMES:
                parameters[f"{PREFIX}{path}.{PEFT_NAMES[name]}"] = parameter
    if modules := get_trained_modules(network):
        for name, parameter in modules.list_stored_parameters().items():
            parameters[f"{PREFIX}{name}"] = parameter
    return parameters


def save_adapter(network: nn.Module, folder: Path, settings: dict[str, Any], base: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    target_modules = sorted(find_lora_layers(network))
    if settings["lora_target_modules"] == "all-linear":
        target_modules = sorted({path.rpartition(".")[2] for path in target_modules})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings["lora_r"],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"],
        "use_rslora": settings["use_rslora"],
        "use_dora": settings["use_dora"],
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if new_rows := collect_new_rows(network):
        indices = {path.rpartition(".")[2]: rows.ids for path, rows in new_rows.items()}
        config["trainable_token_indices"] = indices
    if modules := get_trained_modules(network):
        names = modules.list_stored_parameters()
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in names})
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := settings.get(key):
            config[key] = pattern
    _write_json(folder / ADAPTER_CONFIG_FILE, config)
    weights_file = folder / ADAPTER_WEIGHTS_FILE
    write_tensors(collect_adapter_tensors(network), weights_file, metadata={"format": "pt"})


def rescale_adapter(
    folder: Path,
    factor: float,
    rows: Mapping[str, TokenRowTensors],
    modules: Mapping[str, ModuleTensor],
) -> None:
    """Scale a saved adapter by `factor` through its `lora_alpha`.

    Its weights are unchanged except for the rows of new tokens and the modules trained in full,
    which are replaced by `rows` and `modules`."""
    config = read_model_json(folder / ADAPTER_CONFIG_FILE)
    config["lora_alpha"] = _scale_alpha(config["lora_alpha"], factor)
    if alphas := config.get("alpha_pattern"):
        scaled = {path: _scale_alpha(alpha, factor) for path, alpha in alphas.items()}
        config["alpha_pattern"] = scaled
    _write_json(folder / ADAPTER_CONFIG_FILE, config)
    if not rows and not modules:
        return
    weights_file = folder / ADAPTER_WEIGHTS_FILE
    tensors = read_adapter_tensors(weights_file)
    for path, matrix_rows in rows.items():
        name = f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}"
        if name in tensors:
            tensors[name] = matrix_rows.rows_KH.contiguous()
    for module_tensor in modules.values():
        tensors[module_tensor.stored_name] = module_tensor.tensor.contiguous()
        if module_tensor.stored_name.endswith(f"{EMBEDDING}.weight") and HEAD not in modules:
            _copy_to_tied_head(tensors, module_tensor)
    write_tensors(tensors, weights_file, metadata={"format": "pt"})


def _copy_to_tied_head(tensors: dict[str, Tensor], embedding: ModuleTensor) -> None:
    name = f"{PREFIX}{HEAD}.weight"
    if name in tensors:
        tensors[name] = embedding.tensor.clone()


def _scale_alpha(alpha: float, factor: float) -> float:
    scaled = alpha * factor
    return int(scaled) if scaled == int(scaled) else scaled


def load_adapter(network: nn.Module, file: Path) -> None:
    """Load weights into the adapter that `add_lora` created. Raise InputError if names or shapes
    differ."""
    stored = read_adapter_tensors(file)
    parameters = _collect_adapter_parameters(network)
    if stored.keys() != parameters.keys():
        mismatched = sorted(stored.keys() ^ parameters.keys())
        message = (
            "the adapter has other layers than this model: "
            f"{mismatched[0]} and {len(mismatched) - 1} more"
        )
        raise InputError(message, where=str(file))
    for key, parameter in parameters.items():
        if stored[key].shape != parameter.shape:
            message = f"{key} has shape {tuple(stored[key].shape)}, not {tuple(parameter.shape)}"
            raise InputError(message, where=str(file))
        # not through `.data`, which would hide the change from tensors derived from the parameter
        with torch.no_grad():
            parameter.copy_(stored[key])


def load_weights(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Load a checkpoint's trained weights into `parameters`, and return all of its tensors.

    Raises InputError when the checkpoint holds other weights than `parameters`.
    """
    tensors = load_file(folder / STATE_FILE)
    stored = {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")}
    if stored != parameters.keys() or any(
        tensors[f"weight.{name}"].shape != parameter.shape for name, parameter in parameters.items()
    ):
        message = "the checkpoint holds other trained weights than this model"
        raise InputError(message, where=str(folder))
    # Not through `.data`: Fp32MasterLinear would not notice the change.
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    return tensors


def read_adapter_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter under PEFT's names. Raise InputError for a damaged file and
    for NaN or infinite values."""
    read_header(file)
    tensors = load_file(file)
    if name := find_nonfinite(tensors):
        message = f"the tensor {name} holds NaN or infinite values"
        raise InputError(message, where=str(file), fix="train the adapter again")
    return tensors


# ---------------------------------------------------------------- adapter tensors by path


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """The adapter of one linear in fp32: W + scale * B A. With DoRA each row is then scaled to the
    length in `magnitude_O`."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None

    def scale_by(self, factor: float) -> LoraTensors:
        """Return the adapter times `factor`. Magnitudes are unchanged: a row keeps its trained
        length and turns less."""
        return replace(self, scale=self.scale * factor)

    def merge_into(self, weight_OI: Tensor) -> Tensor:
        """Return the adapted weight, from an fp32 weight on any device."""
        device = weight_OI.device
        merged_OI = weight_OI + self.scale * (self.b_OR.to(device) @ self.a_RI.to(device))
        if self.magnitude_O is None:
            return merged_OI
        return merged_OI * (self.magnitude_O.to(device) / merged_OI.norm(dim=1))[:, None]


@dataclass(frozen=True, eq=False)
class TokenRowTensors:
    """Trained rows of an embedding or a head in fp32, from row `first_id` on."""

    first_id: int
    rows_KH: Tensor

    def scale_by(self, factor: float, start_VH: Tensor) -> TokenRowTensors:
        """Interpolate between the rows of `start_VH` (factor 0) and the trained rows (1)."""
        start_KH = start_VH[self.first_id : self.first_id + len(self.rows_KH)].to(self.rows_KH)
        return replace(self, rows_KH=torch.lerp(start_KH, self.rows_KH, factor))

    def count_rows(self, current_rows: int) -> int:
        """Return how many rows a matrix of `current_rows` has after the merge."""
        return max(current_rows, self.first_id + len(self.rows_KH))

    def merge_into(self, weight_VH: Tensor) -> Tensor:
        """Return the matrix with the trained rows, from an fp32 matrix on any device. It grows if
        it is too short."""
        num_added = self.count_rows(len(weight_VH)) - len(weight_VH)
        padding = weight_VH.new_zeros(num_added, weight_VH.shape[1])
        merged_VH = torch.cat((weight_VH, padding))
        merged_VH[self.first_id : self.first_id + len(self.rows_KH)] = self.rows_KH.to(weight_VH)
        return merged_VH


@dataclass(frozen=True, eq=False)
class ModuleTensor:
    """A parameter that was trained in full, in fp32; `stored_name` is PEFT's."""

    stored_name: str
    tensor: Tensor

    def scale_by(self, factor: float, start: Tensor) -> ModuleTensor:
        """Interpolate between the base's values `start` (factor 0) and the trained ones (1)."""
        return replace(self, tensor=torch.lerp(start.to(self.tensor), self.tensor, factor))

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return the trained values on the device of an fp32 tensor."""
        return self.tensor.to(weight)


def parse_module_tensors(
    tensors: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, ModuleTensor]:
    """Return path of the module, or the full name of a bias -> trained values, from tensors under
    PEFT's names."""
    parsed: dict[str, ModuleTensor] = {}
    for name in names:
        stored_name = f"{PREFIX}{name}"
        key = name.removesuffix(".weight")
        parsed[key] = ModuleTensor(stored_name, tensors[stored_name].float())
    return parsed


def parse_token_rows(
    tensors: Mapping[str, Tensor], ids: Sequence[int]
) -> dict[str, TokenRowTensors]:
    """Return path of the matrix -> rows, from tensors under PEFT's names. `ids` are consecutive."""
    rows: dict[str, TokenRowTensors] = {}
    for name, tensor in tensors.items():
        if name.endswith(TOKEN_ROWS_SUFFIX):
            path = name.removeprefix(PREFIX).removesuffix(f".{TOKEN_ROWS_SUFFIX}")
            rows[path] = TokenRowTensors(ids[0], tensor.float())
    return rows


def parse_loras(tensors: Mapping[str, Tensor], adapter: AdapterFolder) -> dict[str, LoraTensors]:
    """Return path of the linear -> adapter, from tensors under PEFT's names."""
    loras: dict[str, LoraTensors] = {}
    for name in tensors:
        path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        if not path or path in loras:
            continue
        a_RI = tensors[f"{PREFIX}{path}.lora_A.weight"].float()
        b_OR = tensors[f"{PREFIX}{path}.lora_B.weight"].float()
        magnitude_O = tensors.get(f"{PREFIX}{path}.{MAGNITUDE}")
        if magnitude_O is not None:
            magnitude_O = magnitude_O.float()
        loras[path] = LoraTensors(a_RI, b_OR, adapter.compute_scaling(path), magnitude_O)
    return loras


@contextmanager
def stock_with_adapter(network: nn.Module, adapter: AdapterFolder) -> Iterator[None]:
    """Apply an adapter to the stock network inside the block, computed as PEFT does: W x +
    scale * B A x in fp32, one linear at a time; DoRA's row scaling; rows of new tokens; modules
    trained in full.

    It is the oracle of a run that starts from an adapter."""
    tensors = read_adapter_tensors(adapter.weights_path)
    hooks: list[Any] = []
    for path, lora in parse_loras(tensors, adapter).items():
        hook = functools.partial(_add_adapter_output, lora=lora)
        hooks.append(network.get_submodule(path).register_forward_hook(hook))
    originals: list[tuple[Tensor, Tensor]] = []
    for path, rows in parse_token_rows(tensors, adapter.new_token_ids).items():
        weight_VH = network.get_parameter(f"{path}.weight").detach()
        current_KH = weight_VH[rows.first_id : rows.first_id + len(rows.rows_KH)]
        originals.append((current_KH, current_KH.clone()))
        current_KH.copy_(rows.rows_KH)
    for key, module_tensor in parse_module_tensors(tensors, adapter.saved_parameters).items():
        current = get_merge_target(network, key).detach()
        originals.append((current, current.clone()))
        current.copy_(module_tensor.tensor)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for current, original in reversed(originals):
            current.copy_(original)


def get_merge_target(network: nn.Module, key: str) -> nn.Parameter:
    """Return the parameter that a delta changes: `key` is the path of a module with a weight, or
    the full name of a bias."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return parameters[f"{key}.weight" if f"{key}.weight" in parameters else key]


def _add_adapter_output(
    linear: Any, inputs: tuple[Tensor, ...], out: Tensor, *, lora: LoraTensors
) -> Tensor:
    a_RI = lora.a_RI.to(out.device)
    b_OR = lora.b_OR.to(out.device)
    delta = lora.scale * F.linear(F.linear(inputs[0].float(), a_RI), b_OR)
    if lora.magnitude_O is None:
        return out + delta.to(out.dtype)
    bias = 0 if linear.bias is None else linear.bias.float()
    norms_O = (linear.weight.float() + lora.scale * (b_OR @ a_RI)).norm(dim=1)
    gain_O = lora.magnitude_O.to(out.device) / norms_O
    return (gain_O * (out.float() - bias + delta) + bias).to(out.dtype)


# ---------------------------------------------------------------- full model and serving files


def save_model(network: nn.Module, folder: Path, base: Path, dtype: torch.dtype) -> None:
    """Write all weights in `dtype` under their stock names, and the base's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(folder, base, len(network.get_input_embeddings().weight))  # type: ignore[operator]


def save_config(folder: Path, base: Path, vocab_size: int) -> None:
    """Write the base's config.json for an embedding of `vocab_size` rows."""
    config = read_model_json(base / "config.json")
    if config["vocab_size"] == vocab_size:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        _write_json(folder / "config.json", config | {"vocab_size": vocab_size})


def save_serving_files(
    folder: Path,
    base: Path,
    *,
    templates: Mapping[str, str],
    end_ids: Sequence[int],
    tokenizer_json: bytes | None = None,
) -> None:
    """Write the tokenizer, the chat templates (name -> source) and the end tokens of training.

    `tokenizer_json` replaces the base's tokenizer.json, for a run that adds tokens."""
    for name in SERVING_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if tokenizer_json is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
    for name, source in templates.items():
        template_file = folder / TEMPLATES_DIR / f"{name}.jinja"
        if name == "default":
            template_file = folder / "chat_template.jinja"
        template_file.parent.mkdir(exist_ok=True)
        template_file.write_text(source, encoding="utf-8", newline="")
    generation: dict[str, Any] = {}
    generation_file = base / "generation_config.json"
    if generation_file.is_file():
        generation = json.loads(generation_file.read_text(encoding="utf-8"))
    generation["eos_token_id"] = list(end_ids)
    _write_json(folder / "generation_config.json", generation)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
