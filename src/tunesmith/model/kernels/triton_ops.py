"""The operations of ops.py through the Triton kernels: sizes of blocks, launches and gradients.

In: CUDA tensors in bf16, fp16 or fp32, or CPU tensors if Triton interprets (TRITON_INTERPRET=1).
Out: what the functions of the same name in ops.py return. Each launch is an operator of torch that
fills tensors it is given, so that fake tensors go through, and a dispatch mode can count. Left out:
the choice between implementations (ops.py)."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from tunesmith.core.errors import MachineError
from tunesmith.model.kernels import triton_kernels as kernels
from tunesmith.model.machine_errors import explain_error

TILE = 2048  # elements that a program holds at once, if its rows are not longer
VOCAB_BLOCK = 4096
SUM_PROGRAMS = 512  # that share the rows and columns of a sum over rows
COLUMN_BLOCK = 128
ROW_BLOCK = 16

TRITON_FIX = (
    "install a C compiler and Python's headers (such as python3-dev), or another version of triton;"
    " without triton (`pip uninstall triton`) plain torch computes the same, with more memory"
)

CACHE_FIX = "set TRITON_CACHE_DIR to a folder from which compiled code can be loaded"
DRIVER_FIX = "run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
# words of what Triton raises where it finds no libcuda, or no program that lists libraries
DRIVER_WORDS = ("libcuda", "ldconfig")
CACHE_WORDS = ("Could not create or locate cache dir", "Failed to load newly compiled")
CACHE_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# of plain RuntimeErrors of its compiler, on a GPU that is too old for it too
COMPILER_WORDS = (
    *("Failed to find C compiler", "Failed to find C++ compiler", "Cannot find ptxas"),
    "PassManager::run failed",
)
# what Triton raises where a kernel is compiled or loaded, and what a bug in a launch raises too
LAUNCH_ERRORS = (
    AssertionError,
    CalledProcessError,
    ImportError,
    OSError,
    RuntimeError,
    TritonError,
)

_library = torch.library.Library("tunesmith", "DEF")


def _define(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an operator of a launch. On fake tensors it does nothing."""

    def define(launch: Callable[..., None]) -> Callable[..., None]:
        name = launch.__name__.removeprefix("_launch_")
        _library.define(f"{name}{schema}")
        for key in ("CUDA", "CPU"):
            _library.impl(name, _explain_errors(launch, name), key)
        torch.library.register_fake(f"tunesmith::{name}", lambda *_: None, lib=_library)
        return getattr(torch.ops.tunesmith, name).default

    return define


def _explain_errors(launch: Callable[..., None], name: str) -> Callable[..., None]:
    """Raise MachineError if Triton cannot compile a kernel, or how it is called, which needs a C
    compiler and Python's headers. Errors of CUDA and of memory stay what they are, for
    machine_errors.py, and so do errors that are not known to be the machine's: they are bugs."""

    @functools.wraps(launch)
    def launch_explained(*arguments: Any) -> None:
        try:
            launch(*arguments)
        except LAUNCH_ERRORS as error:
            if isinstance(error, RuntimeError) and explain_error(error) is not None:
                raise
            fix = _choose_fix(error)
            if not fix:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            message = f"Triton cannot run {name}: {lines[0]}"
            raise MachineError(message, fix=fix) from error

    return launch_explained


def _choose_fix(error: Exception) -> str:
    """Return what to do about the machine; empty if the error is not known to be its."""
    if isinstance(error, CalledProcessError | TritonError):
        return TRITON_FIX  # the command of a compiler names libcuda too
    text = str(error)
    if any(words in text for words in DRIVER_WORDS):
        return DRIVER_FIX
    is_cache_full = isinstance(error, OSError) and error.errno in CACHE_CODES
    has_cache_words = any(words in text for words in CACHE_WORDS)
    if is_cache_full or has_cache_words or isinstance(error, PermissionError | ImportError):
        return CACHE_FIX
    is_compiler_missing = isinstance(error, FileNotFoundError) and (
        error.filename == os.environ.get("CC")
    )
    has_compiler_words = any(words in text for words in COMPILER_WORDS)
    return TRITON_FIX if is_compiler_missing or has_compiler_words else ""


def _get(kernel: Any) -> Any:
    """Return a kernel untyped: triton's types know nothing of what a launch takes."""
    return kernel


