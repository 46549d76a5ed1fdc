"""What is free again goes back to the system, whatever small things were made in between."""

import os
import platform
import subprocess
import sys

import pytest

from tunesmith.model.heap import CAPACITY, KEPT_PRODUCTS, keep_little

PACKS = """
import sys, torch
from pathlib import Path
if sys.argv[1] == "ours":
    from tunesmith.model.heap import keep_little
    keep_little()
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, between = held(), []
for size in range(20):
    blocks = []
    for _ in range(20):
        blocks.append(torch.ones(700_000 - 20_000 * size))
        between.append(torch.ones(2_000))
    del blocks
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_blocks_of_ever_new_sizes_leave_nothing_behind() -> None:
    def left(whose: str) -> int:
        told = subprocess.run([sys.executable, "-c", PACKS, whose], capture_output=True, text=True, check=True)
        return int(told.stdout)

    small = 20 * 20 * 2_000 * 4
    assert left("ours") < 4 * small < left("theirs")


def test_few_products_are_kept_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAPACITY, raising=False)
    keep_little()
    assert os.environ[CAPACITY] == KEPT_PRODUCTS
    monkeypatch.setenv(CAPACITY, "500")
    keep_little()
    assert os.environ[CAPACITY] == "500"
