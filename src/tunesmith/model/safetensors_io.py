"""Read and write safetensors files: adapters, models and optimizer state.

NaN or infinite values are never written. When the disk refuses, an OSError is raised, which
core/atomic.py turns into a message with the space that is needed; the format's own error hides the
reason in its text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.model.hub.packed_tensors import MXFP4_DTYPE
from tunesmith.model.hub.stored_tensors import StoredParameter
from tunesmith.model.hub.validate import TensorHeader
from tunesmith.model.packed_formats import MAX_SCALE, Mxfp4ExpertWeight, widen_fp8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors. Raise GateError naming the first tensor with a NaN or infinite value, OSError
    if the disk refuses."""
    if name := find_nonfinite(tensors):
        message = f"{name} holds NaN or infinite values: nothing is written"
        fix = "lower learning_rate; the last checkpoint holds finite weights"
        raise GateError(message, where=file.name, fix=fix)
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(cpu_tensors, file, metadata=metadata)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise
    # safetensors makes files private to their owner; follow the folder instead
    file.chmod(file.parent.stat().st_mode & 0o666)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `write_tensors` wrote, mapped from it. Raise InputError for
    one that is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError:
        message = "no such file"
    except SafetensorError as error:
        message = f"not a safetensors file: {error}"
    raise InputError(message, where=str(file), fix="restore the file from a copy")


def read_tensor(header: TensorHeader) -> Tensor:
    """Read one tensor without mapping the file: mapped pages would count as our memory until it is
    closed. An FP8 matrix is returned in fp32, times its scales."""
    tensor = read_bytes(header).view(DTYPES[header.dtype]).reshape(header.shape)
    if header.scales is None:
        return tensor
    return widen_fp8(tensor, read_tensor(header.scales), header.block)


def read_bytes(header: TensorHeader) -> Tensor:
    """Return the bytes of a tensor as they are in the file."""
    with header.file.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little") + header.begin
    raw = np.fromfile(header.file, np.uint8, header.end - header.begin, offset=begin)
    return torch.from_numpy(raw)


def read_parameter(parameter: StoredParameter) -> Tensor:
    """Read a parameter in the dtype of its file. Experts are read one after another, so that they
    are in memory once."""
    if parameter.num_experts:
        stacked = torch.empty(0)
        for index in range(parameter.num_experts):
            matrix = torch.cat([read_tensor(header) for header in parameter.get_expert(index)])
            if index == 0:
                stacked = matrix.new_empty(parameter.shape)
            stacked[index] = matrix
        return stacked
    tensors = [read_tensor(header) for header in parameter.headers]
    matrix = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return matrix.transpose(-1, -2).contiguous() if parameter.is_transposed else matrix


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor with a NaN or infinite value, empty if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            return name
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Return whether a non-empty tensor has no NaN or infinite value."""
    if tensor.itemsize == 1:
        tensor = tensor.float()  # aminmax knows no FP8
    low, high = tensor.detach().aminmax()  # both are NaN if a value is
    return bool(low.isfinite() & high.isfinite())  # one read of a GPU


def read_mxfp4_experts(header: TensorHeader, dtype: torch.dtype, device: str) -> Mxfp4ExpertWeight:
    """Read experts that are widened to `dtype` when they are used. Raises InputError for a scale
    that means NaN, or that makes weights infinite."""
    assert header.dtype == MXFP4_DTYPE
    assert header.scales is not None
    blocks = replace(header, dtype="U8", shape=(*header.scales.shape, -1), scales=None)
    scales = read_tensor(header.scales)
    if int(scales.max()) > MAX_SCALE:
        message = f"an MXFP4 scale is {int(scales.max())}: its weights are NaN or infinite"
        raise InputError(message, where=str(header.file), fix="download the model again")
    return Mxfp4ExpertWeight(read_tensor(blocks).to(device), scales.to(device), dtype)
