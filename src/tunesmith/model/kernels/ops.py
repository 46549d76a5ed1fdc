"""Operations with a C kernel for bf16 on the CPU, a Triton kernel for NVIDIA GPUs, and plain torch,
the reference, for everything else.

In: tensors; out: tensors. The C kernel is used for bf16 CPU tensors if a C compiler exists, the
Triton kernel for CUDA tensors of at most 32 bits if triton is installed. All others take the
reference, which autograd differentiates. Left out: matrix products (matmul.py, lora.py)."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tunesmith.core.hardware import find_compiler, has_python_headers
from tunesmith.model.kernels.build import call_kernel, load_library

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def has_attention() -> bool:
    """Return whether this processor has the instructions of attention.c and decode.c."""
    library = load_library()
    return library is not None and bool(library.attention_available())


def is_supported(*tensors: Tensor) -> bool:
    """Return whether the kernels can take these tensors: bf16 on the CPU, with values."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            return False
        if isinstance(tensor, FakeTensor):
            return False
    return load_library() is not None


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU, or the CPU that stands in for one: where Triton interprets
    (TRITON_INTERPRET=1), the code of a GPU runs on CPU tensors."""
    return device.type == _get_triton_device()


def find_triton(*tensors: Tensor) -> ModuleType | None:
    """Return triton_ops if its kernels take these tensors. Triton is imported for the first one on
    a GPU."""
    for tensor in tensors:
        if not is_gpu(tensor.device) or tensor.dtype not in TRITON_DTYPES:
            return None
    return _load_triton()


def has_triton() -> bool:
    """Return whether the kernels for GPUs have what they need: triton, torch for NVIDIA GPUs, a C
    compiler and Python's headers. plan/hardware_presets.py says it of a machine."""
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    if _get_triton_device() == "cpu":
        return True
    return find_compiler() is not None and has_python_headers()


@functools.cache
def _get_triton_device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@functools.cache
def _load_triton() -> ModuleType | None:
    if not has_triton():
        return None
    from tunesmith.model.kernels import triton_ops

    return triton_ops


# ---------------------------------------------------------------- sums up to each position

SMALLEST = 1e-200  # of the largest value of a row: its scale stays finite in fp64


def cumsum(x: Tensor) -> Tensor:
    """Return the sums of x up to each position of the last dimension. Not differentiable.

    A GPU adds them in any order, and torch refuses that if its algorithms must be deterministic.
    Sums of integers have one value in any order: each row is scaled so that its sums just fit in 63
    bits. A row with a value that is not finite has sums that are NaN."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    largest = x.abs().amax(-1, keepdim=True).double()
    num_bits = 62 - x.shape[-1].bit_length()  # of a value, so that all together have 62
    exponent = torch.frexp(largest.clamp(min=SMALLEST)).exponent
    scale = torch.exp2(num_bits - exponent.double())
    integers = (x.double() * scale).round().long()
    sums = integers.cumsum(-1).double() / scale
    return (sums + 0 * largest).to(x.dtype)


# ---------------------------------------------------------------- RMSNorm


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y = torch.empty_like(x)
        inverse_rms = torch.empty(rows, dtype=torch.float32)
        call_kernel("rms_norm", x, weight, y, inverse_rms, rows, width, float(eps))
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        width = x.shape[-1]
        dy = gradients[0].contiguous()
        dx = torch.empty_like(x)
        call_kernel("rms_norm_backward", x, weight, inverse_rms, dy, dx, x.numel() // width, width)
        dweight = None
        if ctx.needs_input_grad[1]:
            normed = x.view(-1, width).float() * inverse_rms[:, None]
            dweight = (dy.view(-1, width).float() * normed).sum(0)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale x [..., H] to unit root mean square, times weight [H] in fp32, rounded once."""
    if triton := find_triton(x):
        return triton.rms_norm(x, weight, eps)
    if is_supported(x):
        return _RmsNorm.apply(x, weight.float(), eps)
    x_wide = x if x.dtype == torch.float64 else x.float()
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(x_wide.dtype)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm of residual + x, or of x, and what it is the norm of. A kernel also adds the
    gradients of the two."""
    if triton := find_triton(x):
        return triton.add_rms_norm(x, residual, weight, eps)
    total = x if residual is None else residual + x
    return rms_norm(total, weight, eps), total


# ---------------------------------------------------------------- rotary embedding


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return rotate(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return rotate(gradients[0], cosine, sine, -1.0), None, None


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    """Rotate x with a kernel; `direction` is -1 for the gradient. Not differentiable by
    autograd."""
    if triton := find_triton(x):
        return triton.rotate(x, cosine, sine, direction)
    x = x.contiguous()
    y = torch.empty_like(x)
    call_kernel("rotate", x, cosine, sine, y, x.shape[0], x.shape[1], x.shape[2] // 2, direction)
    return y


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by cosine and sine [T, D/2] in fp32 (fp64 for fp64 x)."""
    if find_triton(x) or is_supported(x):
        return _Rotary.apply(x, cosine, sine)
    first, second = x.chunk(2, dim=-1)
    cosine = cosine[:, None].to(x.dtype)
    sine = sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


