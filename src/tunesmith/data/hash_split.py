"""Divide rows by a hash of their content: the same row always falls on the same side, in any file
and any order.

Equal rows, also those that differ only in white space, cannot be torn apart, so a split makes no
leak."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import ConstraintCounts
from tunesmith.data.dataset import Dataset
from tunesmith.data.readers.invalid_row import RejectedRows


def is_in_split(content: str | int, fraction: float, seed: int = 0) -> bool:
    """True for about `fraction` of all contents; a pure function of its arguments. `content`: text,
    or its digest."""
    digest = hashlib.blake2b(f"{seed}\0{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_by_hash(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(the rest, about `fraction` of the rows), in the order of the file. Raises InputError if a
    side is empty."""
    if not 0 < fraction < 1:
        raise InputError(
            f"a split of {fraction} leaves one side empty", fix="give a fraction between 0 and 1"
        )
    held_out_N = np.array(
        [is_in_split(int(content), fraction, seed) for content in dataset.contents_N], dtype=bool
    )
    if held_out_N.all() or not held_out_N.any():
        message = f"a split of {fraction} leaves one side of {len(dataset)} rows empty"
        raise InputError(
            message, where=dataset.path, fix="give a file of its own, or more (different) rows"
        )
    # What is not used stays with the rest.
    held_out = dataclasses.replace(
        dataset.select_rows(np.flatnonzero(held_out_N)),
        rejected_rows=RejectedRows(),
        violations=RejectedRows(),
        constraint_counts=ConstraintCounts(),
    )
    return dataset.select_rows(np.flatnonzero(~held_out_N)), held_out
