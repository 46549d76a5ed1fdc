"""How much this process keeps of memory that it does not use any more.

    keep_little()      before the first product of the process

Packs differ in size, and two habits make the heap grow with every new one, by half of what a step needs and more. glibc
takes blocks of up to 32 MB from the heap once some were freed, and what lies between them keeps their room from being
joined again. oneDNN makes machine code for the products of each size and keeps the last 1,024 of them, all over that
heap; a size hardly ever comes back. So large blocks are mapped, which gives them back, and few products are kept. What
was measured: docs/plan.md. Left out: other C libraries, where nothing is changed; memory of a GPU.
"""

from __future__ import annotations

import ctypes
import os
import platform

LARGE_BLOCK = 2**18  # mapped: what a layer saves of a pack, not what it makes for a token of each answer
SPARE = 2**26  # at the end of the heap, kept for the next small blocks
KEPT_PRODUCTS = "64"  # a pack of one size needs about 16, forward and backward
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_little() -> None:
    """For the whole process. A setting of the user's own stays."""
    os.environ.setdefault(CAPACITY, KEPT_PRODUCTS)  # read by oneDNN when it makes its first product
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, SPARE)
