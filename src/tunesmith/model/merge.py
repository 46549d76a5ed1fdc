"""Merge an adapter into its base model, one tensor at a time.

In: the folders of the base and of the adapter. Out: every tensor of the base under its name, in
fp32, with the adapter added; safetensors are written in the base's dtype, rounded once. What text
training leaves out of a multimodal checkpoint is copied byte for byte. Only one tensor is in memory
at a time. Left out: other formats (export), and whether the adapter belongs to this base (the
caller checks)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.model.causal_lm import Network
from tunesmith.model.experts import (
    ExpertLoraTensors,
    find_expert_delta,
    has_transposed_stacks,
)
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.expert_names import is_expert_matrix
from tunesmith.model.hub.packed_tensors import MXFP4, find_packing
from tunesmith.model.hub.stored_tensors import (
    PLAIN_NAMING,
    TensorNaming,
    is_stored_transposed,
    read_naming,
)
from tunesmith.model.hub.validate import DTYPE_BYTES, TensorHeader, read_headers, read_model_json
from tunesmith.model.quantization import roundtrip_experts, roundtrip_nf4
from tunesmith.model.safetensors_io import DTYPES, is_finite, read_bytes
from tunesmith.model.save import (
    AnyLora,
    LoraTensors,
    ModuleTensor,
    TokenRowTensors,
    get_merge_target,
    parse_loras,
    parse_module_tensors,
    parse_token_rows,
    read_adapter_tensors,
)

PACKED_DTYPE = "U8"  # of MXFP4
# an adapter's change of one matrix, or of one tensor of a module that is trained in full
WeightDelta = LoraTensors | ExpertLoraTensors | TokenRowTensors | ModuleTensor
WeightDeltas = Mapping[str, WeightDelta]


def read_loras(folder: Path, base: Path) -> dict[str, AnyLora]:
    """Return PEFT's path of a linear, or stack of experts, -> its adapter, from `folder`.

    Raises the errors of `read_adapter`, and InputError for NaN or infinite values."""
    adapter = read_adapter(folder, base)
    return parse_loras(read_adapter_tensors(adapter.weights_path), adapter)


def read_saved_modules(folder: Path, base: Path) -> dict[str, ModuleTensor]:
    """Return path of a module, or the full name of its bias -> values that were trained in full."""
    adapter = read_adapter(folder, base)
    tensors = read_adapter_tensors(adapter.weights_path)
    return parse_module_tensors(tensors, adapter.saved_parameters)


def read_token_rows(folder: Path, base: Path) -> dict[str, TokenRowTensors]:
    """Return path of the embedding and of the head -> rows of new tokens. A tied head, which may
    still be stored in a file, shares the embedding's."""
    adapter = read_adapter(folder, base)
    rows = parse_token_rows(read_adapter_tensors(adapter.weights_path), adapter.new_token_ids)
    return {"lm_head": next(iter(rows.values())), **rows} if rows else {}


def merge_into_network(network: Network, deltas: WeightDeltas) -> None:
    """Merge into a loaded network, in fp32 and then cast to its dtype. Its matrices already have
    the new rows."""
    for key, delta in deltas.items():
        parameter = get_merge_target(network, key)
        weight = parameter.data.float()
        if isinstance(delta, ExpertLoraTensors):
            is_transposed = has_transposed_stacks(network, key)
            merged = delta.merge_into_stored(weight, is_transposed=is_transposed)
        else:
            merged = delta.merge_into(weight)
        parameter.data = merged.to(parameter)


