"""Weights that files hold in fewer bits than they are computed in: FP8 and MXFP4.

    find_packing(config, model_type, where)     how config.json says that weights are packed
    attach_scales(headers, packing, where)      one header per matrix, which knows its scales

An FP8 matrix `X.weight` [O, I] has `X.weight_scale_inv`: one number, or one for each block of the
matrix (DeepSeek-V3, Ministral 3). Experts in MXFP4 are `X_blocks` [E, O, G, 16] and `X_scales`
[E, O, G], which are the matrices X [E, O, 32 G] (gpt-oss). Scales of activations are not needed,
since activations stay wide. Other quantized checkpoints are refused by name. Left out: reading
values (safetensors_io.py, mxfp4.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import TensorHeader

FP8 = "fp8"
MXFP4 = "mxfp4"
FP8_DTYPE = "F8_E4M3"
MXFP4_DTYPE = "MXFP4"  # of headers that attach_scales makes
MXFP4_TYPES = ("gpt_oss",)
BYTES_PER_GROUP = 16  # of MXFP4: 32 weights
EXPERT_STACKS = (".experts.gate_up_proj", ".experts.down_proj")
FP8_SCALE = "_scale_inv"
OTHER_FP8_SCALE = "_scale"
ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")
MAX_BLOCK = 2**16
DOWNLOAD_FIX = "download the model again"
UNQUANTIZED_FIX = "use the unquantized model; QLoRA quantizes it while loading"


@dataclass(frozen=True)
class Packing:
    """How the matrices of a checkpoint are stored.

    `block` are the rows and columns of an FP8 matrix that share a scale, None if all do."""

    method: str
    block: tuple[int, int] | None = None


def find_packing(config: Mapping[str, Any], model_type: str, where: str) -> Packing | None:
    """Return how the weights are packed, None if they are not. Raise InputError for a way that is
    not supported."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method == FP8:
        return Packing(FP8, _read_block(settings.get("weight_block_size"), where))
    if method == MXFP4 and model_type in MXFP4_TYPES:
        return Packing(MXFP4)
    name = str(method or settings)[:80]
    message = f"the weights are already quantized ({name})"
    if method == MXFP4:
        message += f": {name} is supported for {', '.join(MXFP4_TYPES)} only"
    raise InputError(message, where=where, fix=UNQUANTIZED_FIX)


def _read_block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if all(type(size) is int and 0 < size <= MAX_BLOCK for size in value):
            return rows, columns
    message = f"weight_block_size is {value!r:.80}, not the two sizes of a block"
    raise InputError(message, where=where, fix="download config.json again")


def attach_scales(
    headers: Mapping[str, TensorHeader], packing: Packing | None, where: str
) -> dict[str, TensorHeader]:
    """Return the headers of the weights, each packed one with its scales. Raise InputError for
    scales that are missing, or do not fit the weight."""
    if packing is None:
        return dict(headers)
    attached: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        if packing.method == FP8 and header.dtype == FP8_DTYPE:
            attached[name] = _attach_fp8(name, headers, packing.block, where)
        elif packing.method == MXFP4 and name.endswith("_blocks"):
            attached[name.removesuffix("_blocks")] = _attach_mxfp4(name, headers, where)
        elif not _is_scale(name, headers):
            attached[name] = header
    return attached


def pack_expected_headers(
    headers: Mapping[str, TensorHeader], packing: Packing | None
) -> dict[str, TensorHeader]:
    """Return the headers of weights that do not exist yet, with experts that will be packed. FP8
    matrices are wide once they are loaded."""
    packed = dict(headers)
    if packing is not None and packing.method == MXFP4:
        for name, header in headers.items():
            if name.endswith(EXPERT_STACKS):
                scales = replace(header, dtype="U8")
                packed[name] = replace(header, dtype=MXFP4_DTYPE, scales=scales)
    return packed


def _is_scale(name: str, headers: Mapping[str, TensorHeader]) -> bool:
    if name.endswith(ACTIVATION_SCALES):
        return True
    if name.endswith("_scales"):
        return f"{name.removesuffix('_scales')}_blocks" in headers
    return name.endswith(FP8_SCALE) and name.removesuffix(FP8_SCALE) in headers


def _attach_fp8(
    name: str,
    headers: Mapping[str, TensorHeader],
    block: tuple[int, int] | None,
    where: str,
) -> TensorHeader:
    header = headers[name]
    _refuse_other_fp8(name, headers, where)
    scales = headers.get(f"{name}{FP8_SCALE}")
    if scales is None:
        message = f"the weights have no {name}{FP8_SCALE}, the scales of an FP8 matrix"
        raise InputError(message, where=where, fix=DOWNLOAD_FIX)
    expected = [(), (1,)]
    if block is not None:
        pairs = zip(header.shape, block, strict=False)
        expected = [tuple(-(-size // step) for size, step in pairs)]
    if scales.shape not in expected or scales.dtype not in ("F32", "BF16"):
        kind = "one number" if block is None else f"one per block of {block[0]} x {block[1]}"
        message = (
            f"the scales of {name} {list(header.shape)} are {scales.dtype} {list(scales.shape)}, "
            f"not {kind}"
        )
        raise InputError(message, where=where, fix=DOWNLOAD_FIX)
    return replace(header, scales=scales, block=block)


def _refuse_other_fp8(name: str, headers: Mapping[str, TensorHeader], where: str) -> None:
    """Raise InputError for the FP8 of other tools, which a config may call by the same name."""
    if f"{name}{OTHER_FP8_SCALE}" in headers:
        message = (
            f"the weights hold {name}{OTHER_FP8_SCALE}, as AutoFP8 and vLLM quantize; FP8 is "
            "supported only for matrices with weight_scale_inv"
        )
        raise InputError(message, where=where, fix=UNQUANTIZED_FIX)
    if len(headers[name].shape) != 2:
        shape = list(headers[name].shape)
        message = f"{name} is FP8 of shape {shape}; FP8 is supported for matrices only"
        raise InputError(message, where=where, fix=UNQUANTIZED_FIX)


def _attach_mxfp4(name: str, headers: Mapping[str, TensorHeader], where: str) -> TensorHeader:
    header = headers[name]
    scales = headers.get(f"{name.removesuffix('_blocks')}_scales")
    is_fitting = (
        scales is not None
        and header.dtype == scales.dtype == "U8"
        and len(header.shape) == 4
        and header.shape == (*scales.shape, BYTES_PER_GROUP)
    )
    if not is_fitting:
        stored = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        message = f"the scales of {name} {header.dtype} {list(header.shape)} are {stored}"
        raise InputError(message, where=where, fix=DOWNLOAD_FIX)
    num_experts, num_outputs, num_groups, _ = header.shape
    shape = (num_experts, num_outputs, 2 * BYTES_PER_GROUP * num_groups)
    return replace(header, dtype=MXFP4_DTYPE, shape=shape, scales=scales)
