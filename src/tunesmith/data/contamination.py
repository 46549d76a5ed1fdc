"""Rehearsal rows that are held out elsewhere: with them a score would show memory, so the run is refused.

Rows are compared by their digests, white space evened out, all of them. Left out: what training rows share with
held-out ones, which the data check reports (audit.py), and texts of which only a part is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tunesmith.data.dataset import Dataset
from tunesmith.errors import InputError

SHOWN = 5


def refuse_overlap(rehearsal: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """`held_out`: role -> rows that are measured. Raises InputError that names the rows of both sides."""
    for role, rows in held_out.items():
        same_N = np.flatnonzero(np.isin(rehearsal.contents_N, rows.contents_N))
        if not len(same_N):
            continue
        of = {int(content): index for index, content in enumerate(rows.contents_N.tolist())}
        pairs = [f"{rehearsal.id(i)} is {rows.id(of[int(rehearsal.contents_N[i])])}" for i in same_N[:SHOWN].tolist()]
        more = f", and {len(same_N) - SHOWN:,} more" if len(same_N) > SHOWN else ""
        raise InputError(
            f"{len(same_N):,} of {len(rehearsal):,} rows are also in {role}: {', '.join(pairs)}{more}",
            where=f"rehearsal: {rehearsal.path}",
            fix=f"take them out of the rehearsal file: what is trained cannot be measured in {role}",
        )
