"""Build the text class of a model folder without weights, and fill it from the files.

    check_weight_shapes(folder)          every parameter against the safetensors headers
    load_text_network(folder, dtype)     the stock network, in evaluation mode
    build_empty_network(folder, dtype)   the same without memory for weights

In: a folder that `hub/resolve.py` has checked. Towers of a multimodal checkpoint are not loaded.
Every parameter comes from a tensor of the files; transformers itself would start missing ones at
random and only print a table. The shapes are compared on the meta device, so no config.json can
fill the memory. Left out: 4-bit weights (quantization.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tunesmith.core.errors import InputError
from tunesmith.model.hub.packed_tensors import MXFP4_DTYPE
from tunesmith.model.hub.stored_tensors import StoredParameter, read_text_tensors
from tunesmith.model.hub.text_class import (
    build_meta_network,
    build_network,
    load_text_config,
    transformers_errors,
    use_torch_code,
)
from tunesmith.model.safetensors_io import (
    DTYPES,
    find_nonfinite,
    read_mxfp4_experts,
    read_parameter,
)
from tunesmith.model.target_modules import find_layer
from tunesmith.model.weight_shards import WeightShards

MAX_BUFFER_VALUES = 2**24  # of a table that is no weight, such as rotary frequencies
DOWNLOAD_FIX = "download the model again"
NARROW_DTYPES = (torch.bfloat16, torch.float16)


def check_weight_shapes(folder: Path) -> None:
    """Raise InputError naming the first tensor that is missing, or whose shape differs from
    config.json."""
    network: Any = build_meta_network(folder)
    stored = read_text_tensors(folder).parameters
    embedding = network.get_input_embeddings().weight
    has_embedding = False
    for name, tensor in network.state_dict(keep_vars=True).items():
        parameter = find_stored(stored, name)
        if parameter is None:
            if tensor is embedding and has_embedding:  # a head that is the embedding
                continue
            message = f"the weights have no {name}, which config.json requires"
            raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
        has_embedding |= tensor is embedding
        if parameter.shape != tuple(tensor.shape):
            message = (
                f"the tensor {name} has shape {list(parameter.shape)}, "
                f"config.json says {list(tensor.shape)}"
            )
            raise InputError(message, where=str(parameter.headers[0].file), fix=DOWNLOAD_FIX)
    _refuse_ignored_biases(network, stored, folder)
    for name, buffer in network.named_buffers():
        if buffer.numel() > MAX_BUFFER_VALUES:
            message = f"config.json requires a table {name} of {buffer.numel():,} values"
            raise InputError(message, where=str(folder), fix="download config.json again")


def _refuse_ignored_biases(
    network: PreTrainedModel, stored: Mapping[str, StoredParameter], folder: Path
) -> None:
    """Raise InputError for a bias that config.json does not know: transformers would leave it out
    without an error, and compute something else than the model's maker."""
    for path, module in network.named_modules():
        name = f"{path}.bias"
        is_unbiased = isinstance(module, nn.Linear | nn.Conv1d) and module.bias is None
        if is_unbiased and find_stored(stored, name) is not None:
            message = f"the weights have {name}, but by config.json there is no bias"
            fix = "correct the key for biases in config.json, such as attention_bias or use_bias"
            raise InputError(message, where=str(folder), fix=fix)


def find_stored(parameters: Mapping[str, StoredParameter], name: str) -> StoredParameter | None:
    """Return the tensors of a parameter. Files of a decoder alone lack the prefix `model.`."""
    return parameters.get(name) or parameters.get(name.partition(".")[2])


