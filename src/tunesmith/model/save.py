"""Save and load trained weights: a PEFT folder for an adapter, a transformers folder for a full
model.

Both also hold what serving needs to behave as training did: the tokenizer, the chat template and
the end tokens. Weights are safetensors, never pickles. Left out: optimizer state
(train/checkpoint.py), merging (merge.py) and other formats (export). Legend: I inputs, O outputs,
R rank, K new tokens, V vocabulary, H hidden."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import read_json_object
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.experts import (
    ExpertLoraTensors,
    adapted_experts,
    find_expert_loras,
    find_experts,
    list_target_parameters,
)
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    ALPHA_PATTERN,
    MAGNITUDE,
    PREFIX,
    RANK_PATTERN,
    TOKEN_ROWS_SUFFIX,
    AdapterFolder,
    compute_scaling,
    name_in_text_class,
    name_on_checkpoint,
)
from tunesmith.model.hub.expert_names import (
    is_expert_path,
    is_target_parameter,
    list_stack_names,
)
from tunesmith.model.hub.families import get_tensor_prefix
from tunesmith.model.hub.stored_tensors import read_naming, read_text_tensors
from tunesmith.model.hub.text_class import find_tensor_prefix
from tunesmith.model.hub.validate import (
    AUTO_MAP_KEY,
    TEMPLATES_DIR,
    read_header,
    read_headers,
    read_model_json,
)
from tunesmith.model.layer_shards import cut_piece, get_complete_shape
from tunesmith.model.new_embeddings import collect_new_rows
from tunesmith.model.safetensors_io import find_nonfinite, load_tensors, read_tensor, write_tensors
from tunesmith.model.target_modules import HEAD, find_embedding, is_transposed_linear
from tunesmith.model.text_network import pick_saved_dtype
from tunesmith.model.trained_modules import get_trained_modules
from tunesmith.model.weight_shards import gather_parents

# Trained weights and optimizer moments of a checkpoint; of sharded weights, each layer has a file.
STATE_FILE = "state.safetensors"
STATE_FILES = "state*.safetensors"
MAX_SCALE_ERROR = 1e-6  # relative: rounding of a division and a root
UNEQUAL_FIX = "no adapter was written; please report this"
SERVING_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    # of the towers of a multimodal base
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
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
    layers = find_lora_layers(network) | find_expert_loras(network)
    for path, layer in layers.items():
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
    target_modules, target_parameters = _list_targets(network, settings["lora_target_modules"])
    weights = (f"{path}.weight" for path in find_lora_layers(network))
    config: dict[str, Any] = {
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
        "fan_in_fan_out": any(map(is_transposed_linear, weights)),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if target_parameters:
        # PEFT refuses dropout there; it has no effect on a trained adapter
        config |= {"target_parameters": target_parameters, "lora_dropout": 0.0}
    if new_rows := collect_new_rows(network):
        indices = {path.rpartition(".")[2]: rows.ids for path, rows in new_rows.items()}
        config["trainable_token_indices"] = indices
    if modules := get_trained_modules(network):
        names = modules.list_stored_parameters()
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in names})
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := settings.get(key):
            config[key] = _name_targets(pattern, target_parameters)
    tensor_prefix = find_tensor_prefix(network)
    tensors = collect_adapter_tensors(network)
    if tensor_prefix:
        config |= _prefix_targets(network, config, tensor_prefix)
        tensors = {_prefix_name(name, tensor_prefix): tensor for name, tensor in tensors.items()}
    _write_json(folder / ADAPTER_CONFIG_FILE, config)
    write_tensors(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})


def _name_targets(pattern: Mapping[str, Any], target_parameters: list[str]) -> dict[str, Any]:
    """Return a mapping of layers to values under the names that PEFT looks for: those of the
    parameters where it adapts these."""
    named: dict[str, Any] = {}
    for path, value in pattern.items():
        weight = f"{path}.weight"
        named[weight if weight in target_parameters else path] = value
    return named


def _prefix_name(name: str, tensor_prefix: str) -> str:
    """Return PEFT's name of an adapter tensor on the whole multimodal model."""
    return PREFIX + name_on_checkpoint(name.removeprefix(PREFIX), tensor_prefix)


