"""A base and its adapter as one set of weights, one tensor at a time.

In: the base's folder and the adapter's. Out: every tensor of the base by its own name, in fp32,
with what the adapter adds to it; written as safetensors it is cast once, to the base's dtype. Never
more than a tensor is in memory. Left out: other formats (export), and whether the adapter belongs
to this base (the caller has checked)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.core.errors import GateError
from tunesmith.model.causal_lm import Network
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.validate import TensorHeader, read_headers
from tunesmith.model.quantization import roundtrip_nf4
from tunesmith.model.save import (
    LoraTensors,
    TokenRowTensors,
    parse_loras,
    parse_token_rows,
    read_adapter_tensors,
)

WeightDelta = LoraTensors | TokenRowTensors  # what an adapter makes of one matrix
WeightDeltas = Mapping[str, WeightDelta]
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_loras(folder: Path, base: Path) -> dict[str, LoraTensors]:
    """Path of a linear -> what the adapter in `folder` makes of it, scaled as its own config says.
    InputError as `read_adapter`, and for values that are not finite."""
    adapter = read_adapter(folder, base)
    return parse_loras(read_adapter_tensors(adapter.weights_path), adapter.scaling)


def read_token_rows(folder: Path, base: Path) -> dict[str, TokenRowTensors]:
    """Path of the embedding and of the head -> the rows of new tokens. A tied head, which may still
    lie in a file, has the embedding's."""
    adapter = read_adapter(folder, base)
    rows = parse_token_rows(read_adapter_tensors(adapter.weights_path), adapter.new_token_ids)
    return {"lm_head": next(iter(rows.values())), **rows} if rows else {}


def merge_into_network(network: Network, deltas: WeightDeltas) -> None:
    """The same inside a loaded network, in fp32 and cast to its dtype; the matrices have the new
    rows already."""
    for path, delta in deltas.items():
        module = network.get_submodule(path)
        assert isinstance(module, nn.Linear | nn.Embedding)
        module.weight.data = delta.merge_into(module.weight.data.float()).to(module.weight)


def iter_merged_tensors(
    headers: Mapping[str, TensorHeader], deltas: WeightDeltas, quantized_paths: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 weights), in the order of `headers`; those of `narrow`, paths of linears, as 4
    bits left them. GateError for a value that is not finite."""
    for name, header in headers.items():
        with safe_open(header.file, "pt") as file:
            tensor = file.get_tensor(name).float()
        path = name.removesuffix(".weight")
        if quantized_paths and not {path, f"model.{path}"}.isdisjoint(quantized_paths):
            tensor = roundtrip_nf4(tensor)
        if (delta := _find_delta(name, deltas)) is not None:
            tensor = delta.merge_into(tensor)
        yield name, require_finite(name, tensor)


def merge_headers(
    headers: Mapping[str, TensorHeader], deltas: WeightDeltas
) -> dict[str, TensorHeader]:
    """With the shapes that the tensors have then: those with new rows may be longer."""
    merged = dict(headers)
    for name, header in headers.items():
        if isinstance(rows := _find_delta(name, deltas), TokenRowTensors):
            merged[name] = replace(
                header, shape=(rows.count_rows(header.shape[0]), *header.shape[1:])
            )
    return merged


def _find_delta(name: str, deltas: WeightDeltas) -> WeightDelta | None:
    """Files of the decoder alone have no `model.` in front of their names."""
    path = name.removesuffix(".weight")
    return deltas.get(path) or deltas.get(f"model.{path}")


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; GateError if a value of it is not a finite number."""
    low, high = tensor.aminmax()  # a NaN is both
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        message = f"{name} holds values that are not finite: nothing is exported"
        raise GateError(message, fix="train again with a lower learning_rate")
    return tensor


def write_merged_weights(
    base: Path, deltas: WeightDeltas, file: Path, quantized_paths: Collection[str] = ()
) -> None:
    """The merged weights under the base's names and in its dtypes, as one safetensors file."""
    headers = read_headers(base)
    tensors = (tensor for _, tensor in iter_merged_tensors(headers, deltas, quantized_paths))
    write_weights(merge_headers(headers, deltas), tensors, file)


def write_weights(
    headers: Mapping[str, TensorHeader], tensors: Iterable[Tensor], file: Path
) -> None:
    """Safetensors of the names, shapes and dtypes in `headers`; the tensors come in the same order,
    in fp32."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in headers.items():
        begin, end = end, end + prod(header.shape) * TORCH_DTYPES[header.dtype].itemsize
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
            cast_tensor = require_finite(name, tensor.to(TORCH_DTYPES[header.dtype])).contiguous()
            output.write(cast_tensor.flatten().view(torch.uint8).numpy().data)