class EmptyOnMeta(TorchFunctionMode):
    """Creates the tensors of torch.empty, which are weights, without memory. Computed tables stay
    real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build_empty_network(
    folder: Path, dtype: torch.dtype, num_layers: int | None = None
) -> PreTrainedModel:
    """Build the stock network, or its first `num_layers`, without memory for weights."""
    config: Any = load_text_config(folder)
    with transformers_errors(folder), EmptyOnMeta():
        if num_layers is not None:
            _truncate_config(config, num_layers)
        return use_torch_code(build_network(config, dtype=dtype))


def _truncate_config(config: Any, num_layers: int) -> None:
    """Let a config describe its first layers. None of them takes its keys and values from another
    one, as later layers of Gemma 4 do."""
    config.num_hidden_layers = num_layers
    words = getattr(config, "layer_types", None)
    if words and len(words) != num_layers:
        config.layer_types = words[:num_layers]
    if getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = 0


def load_text_network(
    folder: Path, dtype: torch.dtype, device: str = "cpu", shards: WeightShards | None = None
) -> PreTrainedModel:
    """Load the text class in `dtype`; with `shards`, each layer is sharded once this rank's rows of
    it are loaded. Raises InputError for NaN or infinite values."""
    network = build_empty_network(folder, dtype)
    listed = list_stored_parameters(network, folder)
    part_rows = {}
    if shards is not None:
        part_rows = _find_part_rows(network, dtype, shards, dict(listed))
    for name, stored in iter_by_layer(network, listed, shards):
        if stored.headers[0].dtype == MXFP4_DTYPE:
            set_packed_experts(network, name, stored, dtype, device)
            continue
        if name in part_rows and stored.is_plain:
            tensor = _read_rows(name, stored, part_rows[name], folder, device)
        else:
            tensor = read_finite_parameter(name, stored, folder, device)
        put_tensor(network, name, tensor.to(pick_dtype(network, name, dtype, stored)))
    return finish_network(network, folder, device)


def _find_part_rows(
    network: PreTrainedModel,
    dtype: torch.dtype,
    shards: WeightShards,
    stored: Mapping[str, StoredParameter],
) -> dict[str, range]:
    """Return which rows of each parameter of the layers this rank keeps."""
    decoder: Any = network.base_model
    prefix = next(name for name, module in network.named_modules() if module is decoder.layers)
    part_rows: dict[str, range] = {}
    for number, layer in enumerate(decoder.layers):
        sizes: dict[str, tuple[int, int]] = {}
        for name, parameter in layer.named_parameters(prefix=f"{prefix}.{number}"):
            row_dtype = pick_dtype(network, name, dtype, stored[name])
            row_bytes = row_dtype.itemsize * parameter[0].numel()
            sizes[name] = (len(parameter), row_bytes)
        part_rows |= shards.find_part_rows(sizes)
    return part_rows


def _read_rows(
    name: str, stored: StoredParameter, rows: range, folder: Path, device: str
) -> Tensor:
    """Read some rows of a parameter; the others are 0, and are not kept."""
    header = stored.headers[0]
    row_bytes = (header.end - header.begin) // header.shape[0]
    part = replace(
        header,
        shape=(len(rows), *header.shape[1:]),
        begin=header.begin + rows.start * row_bytes,
        end=header.begin + rows.stop * row_bytes,
    )
    complete = torch.zeros(header.shape, dtype=DTYPES[header.dtype], device=device)
    if rows:
        tensor = read_finite_parameter(name, StoredParameter((part,)), folder, device)
        complete[rows.start : rows.stop] = tensor
    return complete


def set_packed_experts(
    network: PreTrainedModel,
    name: str,
    stored: StoredParameter,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Put experts that stay packed in the place of a parameter. transformers' own module computes
    with them, one expert at a time."""
    path, _, tensor_name = name.rpartition(".")
    module = network.get_submodule(path)
    delattr(module, tensor_name)  # a parameter can only be followed by a parameter
    setattr(module, tensor_name, read_mxfp4_experts(stored.headers[0], dtype, device))
    network.set_experts_implementation("eager")


def list_stored_parameters(
    network: PreTrainedModel, folder: Path
) -> list[tuple[str, StoredParameter]]:
    """Return every stored parameter and its tensors, file by file; a tied head is not stored.

    Biases come before weights, because a QuantizedLinear takes its bias along."""
    parameters = read_text_tensors(folder).parameters
    listed: list[tuple[str, StoredParameter]] = []
    for name in network.state_dict():
        stored = find_stored(parameters, name)
        if stored is not None:
            listed.append((name, stored))
    listed.sort(key=_order_by_file)
    return listed


