"""Running out of memory, as a MachineError.

    with memory_errors():     errors of torch and Python become OutOfMemory

Code that can use less memory catches it and tries again; otherwise it ends the run with a message.
On a CPU the system usually kills the process instead, so a plan that does not fit is refused before
the run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunesmith.core.errors import MachineError

# of plain RuntimeErrors: torch's CPU allocator, cuBLAS, the CUDA driver, NCCL
MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
)


class OutOfMemory(MachineError):
    """Out of memory. During the `except` block the traceback still holds the tensors: try again
    after it."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn out-of-memory errors inside the block into OutOfMemory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        has_words = any(words in str(error) for words in MEMORY_WORDS)
        if not (has_words or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        detail = str(error).strip().partition("\n")[0]
        message = f"out of memory: {detail}" if detail else "out of memory"
        fix = "lower max_length, pack_length or lora_r, or free memory used by other programs"
        raise OutOfMemory(message, fix=fix) from error