# ---------------------------------------------------------------- one factor per column


def scale_columns(y_NO: Tensor, gain_O: Tensor) -> Tensor:
    """Return gain * y, in place if there is a kernel. `gain_O` is fp32 (fp64 for fp64 y). Not
    differentiable by autograd."""
    if triton := find_triton(y_NO):
        return triton.scale_columns(y_NO, gain_O)
    if not is_supported(y_NO):
        return (y_NO * gain_O).to(y_NO.dtype)
    call_kernel("scale_columns", y_NO, gain_O, *y_NO.shape)
    return y_NO


def scale_columns_backward(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for y = gain * x, dx and the sum over rows of dy * y [O], which is gain times the
    gradient of `gain`."""
    if triton := find_triton(dy_NO, y_NO):
        return triton.scale_columns_backward(dy_NO, y_NO, gain_O)
    if not is_supported(dy_NO, y_NO):
        return (dy_NO * gain_O).to(dy_NO.dtype), (dy_NO.to(gain_O.dtype) * y_NO).sum(0)
    threads = torch.get_num_threads()
    dy_NO = dy_NO.contiguous()
    dx_NO = torch.empty_like(y_NO)
    sums = torch.empty(threads, y_NO.shape[1], dtype=torch.float32)
    call_kernel("scale_columns_backward", dy_NO, y_NO, gain_O, dx_NO, sums, *y_NO.shape, threads)
    return dx_NO, sums.sum(0)


# ---------------------------------------------------------------- rows of two tensors


def mix_rows(x: Tensor, other: Tensor, shares: Tensor) -> None:
    """Add to each row of x [..., D] its share [...] of the difference to the other row, in place.

    All are contiguous; the shares are fp32 (fp64 for fp64 x). Not differentiable by autograd."""
    if triton := find_triton(x, other):
        triton.mix_rows(x, other, shares)
    else:
        x.copy_(x.to(shares.dtype).lerp(other.to(shares.dtype), shares[..., None]))


# ---------------------------------------------------------------- gated activation


def gated_activation(gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
    """Return silu(gate) * up, or gelu-tanh(gate) * up. The kernels are not differentiable by
    autograd; see layers.Mlp."""
    if triton := find_triton(gate, up):
        return triton.gated_activation(gate, up, is_gelu)
    if not is_supported(gate, up):
        activated = F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)
        return activated * up
    y = torch.empty_like(gate)
    call_kernel("gated", gate, up, y, gate.numel(), int(is_gelu))
    return y


def gated_activation_backward(
    gate: Tensor, up: Tensor, dy: Tensor, is_gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d gate, d up and the recomputed forward product, from the gradient of that product."""
    if triton := find_triton(gate, up, dy):
        return triton.gated_activation_backward(gate, up, dy, is_gelu)
    if not is_supported(gate, up, dy):
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = gated_activation(*leaves, is_gelu)
        dgate, dup = torch.autograd.grad(y, leaves, dy)
        return dgate, dup, y.detach()
    dgate = torch.empty_like(gate)
    dup = torch.empty_like(gate)
    y = torch.empty_like(gate)
    dy = dy.contiguous()
    call_kernel("gated_backward", gate, up, dy, dgate, dup, y, gate.numel(), int(is_gelu))
    return dgate, dup, y


# ---------------------------------------------------------------- softmax cross-entropy


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raise IndexError for a target outside the vocabulary: C would write there."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise IndexError(f"a target is outside the vocabulary of {vocab_size} tokens")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    cap: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return unweighted losses [S] and the gradient of sum(weights * losses) with respect to the
    raw logits [S, V].

    A raw logit z means cap * tanh(scale * z / cap), or scale * z if cap is 0. `label_smoothing` of
    each target is spread evenly over all tokens; there is no C kernel for it. A kernel overwrites
    `logits`. On a GPU, a target outside the vocabulary has the loss NaN: reading it to raise an
    error would wait for the device."""
    if triton := find_triton(logits):
        return triton.cross_entropy(logits, targets, weights, scale, cap, label_smoothing)
    if is_supported(logits) and not label_smoothing:
        rows, vocab_size = logits.shape
        losses = torch.empty(rows, dtype=torch.float32)
        _check_targets(targets, vocab_size)
        arguments = (logits, targets, weights, losses, rows, vocab_size, float(scale), float(cap))
        call_kernel("cross_entropy", *arguments)
        return losses, logits
    scaled_logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    slope = torch.full_like(scaled_logits, scale)
    if cap:
        squashed = torch.tanh(scaled_logits / cap)
        scaled_logits = cap * squashed
        slope = scale * (1 - squashed**2)
    log_probabilities = torch.log_softmax(scaled_logits, dim=-1)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    gradient = log_probabilities.exp()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1 - label_smoothing
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(-1)
        gradient -= label_smoothing / logits.shape[1]
    weights_S1 = weights[:, None].to(scaled_logits.dtype)
    return losses, (gradient * weights_S1 * slope).to(logits.dtype)


def kl_divergence(
    base: Tensor, tuned: Tensor, targets: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare two models by their raw logits [S, V], which are scaled as in `cross_entropy`.

    Returns the losses of `tuned` [S], KL(base || tuned) [S] in nats, and 1 where both have the same
    most likely token [S]. Rounding may leave a KL slightly below 0."""
    if triton := find_triton(base, tuned):
        return triton.kl_divergence(base, tuned, targets, scale, cap)
    if is_supported(base, tuned):
        rows, vocab_size = base.shape
        _check_targets(targets, vocab_size)
        losses, kl, top1_agreement = torch.empty(3, rows, dtype=torch.float32)
        outputs = (losses, kl, top1_agreement)
        sizes = (rows, vocab_size, float(scale), float(cap))
        call_kernel("divergence", base, tuned, targets, *outputs, *sizes)
        return outputs
    top1_agreement = base.argmax(-1) == tuned.argmax(-1)
    log_p = _compute_log_probabilities(base, scale, cap)
    log_q = _compute_log_probabilities(tuned, scale, cap)
    losses = -log_q.gather(1, targets[:, None])[:, 0]
    kl = (log_p.exp() * log_p.sub_(log_q)).sum(-1)
    return losses, kl, top1_agreement.to(log_p.dtype)


def _compute_log_probabilities(logits: Tensor, scale: float, cap: float) -> Tensor:
    scaled_logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if cap:
        scaled_logits = cap * torch.tanh(scaled_logits / cap)
    return scaled_logits.log_softmax(-1)
