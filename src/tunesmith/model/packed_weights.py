"""Read the packed weights of a checkpoint, and measure what FP8 loses.

    read_mxfp4_experts(header, dtype)       experts that stay packed
    measure_rounding(folder, dtype)         what FP8 weights lose where they are computed in bf16

In: a model folder, or headers of `hub/packed_tensors.attach_scales`. FP8 matrices are read like
others, in fp32 (safetensors_io.py), and rounded to the dtype of the model; the loss is measured on
a few of them, for preflight to report. MXFP4 loses nothing (packed_formats.py). Left out: which
tensors a network needs (text_network.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tunesmith.core.errors import InputError
from tunesmith.model.hub.packed_tensors import (
    FP8,
    FP8_DTYPE,
    MXFP4_DTYPE,
    attach_scales,
    find_packing,
)
from tunesmith.model.hub.validate import TensorHeader, read_headers, read_model_json
from tunesmith.model.packed_formats import MAX_SCALE, Mxfp4ExpertWeight
from tunesmith.model.safetensors_io import read_tensor

MAX_MEASURED = 8  # matrices whose rounding is measured


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


@dataclass(frozen=True)
class Rounding:
    """The loss of precision of FP8 weights in another dtype: the mean relative error of the values
    that are not 0, in `num_measured` of `num_matrices` matrices."""

    dtype_name: str
    mean_relative_error: float
    num_measured: int
    num_matrices: int


def measure_rounding(folder: Path, dtype: torch.dtype) -> Rounding | None:
    """Measure a few FP8 matrices of a model folder, evenly spaced in the order of its files. Return
    None if there are none."""
    where = str(folder / "config.json")
    config = read_model_json(folder / "config.json")
    packing = find_packing(config, str(config.get("model_type")), where)
    if packing is None or packing.method != FP8:
        return None
    headers = attach_scales(read_headers(folder), packing, str(folder)).values()
    packed = [header for header in headers if header.dtype == FP8_DTYPE]
    if not packed:
        return None
    measured = packed[:: -(-len(packed) // MAX_MEASURED)]
    total = 0.0
    num_values = 0
    for header in measured:
        exact = read_tensor(header)
        exact = exact[exact != 0].double()
        errors = (exact.to(dtype).double() - exact).abs() / exact.abs()
        total += float(errors.sum())
        num_values += len(errors)
    dtype_name = str(dtype).removeprefix("torch.")
    return Rounding(dtype_name, total / max(1, num_values), len(measured), len(packed))
