"""Tensors as a safetensors file: the one place that writes weights, and optimizer state.

    write_tensors(tensors, file)
    read_tensor(header)             one tensor into memory of its own; the file is not mapped

Nothing that is not a finite number is ever written. What the disk refuses comes as an OSError,
which atomic.py turns into a message with the room that is needed; the format's own error hides the
reason in its text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.core.errors import GateError
from tunesmith.model.hub.validate import TensorHeader

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Raises GateError that names the first tensor with a value that is not finite, OSError when
    the disk refuses."""
    if name := find_nonfinite(tensors):
        raise GateError(
            f"{name} holds values that are not finite: nothing is written",
            where=file.name,
            fix="lower learning_rate; the newest checkpoint holds the last finite weights",
        )
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(cpu_tensors, file, metadata=metadata)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise
    file.chmod(
        file.parent.stat().st_mode & 0o666
    )  # the writer gives it to its owner alone; the folder says to whom


def read_tensor(header: TensorHeader) -> Tensor:
    """Of a floating-point type. A mapped file would count as ours, page by page, until it is
    closed."""
    with header.file.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little") + header.begin
    raw = np.fromfile(header.file, np.uint8, header.end - header.begin, offset=begin)
    return torch.from_numpy(raw).view(DTYPES[header.dtype]).reshape(header.shape)


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that holds a NaN or an infinity, empty if none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.detach().aminmax()  # a NaN is both
            if not (bool(low.isfinite()) and bool(high.isfinite())):
                return name
    return ""
