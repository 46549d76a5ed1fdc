"""What is left of the documents of a row under the over-long policy.

documents, max_length, overlong -> Prepared
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.data.readers.invalid_row import InvalidRow

OverlongPolicy = Literal["drop", "truncate", "refuse"]


@dataclass(frozen=True)
class PreparedRow:
    """What a row became, and what was lost on the way."""

    id: str
    documents: tuple[Document, ...]  # empty if the row is dropped; it keeps its slot
    drop_reason: str = ""  # why no document is left
    num_overlong: int = 0  # documents longer than max_length: dropped or truncated
    num_truncated: int = 0
    is_answer_too_long: bool = False  # one document's trained tokens alone do not fit
    notes: tuple[str, ...] = ()  # what the render had to say
    problem: InvalidRow | None = None  # why it cannot be rendered


def scale_weights(documents: Sequence[Document], weight: float) -> Sequence[Document]:
    """Documents whose targets all weigh `weight` times as much."""
    if weight == 1:
        return documents
    return [
        replace(document, weights_L=document.weights_L * np.float32(weight))
        for document in documents
    ]


def apply_max_length(
    row_id: str, documents: Sequence[Document], max_length: int | None, overlong: OverlongPolicy
) -> PreparedRow:
    """Apply the over-long policy: `drop` the document, `truncate` it (the front stays), or `refuse`
    with InputError.

    A document without a trained token is never kept.
    """
    fitted: list[Document] = []
    num_overlong = num_truncated = 0
    is_answer_too_long = False
    reason = "nothing is trained"
    for document in documents:
        if max_length is not None and len(document) > max_length:
            if overlong == "refuse":
                message = f"the row has {len(document)} tokens, max_length is {max_length}"
                raise InputError(
                    message,
                    where=row_id,
                    fix="raise max_length, or set overlong to drop or truncate",
                )
            num_overlong += 1
            is_answer_too_long |= bool(np.count_nonzero(document.weights_L) > max_length)
            reason = "longer than max_length"
            if overlong == "drop":
                continue
            reason = "nothing trained is left after truncation"
            front_L = slice(max_length)
            document = replace(
                document, tokens_L=document.tokens_L[front_L], weights_L=document.weights_L[front_L]
            )
            num_truncated += bool(document.weights_L.any())
        if document.weights_L.any():
            fitted.append(document)
    return PreparedRow(
        row_id,
        tuple(fitted),
        "" if fitted else reason,
        num_overlong,
        num_truncated,
        is_answer_too_long,
    )
