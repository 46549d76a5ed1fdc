"""A base and its adapter as one set of weights, one tensor at a time.

In: the base's folder and the adapter's. Out: every tensor of the base by its own name, in fp32, with what the adapter
adds to it; written as safetensors it is cast once, to the base's dtype. Never more than a tensor is in memory. Left
out: other formats (export), and whether the adapter belongs to this base (the caller has checked).
"""

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
from tunesmith.model.quantization import dequantized
from tunesmith.model.save import Lora, Rows, loras_of, read_adapter_tensors, rows_in

Change = Lora | Rows  # what an adapter makes of one matrix
Changes = Mapping[str, Change]
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_loras(folder: Path, base: Path) -> dict[str, Lora]:
    """Path of a linear -> what the adapter in `folder` makes of it, scaled as its own config says. InputError as
    `read_adapter`, and for values that are not finite."""
    adapter = read_adapter(folder, base)
    return loras_of(read_adapter_tensors(adapter.weights), adapter.scale)


def read_rows(folder: Path, base: Path) -> dict[str, Rows]:
    """Path of the embedding and of the head -> the rows of new tokens. A tied head, which may still lie in a file, has
    the embedding's."""
    adapter = read_adapter(folder, base)
    rows = rows_in(read_adapter_tensors(adapter.weights), adapter.new_ids)
    return {"lm_head": next(iter(rows.values())), **rows} if rows else {}


def add_to_network(network: Network, changes: Changes) -> None:
    """The same inside a loaded network, in fp32 and cast to its dtype; the matrices have the new rows already."""
    for path, change in changes.items():
        module = network.get_submodule(path)
        assert isinstance(module, nn.Linear | nn.Embedding)
        module.weight.data = change.merged(module.weight.data.float()).to(module.weight)


def merged_tensors(
    headers: Mapping[str, TensorHeader], changes: Changes, narrow: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 weights), in the order of `headers`; those of `narrow`, paths of linears, as 4 bits left them.
    GateError for a value that is not finite."""
    for name, header in headers.items():
        with safe_open(header.file, "pt") as file:
            tensor = file.get_tensor(name).float()
        path = name.removesuffix(".weight")
        if narrow and not {path, f"model.{path}"}.isdisjoint(narrow):
            tensor = dequantized(tensor)
        if (change := _change_of(name, changes)) is not None:
            tensor = change.merged(tensor)
        yield name, finite(name, tensor)


def merged_headers(headers: Mapping[str, TensorHeader], changes: Changes) -> dict[str, TensorHeader]:
    """With the shapes that the tensors have then: those with new rows may be longer."""
    found = dict(headers)
    for name, header in headers.items():
        if isinstance(rows := _change_of(name, changes), Rows):
            found[name] = replace(header, shape=(rows.size(header.shape[0]), *header.shape[1:]))
    return found


def _change_of(name: str, changes: Changes) -> Change | None:
    """Files of the decoder alone have no `model.` in front of their names."""
    path = name.removesuffix(".weight")
    return changes.get(path) or changes.get(f"model.{path}")


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; GateError if a value of it is not a finite number."""
    low, high = tensor.aminmax()  # a NaN is both
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        what = f"{name} holds values that are not finite: nothing is exported"
        raise GateError(what, fix="train again with a lower learning_rate")
    return tensor


def write_merged(base: Path, changes: Changes, file: Path, narrow: Collection[str] = ()) -> None:
    """The merged weights under the base's names and in its dtypes, as one safetensors file."""
    headers = read_headers(base)
    tensors = (tensor for _, tensor in merged_tensors(headers, changes, narrow))
    write_weights(merged_headers(headers, changes), tensors, file)


def write_weights(headers: Mapping[str, TensorHeader], tensors: Iterable[Tensor], file: Path) -> None:
    """Safetensors of the names, shapes and dtypes in `headers`; the tensors come in the same order, in fp32."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in headers.items():
        begin, end = end, end + prod(header.shape) * TORCH_DTYPES[header.dtype].itemsize
        table[name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for (name, header), tensor in zip(headers.items(), tensors, strict=True):
            narrow = finite(name, tensor.to(TORCH_DTYPES[header.dtype])).contiguous()
            output.write(narrow.flatten().view(torch.uint8).numpy().data)