def _prefix_targets(
    network: nn.Module, config: Mapping[str, Any], tensor_prefix: str
) -> dict[str, Any]:
    """Return the keys of PEFT's config that name layers, for the whole multimodal model. Names such
    as q_proj would add an adapter to its towers, too."""
    layers = sorted(find_lora_layers(network))
    parameters = config.get("target_parameters", [])
    modules = [path for path in layers if f"{path}.weight" not in parameters]
    prefixed: dict[str, Any] = {"target_modules": modules}
    for key in ("target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if key in config:
            prefixed[key] = config[key]
    for key, names in prefixed.items():
        if isinstance(names, Mapping):
            prefixed[key] = {name_on_checkpoint(n, tensor_prefix): v for n, v in names.items()}
        else:
            prefixed[key] = [name_on_checkpoint(name, tensor_prefix) for name in names]
    return prefixed


def _list_targets(network: nn.Module, targets: Any) -> tuple[list[str], list[str]]:
    """Return PEFT's `target_modules` and `target_parameters`."""
    parameters = list_target_parameters(network)
    modules: list[str] = []
    model_type = network.config.get_text_config().model_type  # type: ignore[union-attr, operator]
    has_experts = bool(find_experts(network))
    for path in sorted(find_lora_layers(network)):
        if is_target_parameter(path, model_type, has_experts=has_experts):
            parameters.append(f"{path}.weight")
        else:
            modules.append(path)
    if targets == "all-linear":
        modules = sorted({path.rpartition(".")[2] for path in modules})
    return modules, parameters


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
    stored_names = dict(zip(tensors, read_header(weights_file), strict=True))
    for path, matrix_rows in rows.items():
        name = f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}"
        if name in tensors:
            tensors[name] = matrix_rows.rows_KH.contiguous()
    for module_tensor in modules.values():
        tensors[module_tensor.stored_name] = module_tensor.tensor.contiguous()
        is_tied = find_embedding([module_tensor.stored_name]) and HEAD not in modules
        if is_tied and (head := f"{PREFIX}{HEAD}.weight") in tensors:
            tensors[head] = module_tensor.tensor.clone()
    stored_tensors = {stored_names[name]: tensor for name, tensor in tensors.items()}
    write_tensors(stored_tensors, weights_file, metadata={"format": "pt"})


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


def name_state_file(number: int) -> str:
    """Return the name of a file of a checkpoint, counted from 0."""
    return f"state-{number + 1:05}.safetensors" if number else STATE_FILE


