"""The CPU's bf16 kernels: kernels.c, attention.c, rows.c and lora.c compiled once a machine, plain-torch references.

In: tensors; out: tensors. A kernel is used when its tensors are contiguous bf16 on the CPU and a C compiler was found;
anything else (fp32, fp64, CUDA, no compiler) takes the reference, which autograd differentiates. Left out: matrix
products, which oneDNN and cuBLAS do better.
"""

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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "attention.c", "rows.c", "lora.c"))
HEADER = Path(__file__).with_name("vectors.h")
# Reassociation lets the compiler vectorise sums. -ffast-math itself would break NaN detection and flush denormals
# in the whole process.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


def cache_folder() -> Path:
    root = os.environ.get("TUNESMITH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tunesmith"
    return Path(root).expanduser() / "kernels"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return platform.machine() + (flags.group() if flags else platform.processor())


def _compile(compiler: str, target: Path, threads: bool) -> bool:
    """Objects are compiled with -fopenmp but linked without it: the symbols then come from torch's own OpenMP, and
    the two do not compete for the cores."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        library, openmp = str(Path(folder) / target.name), ["-fopenmp"] if threads else []
        commands = [[compiler, *FLAGS, *openmp, "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)]
        commands.append([compiler, "-shared", *objects, "-lm", "-o", library])
        for command in commands:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        os.replace(library, target)
    return True


def _share_torch_openmp() -> None:
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read_text()) if maps.exists() else []
    for library in sorted(set(loaded)):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None without a C compiler. Threads are used when they are torch's own."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    _share_torch_openmp()
    for threads in (True, False):
        parts = (*(source.read_text() for source in (*SOURCES, HEADER)), *FLAGS, _processor(), compiler, str(threads))
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        target = cache_folder() / f"kernels-{key}.so"
        if not target.exists() and not _compile(compiler, target, threads):
            continue
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # no OpenMP in this process to resolve the symbols: the version without threads will load
            continue
    return None


@functools.cache
def has_attention() -> bool:
    """Does this processor have what attention.c and rows.c need?"""
    compiled = library()
    return compiled is not None and bool(compiled.attention_available())


def usable(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors) and library() is not None


def call(name: str, *arguments: Tensor | int | float) -> int:
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
    return getattr(library(), name)(*converted)


# ---------------------------------------------------------------- RMSNorm


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        y, inverse_rms = torch.empty_like(x), torch.empty(x.numel() // width)
        call("rms_norm", x, weight, y, inverse_rms, x.numel() // width, width, float(eps))
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        width, dy = x.shape[-1], gradients[0].contiguous()
        dx = torch.empty_like(x)
        call("rms_norm_backward", x, weight, inverse_rms, dy, dx, x.numel() // width, width)
        dweight = None
        if ctx.needs_input_grad[1]:
            normed = x.view(-1, width).float() * inverse_rms[:, None]
            dweight = (dy.view(-1, width).float() * normed).sum(0)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] scaled to unit root mean square, times weight [H] in fp32, rounded once."""
    if usable(x):
        return _RmsNorm.apply(x, weight.float(), eps)
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


# ---------------------------------------------------------------- rotary embedding


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradients[0], cosine, sine, -1.0), None, None


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    call("rotate", x, cosine, sine, y, x.shape[0], x.shape[1], x.shape[2] // 2, direction)
    return y


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by cosine and sine [T, D/2] in fp32 (fp64 for fp64 x)."""
    if usable(x):
        return _Rotate.apply(x, cosine, sine)
    a, b = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


# ---------------------------------------------------------------- a factor for each column


def scale_columns(y_NO: Tensor, gain_O: Tensor) -> Tensor:
    """gain * y, in place where there is a kernel; `gain_O` in fp32 (fp64 for fp64 y). No autograd of its own."""
    if not usable(y_NO):
        return (y_NO * gain_O).to(y_NO.dtype)
    call("scale_columns", y_NO, gain_O, *y_NO.shape)
    return y_NO


def scale_columns_backward(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = gain * x: dx, and the sum over rows of dy * y [O], which is gain times the gradient of `gain`."""
    if not usable(dy_NO, y_NO):
        return (dy_NO * gain_O).to(dy_NO.dtype), (dy_NO.to(gain_O.dtype) * y_NO).sum(0)
    parts = torch.get_num_threads()
    dy_NO, dx_NO, sums = dy_NO.contiguous(), torch.empty_like(y_NO), torch.empty(parts, y_NO.shape[1])
    call("scale_columns_backward", dy_NO, y_NO, gain_O, dx_NO, sums, *y_NO.shape, parts)
    return dx_NO, sums.sum(0)


# ---------------------------------------------------------------- gated activation


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu-tanh(gate) * up. No autograd of its own on the kernel path: see layers.GatedMlp."""
    if not usable(gate, up):
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    y = torch.empty_like(gate)
    call("gated", gate, up, y, gate.numel(), int(gelu))
    return y


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """d gate, d up and the forward product again, from the gradient of that product."""
    if not usable(gate, up, dy):
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = gated(*leaves, gelu)
        dgate, dup = torch.autograd.grad(y, leaves, dy)
        return dgate, dup, y.detach()
    dgate, dup, y = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    call("gated_backward", gate, up, dy.contiguous(), dgate, dup, y, gate.numel(), int(gelu))
    return dgate, dup, y


# ---------------------------------------------------------------- softmax cross-entropy


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """Losses [S] (unweighted) and the gradient of sum(weights * losses) with respect to the raw logits [S, V].

    A raw logit z stands for cap * tanh(scale * z / cap), or scale * z when cap is 0. The kernel overwrites `logits`.
    """
    if usable(logits):
        losses = torch.empty(logits.shape[0])
        rows, vocab = logits.shape
        if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise IndexError(f"a target is outside the vocabulary of {vocab} tokens")  # C would write there
        call("cross_entropy", logits, targets, weights, losses, rows, vocab, float(scale), float(cap))
        return losses, logits
    wide = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    slope = torch.full_like(wide, scale)
    if cap:
        squashed = torch.tanh(wide / cap)
        wide, slope = cap * squashed, scale * (1 - squashed**2)
    log_probabilities = torch.log_softmax(wide, dim=-1)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    gradient = log_probabilities.exp()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, (gradient * weights[:, None].to(wide.dtype) * slope).to(logits.dtype)


def divergence(base: Tensor, tuned: Tensor, targets: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """From raw logits [S, V] as above: losses of `tuned` [S], KL(base || tuned) [S] in nats, and 1 where both have the
    same likeliest token [S]. Rounding may leave a KL a trace below 0."""
    if usable(base, tuned):
        rows, vocab = base.shape
        losses, kl, same = torch.empty(3, rows)
        if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise IndexError(f"a target is outside the vocabulary of {vocab} tokens")
        call("divergence", base, tuned, targets, losses, kl, same, rows, vocab, float(scale), float(cap))
        return losses, kl, same
    p, q = ((z if z.dtype == torch.float64 else z.float()) * scale for z in (base, tuned))
    if cap:
        p, q = cap * torch.tanh(p / cap), cap * torch.tanh(q / cap)
    same = base.argmax(-1) == tuned.argmax(-1)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return -q.gather(1, targets[:, None])[:, 0], (p.exp() * p.sub_(q)).sum(-1), same.to(p.dtype)
