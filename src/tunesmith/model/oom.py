"""Memory that runs out, as an error of ours.

    with memory_errors():     torch's and Python's own errors become OutOfMemory, which is a MachineError

Who can do with less catches it and tries again; for everyone else it ends the run with a message.
On a CPU the system mostly ends the process instead, which is why a plan is refused before it starts
when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunesmith.core.errors import MachineError

CPU_ALLOCATOR = "DefaultCPUAllocator"  # its error is a plain RuntimeError


class OutOfMemory(MachineError):
    """While the exception is handled its traceback still holds the tensors: try again after the
    `except` block."""


@contextmanager
def memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _to_out_of_memory(error) from error
    except RuntimeError as error:
        if CPU_ALLOCATOR not in str(error):
            raise
        raise _to_out_of_memory(error) from error


def _to_out_of_memory(error: BaseException) -> OutOfMemory:
    message = str(error).strip().partition("\n")[0]
    fix = "lower max_length, pack_length or lora_r, or free memory that other programs hold"
    return OutOfMemory(f"out of memory{': ' if message else ''}{message}", fix=fix)
