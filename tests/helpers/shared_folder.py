"""A folder that the workers of a test run share, for what one of them computes for all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


@contextmanager
def lock_shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Hold the folder for one worker at a time; yield it, and whether it is new."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        done = folder / "done"
        yield folder, not done.exists()
        done.touch()  # not reached if the first worker failed