def load_weights(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Load a checkpoint's trained weights into `parameters`, and return all of its tensors.

    Raises InputError when the checkpoint holds other weights than `parameters`.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(STATE_FILES)):
        tensors |= load_tensors(file)  # mapped: of a piece, only its part is read
    stored = {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")}
    if stored != parameters.keys() or any(
        tensors[f"weight.{name}"].shape != get_complete_shape(parameter)
        for name, parameter in parameters.items()
    ):
        message = "the checkpoint holds other trained weights than this model"
        raise InputError(message, where=str(folder))
    # Not through `.data`: Fp32MasterLinear would not notice the change.
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(cut_piece(parameter, tensors[f"weight.{name}"]))
    return tensors


def read_adapter_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter under PEFT's names on the text class, in the order of the
    file's header. They are mapped from the file. Raise InputError for NaN or infinite values."""
    return _name_tensors(load_tensors(file), list(read_header(file)), file)


def copy_adapter_tensors(adapter: AdapterFolder) -> dict[str, Tensor]:
    """Return what `read_adapter_tensors` does, in memory of their own: a later change of the file
    does not reach them. Raise InputError unless the file has the hash that `adapter` says: the
    recorded one, or that of the file when it was read."""
    file = adapter.weights_path
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != adapter.sha256:
        message = f"{file.name} is not the recorded file: its sha256 differs"
        raise InputError(message, where=str(file), fix="restore the file, or load it again")
    stored = load(content)
    return _name_tensors(stored, list(stored), file)


def _name_tensors(
    stored: Mapping[str, Tensor], names: Sequence[str], file: Path
) -> dict[str, Tensor]:
    if name := find_nonfinite(stored):
        message = f"the tensor {name} holds NaN or infinite values"
        raise InputError(message, where=str(file), fix="train the adapter again")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors[PREFIX + name_in_text_class(name.removeprefix(PREFIX))] = stored[name]
    return tensors


# ---------------------------------------------------------------- the saved against the trained


def check_saved_adapter(network: nn.Module, folder: Path) -> None:
    """Raise GateError unless the files in `folder` are the adapter of `network`, at its scale.

    The scores of a run are those of the network in memory, and whoever serves the adapter reads the
    files. Whether other libraries read them in the same way is another check (export/parity.py)."""
    _check_scales(network, folder)
    expected = collect_adapter_tensors(network)
    stored = read_adapter_tensors(folder / ADAPTER_WEIGHTS_FILE)
    if names := sorted(expected.keys() ^ stored.keys()):
        raise GateError(
            f"the saved adapter differs in {names[0]}", where="adapter", fix=UNEQUAL_FIX
        )
    for name, tensor in expected.items():
        if not torch.equal(stored[name], tensor):
            message = f"the saved adapter has another {name} than the trained one"
            raise GateError(message, where="adapter", fix=UNEQUAL_FIX)


def _check_scales(network: nn.Module, folder: Path) -> None:
    """Compare the scale of each adapted layer with that of adapter_config.json. Layers that a
    pattern of it may name are left out."""
    config = read_model_json(folder / ADAPTER_CONFIG_FILE)
    if config.get(RANK_PATTERN) or config.get(ALPHA_PATTERN):
        return
    scale = compute_scaling(
        config["r"], config["lora_alpha"], use_rslora=bool(config.get("use_rslora"))
    )
    for path, layer in find_lora_layers(network).items():
        if not math.isclose(layer.scale, scale, rel_tol=MAX_SCALE_ERROR):
            message = (
                f"{path} was trained and measured with an adapter scale of {layer.scale:g}, but "
                f"{ADAPTER_CONFIG_FILE} says {scale:g}"
            )
            raise GateError(message, where="adapter", fix=UNEQUAL_FIX)


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


AnyLora = LoraTensors | ExpertLoraTensors


def select_linear_loras(loras: Mapping[str, AnyLora]) -> dict[str, LoraTensors]:
    """Return the adapters of linears, without those of experts."""
    return {path: lora for path, lora in loras.items() if isinstance(lora, LoraTensors)}


def parse_loras(tensors: Mapping[str, Tensor], adapter: AdapterFolder) -> dict[str, AnyLora]:
    """Return PEFT's path of the linear, or stack of experts, -> adapter, from tensors under PEFT's
    names."""
    loras: dict[str, AnyLora] = {}
    for name in tensors:
        path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        if not path or path in loras:
            continue
        a_RI = tensors[f"{PREFIX}{path}.lora_A.weight"].float()
        b_OR = tensors[f"{PREFIX}{path}.lora_B.weight"].float()
        scale = adapter.compute_scaling(path)
        if is_expert_path(path):
            num_experts = len(a_RI) // adapter.rank_pattern.get(path, adapter.rank)
            loras[path] = ExpertLoraTensors.from_peft(
                a_RI, b_OR, num_experts=num_experts, scale=scale
            )
            continue
        magnitude_O = tensors.get(f"{PREFIX}{path}.{MAGNITUDE}")
        if magnitude_O is not None:
            magnitude_O = magnitude_O.float()
        loras[path] = LoraTensors(a_RI, b_OR, scale, magnitude_O)
    return loras


@contextmanager
def stock_with_adapter(network: nn.Module, adapter: AdapterFolder) -> Iterator[None]:
    """Apply an adapter to the stock network inside the block, computed as PEFT does: W x +
    scale * B A x in fp32, one linear at a time; DoRA's row scaling; rows of new tokens; modules
    trained in full.

    It is the oracle of a run that starts from an adapter."""
    tensors = read_adapter_tensors(adapter.weights_path)
    hooks: list[Any] = []
    loras = parse_loras(tensors, adapter)
    for path, lora in loras.items():
        if isinstance(lora, LoraTensors):
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
        with adapted_experts(network, loras):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for current, original in reversed(originals):
            current.copy_(original)


def get_merge_target(network: nn.Module, key: str) -> nn.Parameter:
    """Return the parameter that a delta changes: `key` is the path of a module with a weight, the
    full name of a bias, or PEFT's path of a stack of experts."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if is_expert_path(key):
        return parameters[next(name for name in list_stack_names(key) if name in parameters)]
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
    """Write all weights in `dtype`, those of `pick_saved_dtype` in fp32, under their stock names,
    and the base's config.json. Those of a multimodal base that were not loaded are copied."""
    folder.mkdir(parents=True, exist_ok=True)
    stored_names = _list_stored_names(base) if find_tensor_prefix(network) else {}
    text_tensors = read_text_tensors(base)
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        gather_parents(network, name)
        stored_name = stored_names.get(name, name)
        weight_dtype = pick_saved_dtype(network, name, dtype, text_tensors.parameters)
        is_shared = parameter.dtype == weight_dtype  # with a layer that the next one may replace
        weight = parameter.detach().to("cpu", weight_dtype, copy=is_shared)
        if is_transposed_linear(name):
            weight = weight.t()
        tensors[stored_name] = weight.contiguous()
    state = network.state_dict()
    for name, buffer in network.named_buffers():
        if name in state:
            tensors[stored_names.get(name, name)] = buffer.cpu().contiguous()
    if stored_names:
        for name, header in text_tensors.omitted.items():
            if header.scales is not None:  # in FP8, which the saved config does not say
                tensors[name] = read_tensor(header).to(dtype)
                continue
            with safe_open(header.file, "pt") as file:
                tensors[name] = file.get_tensor(name)
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size = len(network.get_input_embeddings().weight)  # type: ignore[operator]
    save_config(folder, base, vocab_size, is_packed=False)


def _list_stored_names(base: Path) -> dict[str, str]:
    """Return parameter of the text part -> name in the files of a multimodal base."""
    naming = read_naming(read_model_json(base / "config.json"))
    names: dict[str, str] = {}
    for stored_name in read_headers(base):
        if parameter := naming.name_parameter(stored_name):
            names[parameter] = stored_name
    return names


def save_config(folder: Path, base: Path, vocab_size: int, *, is_packed: bool) -> None:
    """Write the base's config.json for an embedding of `vocab_size` rows, without names of code,
    which is not copied. `is_packed`: the weights are packed where the base's are."""
    config = read_model_json(base / "config.json")
    text = config["text_config"] if get_tensor_prefix(config) else config
    is_widened = not is_packed and config.pop("quantization_config", None) is not None
    has_code = config.pop(AUTO_MAP_KEY, None) is not None
    if text.get("vocab_size") == vocab_size and not is_widened and not has_code:
        shutil.copyfile(base / "config.json", folder / "config.json")
        return
    text["vocab_size"] = vocab_size
    _write_json(folder / "config.json", config)


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
    generation = read_json_object(base / "generation_config.json", is_optional=True)
    generation["eos_token_id"] = list(end_ids)
    _write_json(folder / "generation_config.json", generation)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
