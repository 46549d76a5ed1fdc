"""How much this process keeps of memory that it does not use any more.

    keep_little()      before the first product of the process

oneDNN makes machine code for the products of each size and keeps the last 1,024 of them, all over
the heap, where what lies between them keeps their room from being joined again. Packs differ in
size, and a size hardly ever comes back: few products are kept. Large blocks are not mapped one by
one: that took 6% off the peak and made steps a quarter slower (docs/log.md)."""

from __future__ import annotations

import os

MAX_PRIMITIVES = "64"  # a pack of one size needs about 16, forward and backward
CAPACITY_ENV = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def limit_onednn_cache() -> None:
    """For the whole process. A setting of the user's own stays."""
    os.environ.setdefault(
        CAPACITY_ENV, MAX_PRIMITIVES
    )  # read by oneDNN when it makes its first product