def iter_by_layer(
    network: PreTrainedModel,
    listed: Sequence[tuple[str, StoredParameter]],
    shards: WeightShards | None,
) -> Iterator[tuple[str, StoredParameter]]:
    """Yield parameters to be loaded. With `shards`, they come layer by layer, and each layer is
    sharded when its last one is loaded."""
    if shards is None:
        yield from listed
        return
    decoder: Any = network.base_model
    for number, parameters in itertools.groupby(sorted(listed, key=_find_layer), key=_find_layer):
        yield from parameters
        if number >= 0:
            shards.add_layer(decoder.layers[number])
    shards.attach(network)


def _find_layer(entry: tuple[str, StoredParameter]) -> int:
    layer = find_layer(entry[0])
    return -1 if layer is None else layer.number


def _order_by_file(entry: tuple[str, StoredParameter]) -> tuple[Path, bool, int]:
    header = entry[1].headers[0]
    return header.file, entry[0].endswith(".weight"), header.begin


def read_finite_parameter(
    name: str, stored: StoredParameter, folder: Path, device: str = "cpu"
) -> Tensor:
    """Read a parameter and check it on the device. Raises InputError if it has a NaN or infinite
    value."""
    tensor = read_parameter(stored).to(device)
    if find_nonfinite({name: tensor}):
        message = f"the tensor {name} holds NaN or infinite values"
        raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
    return tensor


def pick_dtype(
    network: PreTrainedModel, name: str, dtype: torch.dtype, stored: StoredParameter
) -> torch.dtype:
    """Return the dtype of a parameter: some stay in fp32. transformers keeps the biases of routers
    and a few others so; decays and norms of recurrent layers stay as they are stored, since serving
    engines do not round them."""
    wide = network._keep_in_fp32_modules_strict or ()
    is_wide = any(f".{part}." in f".{name}." for part in wide)
    is_wide |= network.get_parameter_or_buffer(name).dtype == torch.float32
    is_wide |= is_wide_recurrent(network, name, stored)
    return torch.float32 if is_wide and dtype in NARROW_DTYPES else dtype


def pick_saved_dtype(
    network: nn.Module, name: str, dtype: torch.dtype, parameters: Mapping[str, StoredParameter]
) -> torch.dtype:
    """Return the dtype of a trained parameter in files: `dtype`, but fp32 for what recurrent layers
    of the base have in fp32."""
    stored = find_stored(parameters, name)
    is_wide = stored is not None and is_wide_recurrent(network, name, stored)
    return torch.promote_types(dtype, torch.float32) if is_wide else dtype


def is_wide_recurrent(network: nn.Module, name: str, stored: StoredParameter) -> bool:
    """Return whether a decay, a norm or another vector of a recurrent layer is stored in fp32."""
    path, _, _ = name.rpartition(".")
    module = network.get_submodule(path)
    mixer = network.get_submodule(path.rpartition(".")[0])  # of a norm
    is_recurrent = hasattr(module, "A_log") or hasattr(mixer, "A_log")
    is_projection = isinstance(module, nn.Conv1d | nn.Linear)
    return stored.headers[0].dtype == "F32" and is_recurrent and not is_projection


def put_tensor(network: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, tensor_name = name.rpartition(".")
    module = network.get_submodule(path)
    is_parameter = tensor_name in dict(module.named_parameters(recurse=False))
    value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    setattr(module, tensor_name, value)


def finish_network(network: PreTrainedModel, folder: Path, device: str) -> PreTrainedModel:
    """Tie the head and return the network in evaluation mode, with nothing trainable. As in
    transformers, two weights that are stored with different values are not tied."""
    model: Any = network
    head = model.get_output_embeddings().weight
    if not head.is_meta and not torch.equal(head, model.get_input_embeddings().weight):
        model.config.tie_word_embeddings = False
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        message = f"the weights have no {missing[0]}, which config.json requires"
        raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
    return model.to(device).eval().requires_grad_(False)