def iter_merged_tensors(
    headers: Mapping[str, TensorHeader],
    deltas: WeightDeltas,
    quantized_paths: Collection[str] = (),
    naming: TensorNaming = PLAIN_NAMING,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged fp32 weights) in the order of `headers`. Linears in `quantized_paths` are
    rounded to 4 bits first. A tensor that `naming` leaves out, or that is packed, is yielded as its
    bytes. Raises GateError for a NaN or infinite value."""
    for stored_name, header in headers.items():
        name = naming.name_parameter(stored_name)
        if name is None or header.dtype == PACKED_DTYPE:
            yield stored_name, read_bytes(header)
            continue
        with safe_open(header.file, "pt") as file:
            tensor = file.get_tensor(stored_name).float()
        is_transposed = is_stored_transposed(name, header, naming)
        if is_transposed:
            tensor = tensor.transpose(-1, -2).contiguous()
        path = name.removesuffix(".weight")
        if path in quantized_paths or f"model.{path}" in quantized_paths:
            tensor = roundtrip_nf4(tensor)
        elif quantized_paths and is_expert_matrix(name):
            tensor = roundtrip_experts(name, tensor)
        delta = _find_delta(name, header, deltas)
        if isinstance(delta, ExpertLoraTensors):
            tensor = delta.merge_into_stored(tensor, is_transposed=naming.has_transposed_stacks)
        elif delta is not None:
            tensor = delta.merge_into(tensor)
        if is_transposed:
            tensor = tensor.transpose(-1, -2)
        yield stored_name, require_finite(stored_name, tensor)


def merge_headers(
    headers: Mapping[str, TensorHeader],
    deltas: WeightDeltas,
    naming: TensorNaming = PLAIN_NAMING,
) -> dict[str, TensorHeader]:
    """Return the headers after the merge: matrices with new rows may be longer."""
    merged = dict(headers)
    for name, header in headers.items():
        parameter = naming.name_parameter(name)
        rows = _find_delta(parameter, header, deltas) if parameter else None
        if isinstance(rows, TokenRowTensors):
            shape = (rows.count_rows(header.shape[0]), *header.shape[1:])
            merged[name] = replace(header, shape=shape)
    return merged


def _find_delta(name: str, header: TensorHeader, deltas: WeightDeltas) -> WeightDelta | None:
    """Return the change of a tensor. Files of a decoder alone lack the prefix `model.`."""
    if is_expert_matrix(name):
        return find_expert_delta(name, header.shape[0], deltas)
    path = name.removesuffix(".weight")
    return deltas.get(path) or deltas.get(f"model.{path}")


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor. Raise GateError if it has a NaN or infinite value."""
    if not is_finite(tensor):
        message = f"{name} holds NaN or infinite values: nothing is exported"
        raise GateError(message, fix="train again with a lower learning_rate")
    return tensor


def write_merged_weights(
    base: Path, deltas: WeightDeltas, file: Path, quantized_paths: Collection[str] = ()
) -> None:
    """Write the merged weights under the base's names and in its dtypes, as one safetensors
    file."""
    refuse_packed_merge(base, deltas)
    headers = read_headers(base)
    naming = read_naming(read_model_json(base / "config.json"))
    merged = iter_merged_tensors(headers, deltas, quantized_paths, naming)
    merged_headers = merge_headers(headers, deltas, naming)
    write_weights(merged_headers, (tensor for _, tensor in merged), file)


def refuse_packed_merge(base: Path, deltas: WeightDeltas) -> None:
    """Raise InputError for a change of packed weights: the sum would have to be rounded to their
    format again. gpt-oss packs its experts only."""
    config_file = base / "config.json"
    config = read_model_json(config_file)
    packing = find_packing(config, str(config.get("model_type")), str(config_file))
    if packing is None or (packing.method == MXFP4 and not any(map(_is_of_experts, deltas))):
        return
    message = f"the base's weights are in {packing.method}, and merged ones would be rounded again"
    fix = "export the adapter alone, with --to peft"
    raise InputError(message, where=str(base), fix=fix)


def _is_of_experts(path: str) -> bool:
    return ".experts" in path


def write_weights(
    headers: Mapping[str, TensorHeader], tensors: Iterable[Tensor], file: Path
) -> None:
    """Stream a safetensors file with the names, shapes and dtypes of `headers`; fp32 tensors, or
    their bytes, come in the same order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in headers.items():
        begin = end
        end += prod(header.shape) * DTYPE_BYTES[header.dtype]
        table[name] = {
            "dtype": header.dtype,
            "shape": list(header.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for (name, header), tensor in zip(headers.items(), tensors, strict=True):
            if tensor.dtype != torch.uint8:
                tensor = require_finite(name, tensor.to(DTYPES[header.dtype])).contiguous()
            output.write(tensor.flatten().view(torch.uint8).numpy().data)
