"""The CPU's bf16 kernels: kernels.c, attention.c, rows.c and lora.c compiled once a machine,
plain-torch references.

In: tensors; out: tensors. A kernel is used when its tensors are contiguous bf16 on the CPU and a C
compiler was found; anything else (fp32, fp64, CUDA, no compiler) takes the reference, which
autograd differentiates. Left out: matrix products, which oneDNN and cuBLAS do better."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("kernels.c", "attention.c", "decode.c", "lora.c")
)
HEADER = Path(__file__).with_name("vectors.h")
# Reassociation lets the compiler vectorise sums. -ffast-math itself would break NaN detection and
# flush denormals in the whole process.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


def get_cache_dir() -> Path:
    root = (
        os.environ.get("TUNESMITH_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tunesmith"
    )
    return Path(root).expanduser() / "kernels"


def _describe_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return platform.machine() + (flags.group() if flags else platform.processor())


def _compile_library(compiler: str, target: Path, use_openmp: bool) -> bool:
    """Objects are compiled with -fopenmp but linked without it: the symbols then come from torch's
    own OpenMP, and the two do not compete for the cores."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        library, openmp_flags = str(Path(folder) / target.name), ["-fopenmp"] if use_openmp else []
        commands = [
            [compiler, *FLAGS, *openmp_flags, "-c", str(s), "-o", o]
            for s, o in zip(SOURCES, objects, strict=True)
        ]
        commands.append([compiler, "-shared", *objects, "-lm", "-o", library])
        for command in commands:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        os.replace(library, target)
    return True


def _share_torch_openmp() -> None:
    maps = Path("/proc/self/maps")
    loaded = (
        re.findall(r"\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read_text())
        if maps.exists()
        else []
    )
    for library in sorted(set(loaded)):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None without a C compiler. Threads are used when they are torch's
    own."""
    compiler = (
        shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None:
        return None
    _share_torch_openmp()
    for use_openmp in (True, False):
        key_parts = (
            *(source.read_text() for source in (*SOURCES, HEADER)),
            *FLAGS,
            _describe_processor(),
            compiler,
            str(use_openmp),
        )
        key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:16]
        target = get_cache_dir() / f"kernels-{key}.so"
        if not target.exists() and not _compile_library(compiler, target, use_openmp):
            continue
        try:
            return ctypes.CDLL(str(target))
        # no OpenMP in this process to resolve the symbols: the version without threads will load
        except OSError:
            continue
    return None


@functools.cache
def has_attention() -> bool:
    """Does this processor have what attention.c and rows.c need?"""
    compiled = load_library()
    return compiled is not None and bool(compiled.attention_available())


def is_supported(*tensors: Tensor) -> bool:
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and load_library() is not None
    )


def call_kernel(name: str, *arguments: Tensor | int | float) -> int:
    """Runs one C function on contiguous tensors (as pointers), longs and floats."""
    converted: list[ctypes.c_void_p | ctypes.c_long | ctypes.c_float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous(), f"{name} takes contiguous tensors"
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        else:
            converted.append(ctypes.c_float(argument))
    return getattr(load_library(), name)(*converted)


# ---------------------------------------------------------------- RMSNorm


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        y, inverse_rms = torch.empty_like(x), torch.empty(x.numel() // width)
        call_kernel("rms_norm", x, weight, y, inverse_rms, x.numel() // width, width, float(eps))
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        width, dy = x.shape[-1], gradients[0].contiguous()
        dx = torch.empty_like(x)
        call_kernel("rms_norm_backward", x, weight, inverse_rms, dy, dx, x.numel() // width, width)
        dweight = None
        if ctx.needs_input_grad[1]:
            normed = x.view(-1, width).float() * inverse_rms[:, None]
            dweight = (dy.view(-1, width).float() * normed).sum(0)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] scaled to unit root mean square, times weight [H] in fp32, rounded once."""
    if is_supported(x):
        return _RmsNorm.apply(x, weight.float(), eps)
    x_wide = x if x.dtype == torch.float64 else x.float()
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(x_wide.dtype)).to(x.dtype)


