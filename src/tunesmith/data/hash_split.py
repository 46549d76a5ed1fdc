"""Divide rows by a hash of their content: the same row always falls on the same side, in any file and any order.

Equal rows, also those that differ only in white space, cannot be torn apart, so a split makes no leak.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import Tally
from tunesmith.data.dataset import Dataset
from tunesmith.data.readers.invalid_row import Rejects


def hash_split(content: str | int, fraction: float, seed: int = 0) -> bool:
    """True for about `fraction` of all contents; a pure function of its arguments. `content`: text, or its digest."""
    digest = hashlib.blake2b(f"{seed}\0{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(the rest, about `fraction` of the rows), in the order of the file. Raises InputError if a side is empty."""
    if not 0 < fraction < 1:
        raise InputError(f"a split of {fraction} leaves one side empty", fix="give a fraction between 0 and 1")
    taken_N = np.array([hash_split(int(content), fraction, seed) for content in dataset.contents_N], dtype=bool)
    if taken_N.all() or not taken_N.any():
        what = f"a split of {fraction} leaves one side of {len(dataset)} rows empty"
        raise InputError(what, where=dataset.path, fix="give a file of its own, or more (different) rows")
    # What is not used stays with the rest.
    taken = dataclasses.replace(
        dataset.take(np.flatnonzero(taken_N)), rejects=Rejects(), violations=Rejects(), tally=Tally()
    )
    return dataset.take(np.flatnonzero(~taken_N)), taken