def _fit_rows(width: int) -> tuple[dict[str, int], int]:
    """Return the block of rows of a program that holds whole rows, and its warps."""
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, TILE // block_width)
    warps = min(16, max(4, block_rows * block_width // 512))
    return {"ROWS": block_rows, "WIDTH": block_width}, warps


def _make_sums(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, int]:
    """Return room for the sums of each program over its rows [programs, width], and how many tiles
    of rows it takes."""
    wanted = triton.cdiv(SUM_PROGRAMS, triton.cdiv(width, COLUMN_BLOCK))
    num_tiles = triton.cdiv(num_rows, ROW_BLOCK)
    tiles = triton.cdiv(num_tiles, wanted)
    programs = triton.cdiv(num_tiles, tiles) if tiles else 0
    return torch.empty(programs, width, dtype=torch.float32, device=device), tiles


# ---------------------------------------------------------------- RMSNorm


@_define(
    "(Tensor x, Tensor? residual, Tensor weight, Tensor(a!) y, Tensor(b!)? total,"
    " Tensor(c!) inverse_rms, float eps) -> ()"
)
def _launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor | None,
    inverse_rms: Tensor,
    eps: float,
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    block, warps = _fit_rows(width)
    grid = (triton.cdiv(rows, block["ROWS"]),)
    tensors = (x, residual, weight, y, total, inverse_rms)
    has_residual = residual is not None
    _get(kernels.rms_norm_kernel)[grid](
        *tensors, rows, width, eps, HAS_RESIDUAL=has_residual, **block, num_warps=warps
    )


@_define(
    "(Tensor x, Tensor weight, Tensor inverse_rms, Tensor dy, Tensor? dtotal, Tensor(a!) dx) -> ()"
)
def _launch_rms_norm_backward(
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    dx: Tensor,
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    block, warps = _fit_rows(width)
    grid = (triton.cdiv(rows, block["ROWS"]),)
    tensors = (x, weight, inverse_rms, dy, dtotal, dx)
    _get(kernels.rms_norm_backward_kernel)[grid](
        *tensors, rows, width, HAS_DSUM=dtotal is not None, **block, num_warps=warps
    )


@_define("(Tensor x, Tensor inverse_rms, Tensor dy, Tensor(a!) sums, int tiles) -> ()")
def _launch_rms_norm_weight(
    x: Tensor, inverse_rms: Tensor, dy: Tensor, sums: Tensor, tiles: int
) -> None:
    width = x.shape[-1]
    grid = (len(sums), triton.cdiv(width, COLUMN_BLOCK))
    tensors = (x, inverse_rms, dy, sums)
    _get(kernels.rms_norm_weight_kernel)[grid](
        *tensors, x.numel() // width, width, tiles, ROWS=ROW_BLOCK, WIDTH=COLUMN_BLOCK, num_warps=4
    )


class _TritonRmsNorm(torch.autograd.Function):
    """Return the norm of x, or of residual + x, and that sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        y = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device)
        residual = None if residual is None else residual.contiguous()
        if rows:
            _launch_rms_norm(x, residual, weight, y, total, inverse_rms, eps)
        summed = x if total is None else total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, inverse_rms)
        return y, summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, inverse_rms = ctx.saved_tensors
        dy, dtotal = gradients
        if dy is None:
            return dtotal, dtotal, None, None
        dtotal = None if dtotal is None else dtotal.contiguous()
        dy = dy.contiguous()
        dx = torch.empty_like(summed)
        if dx.numel():
            _launch_rms_norm_backward(summed, weight, inverse_rms, dy, dtotal, dx)
        dweight = None
        if ctx.needs_input_grad[2]:
            sums, tiles = _make_sums(len(inverse_rms), dx.shape[-1], dx.device)
            if tiles:
                _launch_rms_norm_weight(summed, inverse_rms, dy, sums, tiles)
            dweight = sums.sum(0).to(weight.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _TritonRmsNorm.apply(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _TritonRmsNorm.apply(x, residual, weight, eps)


# ---------------------------------------------------------------- rotary embedding


@_define("(Tensor x, Tensor cosine, Tensor sine, Tensor(a!) y, float direction) -> ()")
def _launch_rotary(x: Tensor, cosine: Tensor, sine: Tensor, y: Tensor, direction: float) -> None:
    tokens, num_heads, head_size = x.shape
    half = head_size // 2
    block = {"HEADS": triton.next_power_of_2(num_heads), "HALF": triton.next_power_of_2(half)}
    warps = min(16, max(1, block["HEADS"] * block["HALF"] // 512))
    _get(kernels.rotary_kernel)[(tokens,)](
        x, cosine, sine, y, num_heads, half, direction, **block, num_warps=warps
    )


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _launch_rotary(x, cosine.contiguous(), sine.contiguous(), y, direction)
    return y


# ---------------------------------------------------------------- one factor per column


@_define("(Tensor(a!) y, Tensor gain) -> ()")
def _launch_scale_columns(y: Tensor, gain: Tensor) -> None:
    rows, width = y.shape
    grid = (triton.cdiv(rows, ROW_BLOCK), triton.cdiv(width, COLUMN_BLOCK))
    _get(kernels.scale_columns_kernel)[grid](
        y, gain, rows, width, ROWS=ROW_BLOCK, WIDTH=COLUMN_BLOCK, num_warps=4
    )


@_define("(Tensor dy, Tensor y, Tensor gain, Tensor(a!) dx, Tensor(b!) sums, int tiles) -> ()")
def _launch_scale_columns_backward(
    dy: Tensor, y: Tensor, gain: Tensor, dx: Tensor, sums: Tensor, tiles: int
) -> None:
    rows, width = y.shape
    grid = (len(sums), triton.cdiv(width, COLUMN_BLOCK))
    tensors = (dy, y, gain, dx, sums)
    _get(kernels.scale_columns_backward_kernel)[grid](
        *tensors, rows, width, tiles, ROWS=ROW_BLOCK, WIDTH=COLUMN_BLOCK, num_warps=4
    )


def scale_columns(y_NO: Tensor, gain_O: Tensor) -> Tensor:
    if y_NO.numel():
        _launch_scale_columns(y_NO, gain_O)
    return y_NO


def scale_columns_backward(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    dx_NO = torch.empty_like(y_NO)
    rows, width = y_NO.shape
    sums, tiles = _make_sums(rows, width, y_NO.device)
    if tiles:
        _launch_scale_columns_backward(dy_NO.contiguous(), y_NO, gain_O, dx_NO, sums, tiles)
    return dx_NO, sums.sum(0)


# ---------------------------------------------------------------- rows of two tensors


@_define("(Tensor(a!) x, Tensor other, Tensor shares) -> ()")
def _launch_mix_rows(x: Tensor, other: Tensor, shares: Tensor) -> None:
    rows = shares.numel()
    width = x.shape[-1]
    block, warps = _fit_rows(width)
    grid = (triton.cdiv(rows, block["ROWS"]),)
    _get(kernels.mix_rows_kernel)[grid](x, other, shares, rows, width, **block, num_warps=warps)


def mix_rows(x: Tensor, other: Tensor, shares: Tensor) -> None:
    if shares.numel():
        _launch_mix_rows(x, other, shares)


# ---------------------------------------------------------------- gated activation


@_define("(Tensor gate, Tensor up, Tensor(a!) y, bool is_gelu) -> ()")
def _launch_gated(gate: Tensor, up: Tensor, y: Tensor, is_gelu: bool) -> None:
    count = gate.numel()
    _get(kernels.gated_kernel)[(triton.cdiv(count, TILE),)](
        gate, up, y, count, IS_GELU=is_gelu, BLOCK=TILE, num_warps=4
    )


@_define(
    "(Tensor gate, Tensor up, Tensor dy, Tensor(a!) dgate, Tensor(b!) dup, Tensor(c!) y,"
    " bool is_gelu) -> ()"
)
def _launch_gated_backward(
    gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, y: Tensor, is_gelu: bool
) -> None:
    count = gate.numel()
    tensors = (gate, up, dy, dgate, dup, y)
    _get(kernels.gated_backward_kernel)[(triton.cdiv(count, TILE),)](
        *tensors, count, IS_GELU=is_gelu, BLOCK=TILE, num_warps=4
    )


def gated_activation(gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
    y = torch.empty_like(gate)
    if gate.numel():
        _launch_gated(gate, up, y, is_gelu)
    return y


def gated_activation_backward(
    gate: Tensor, up: Tensor, dy: Tensor, is_gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, y = (torch.empty_like(gate) for _ in range(3))
    if gate.numel():
        _launch_gated_backward(gate, up, dy.contiguous(), dgate, dup, y, is_gelu)
    return dgate, dup, y


# ---------------------------------------------------------------- softmax cross-entropy


@_define(
    "(Tensor(a!) logits, Tensor targets, Tensor weights, Tensor(b!) losses, float scale, float cap,"
    " float label_smoothing) -> ()"
)
def _launch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    losses: Tensor,
    scale: float,
    cap: float,
    label_smoothing: float,
) -> None:
    rows, vocab_size = logits.shape
    tensors = (logits, targets, weights, losses)
    _get(kernels.cross_entropy_kernel)[(rows,)](
        *tensors,
        vocab_size,
        scale,
        cap,
        label_smoothing,
        HAS_CAP=cap != 0,
        BLOCK=min(VOCAB_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
    )


@_define(
    "(Tensor base, Tensor tuned, Tensor targets, Tensor(a!) losses, Tensor(b!) kl,"
    " Tensor(c!) agreement, float scale, float cap) -> ()"
)
def _launch_kl_divergence(
    base: Tensor,
    tuned: Tensor,
    targets: Tensor,
    losses: Tensor,
    kl: Tensor,
    agreement: Tensor,
    scale: float,
    cap: float,
) -> None:
    rows, vocab_size = base.shape
    tensors = (base, tuned, targets, losses, kl, agreement)
    _get(kernels.kl_divergence_kernel)[(rows,)](
        *tensors,
        vocab_size,
        scale,
        cap,
        HAS_CAP=cap != 0,
        BLOCK=min(VOCAB_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
    )


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    cap: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        tensors = (logits, targets, weights, losses)
        _launch_cross_entropy(*tensors, float(scale), float(cap), label_smoothing)
    return losses, logits


def kl_divergence(
    base: Tensor, tuned: Tensor, targets: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    losses, kl, agreement = torch.empty(3, len(base), dtype=torch.float32, device=base.device)
    if len(base):
        tensors = (base, tuned, targets, losses, kl, agreement)
        _launch_kl_divergence(*tensors, float(scale), float(cap))
    return losses, kl, agreement
