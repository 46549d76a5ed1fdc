"""Which rows are at fault: those whose loss stands out, and by as much as matters."""

import math

import numpy as np
import pytest

from tunesmith.core.types import Document
from tunesmith.train.guard.guarded_loop import find_outliers

LEARNT = [0.01, 0.02, 0.03, 0.02, 0.01, 0.02, 0.03, 0.02]


def make_documents(count: int) -> list[Document]:
    some = np.zeros(3, dtype=np.int32)
    return [
        Document(f"rows.jsonl:{row}", some, some.astype(np.float32)) for row in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("losses", "rows"),
    [
        ([*LEARNT, 4.5, 5.0], ("rows.jsonl:9", "rows.jsonl:10")),
        (
            [*LEARNT, 0.141, 0.197, 0.221, 6.168],
            ("rows.jsonl:12",),
        ),  # of a real run: three are hard, and right
        ([*LEARNT, 1.2, 1.2, 13.0], ("rows.jsonl:9", "rows.jsonl:10", "rows.jsonl:11")),
        ([*LEARNT, 1.2, math.inf], ("rows.jsonl:9", "rows.jsonl:10")),
        ([*LEARNT, 0.04], ()),  # within the noise
        ([*LEARNT[:2], 4.0, 4.5], ()),  # too many to be an exception
        ([], ()),
    ],
    ids=[
        "two",
        "one, and three that are hard",
        "one far worse",
        "one of no number",
        "none",
        "half",
        "no rows",
    ],
)
def test_rows_that_stand_out(losses: list[float], rows: tuple[str, ...]) -> None:
    assert find_outliers(make_documents(len(losses)), losses) == rows
