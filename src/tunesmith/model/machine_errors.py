"""Errors of memory and of the GPU, as MachineErrors.

    with machine_errors():     errors of torch, CUDA and Triton become MachineErrors

Out of memory is OutOfMemory: code that can use less memory catches it and tries again; otherwise it
ends the run with a message. On a CPU the system usually kills the process instead, so a plan that
does not fit is refused before the run starts. After any other error of a GPU its process cannot use
it any more, so a run goes on in a new process, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tunesmith.core.errors import MachineError

# of plain RuntimeErrors: torch's CPU allocator, cuBLAS, the CUDA driver, Triton, NCCL
MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
)


@dataclass(frozen=True)
class GpuFault:
    """A kind of error of a GPU: words of its message, what happened, what to do."""

    words: tuple[str, ...]
    meaning: str
    fix: str


# the first with words in the message; the last takes every other message of a GPU
GPU_FAULTS = (
    GpuFault(
        ("no kernel image is available",),
        "the installed torch has no code for this GPU",
        "install a build of torch for its compute capability, which `tunesmith doctor` shows",
    ),
    GpuFault(
        (
            "driver version is insufficient",
            "driver on your system is too old",
            "unsupported toolchain",
            "device kernel image is invalid",
            "unsupported display driver",
            "forward compatibility was attempted",
        ),
        "the driver of the GPU is too old for the installed torch",
        "install a newer driver, or torch for an older CUDA",
    ),
    GpuFault(
        ("busy or unavailable",),
        "another process has the GPU for itself",
        "end it (`nvidia-smi` names it), or choose another GPU with CUDA_VISIBLE_DEVICES",
    ),
    GpuFault(
        ("CUBLAS_STATUS_NOT_INITIALIZED",),
        "cuBLAS could not start, usually for lack of memory",
        "end other processes on the GPU (`nvidia-smi` names them), or lower pack_length",
    ),
    GpuFault(
        ("no NVIDIA driver", "no CUDA-capable device", "No CUDA GPUs", "0 active drivers"),
        "torch finds no GPU",
        "look at `nvidia-smi`; a container must be given the GPU",
    ),
    GpuFault(
        (
            "does not have a deterministic implementation",
            "not deterministic because it uses CuBLAS",
        ),
        "an operation has no deterministic algorithm on this GPU",
        "set deterministic: false; a resumed run then differs in the last bits",
    ),
    GpuFault(
        ("ECC error", "hardware stack error", "launch timed out", "CUDA error: unknown error"),
        "the GPU or its driver failed",
        "look at `nvidia-smi` and the log of the system, and start the GPU again",
    ),
    GpuFault(
        ("bitsandbytes native library", "SETUP ERROR", "CPU-only version of bitsandbytes"),
        "bitsandbytes has no library for the CUDA of the installed torch",
        "look at `python -m bitsandbytes` and install another version, or use method: lora and "
        "optim: adamw",
    ),
    GpuFault(  # of an earlier kernel, whichever call reports it
        ("illegal memory access", "misaligned address", "device-side assert"),
        "a kernel failed on the GPU",
        "try again; if it fails again, report the lines of a run with CUDA_LAUNCH_BLOCKING=1",
    ),
    GpuFault(
        ("CUDA driver error",),  # of torch's allocator
        "the driver refused a call, mostly for memory that grows",
        "set PYTORCH_ALLOC_CONF=expandable_segments:False (before torch 2.9: "
        "PYTORCH_CUDA_ALLOC_CONF), or install a newer driver",
    ),
    GpuFault(
        ("CUDA error", "Triton Error", "CUBLAS_STATUS", "HIP error"),
        "a kernel failed on the GPU",
        "try again; if it fails again, report the lines of a run with CUDA_LAUNCH_BLOCKING=1",
    ),
)


class OutOfMemory(MachineError):
    """Out of memory. During the `except` block the traceback still holds the tensors: try again
    after it."""


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turn errors of memory and of the GPU inside the block into MachineErrors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        explained = explain_error(error)
        if explained is None:
            raise
        raise explained from error


def explain_error(error: MemoryError | RuntimeError) -> MachineError | None:
    """Return an error of memory or of the GPU as a MachineError, None for any other."""
    text = str(error).strip()
    first_line = text.partition("\n")[0]
    has_words = any(words in text for words in MEMORY_WORDS)
    if has_words or isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = f"out of memory: {first_line}" if first_line else "out of memory"
        fix = "lower max_length, pack_length or lora_r, or free memory used by other programs"
        return OutOfMemory(message, fix=fix)
    for fault in GPU_FAULTS:
        if any(words in text for words in fault.words):
            return MachineError(f"{fault.meaning}: {first_line}", fix=fault.fix)
    return None