# ---------------------------------------------------------------- rotary embedding


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _call_rotary(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _call_rotary(gradients[0], cosine, sine, -1.0), None, None


def _call_rotary(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    call_kernel("rotate", x, cosine, sine, y, x.shape[0], x.shape[1], x.shape[2] // 2, direction)
    return y


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by cosine and sine [T, D/2] in fp32 (fp64 for fp64 x)."""
    if is_supported(x):
        return _Rotary.apply(x, cosine, sine)
    a, b = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


# ---------------------------------------------------------------- a factor for each column


def scale_columns(y_NO: Tensor, gain_O: Tensor) -> Tensor:
    """gain * y, in place where there is a kernel; `gain_O` in fp32 (fp64 for fp64 y). No autograd
    of its own."""
    if not is_supported(y_NO):
        return (y_NO * gain_O).to(y_NO.dtype)
    call_kernel("scale_columns", y_NO, gain_O, *y_NO.shape)
    return y_NO


def scale_columns_backward(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = gain * x: dx, and the sum over rows of dy * y [O], which is gain times the gradient of
    `gain`."""
    if not is_supported(dy_NO, y_NO):
        return (dy_NO * gain_O).to(dy_NO.dtype), (dy_NO.to(gain_O.dtype) * y_NO).sum(0)
    num_threads = torch.get_num_threads()
    dy_NO, dx_NO, sums = (
        dy_NO.contiguous(),
        torch.empty_like(y_NO),
        torch.empty(num_threads, y_NO.shape[1]),
    )
    call_kernel(
        "scale_columns_backward", dy_NO, y_NO, gain_O, dx_NO, sums, *y_NO.shape, num_threads
    )
    return dx_NO, sums.sum(0)


# ---------------------------------------------------------------- gated activation


def gated_activation(gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu-tanh(gate) * up. No autograd of its own on the kernel path: see
    layers.GatedMlp."""
    if not is_supported(gate, up):
        return (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up
    y = torch.empty_like(gate)
    call_kernel("gated", gate, up, y, gate.numel(), int(is_gelu))
    return y


def gated_activation_backward(
    gate: Tensor, up: Tensor, dy: Tensor, is_gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d gate, d up and the forward product again, from the gradient of that product."""
    if not is_supported(gate, up, dy):
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = gated_activation(*leaves, is_gelu)
        dgate, dup = torch.autograd.grad(y, leaves, dy)
        return dgate, dup, y.detach()
    dgate, dup, y = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    call_kernel(
        "gated_backward", gate, up, dy.contiguous(), dgate, dup, y, gate.numel(), int(is_gelu)
    )
    return dgate, dup, y


# ---------------------------------------------------------------- softmax cross-entropy


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Losses [S] (unweighted) and the gradient of sum(weights * losses) with respect to the raw
    logits [S, V].

    A raw logit z stands for cap * tanh(scale * z / cap), or scale * z when cap is 0. The kernel
    overwrites `logits`."""
    if is_supported(logits):
        losses = torch.empty(logits.shape[0])
        rows, vocab = logits.shape
        if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise IndexError(
                f"a target is outside the vocabulary of {vocab} tokens"
            )  # C would write there
        call_kernel(
            "cross_entropy", logits, targets, weights, losses, rows, vocab, float(scale), float(cap)
        )
        return losses, logits
    scaled_logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    slope = torch.full_like(scaled_logits, scale)
    if cap:
        squashed = torch.tanh(scaled_logits / cap)
        scaled_logits, slope = cap * squashed, scale * (1 - squashed**2)
    log_probabilities = torch.log_softmax(scaled_logits, dim=-1)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    gradient = log_probabilities.exp()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, (gradient * weights[:, None].to(scaled_logits.dtype) * slope).to(logits.dtype)


def kl_divergence(
    base: Tensor, tuned: Tensor, targets: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From raw logits [S, V] as above: losses of `tuned` [S], KL(base || tuned) [S] in nats, and 1
    where both have the same likeliest token [S]. Rounding may leave a KL a trace below 0."""
    if is_supported(base, tuned):
        rows, vocab = base.shape
        losses, kl, top1_agreement = torch.empty(3, rows)
        if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise IndexError(f"a target is outside the vocabulary of {vocab} tokens")
        call_kernel(
            "divergence",
            base,
            tuned,
            targets,
            losses,
            kl,
            top1_agreement,
            rows,
            vocab,
            float(scale),
            float(cap),
        )
        return losses, kl, top1_agreement
    p, q = ((z if z.dtype == torch.float64 else z.float()) * scale for z in (base, tuned))
    if cap:
        p, q = cap * torch.tanh(p / cap), cap * torch.tanh(q / cap)
    top1_agreement = base.argmax(-1) == tuned.argmax(-1)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (
        -q.gather(1, targets[:, None])[:, 0],
        (p.exp() * p.sub_(q)).sum(-1),
        top1_agreement.to(p.dtype),
    )
