"""Apply the over-long policy to the documents of a row.

    documents, max_length, on_overlong -> apply_max_length -> PreparedRow

A document that loses all its supervised tokens is dropped."""

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
    """The documents of a row, and what was lost in rendering and truncation."""

    id: str
    documents: tuple[Document, ...]  # empty if the row is dropped; it keeps its slot
    drop_reason: str = ""  # set if there are no documents
    num_overlong: int = 0  # documents longer than max_length, dropped or truncated
    num_truncated: int = 0
    is_answer_too_long: bool = False  # the supervised tokens of a document alone do not fit
    notes: tuple[str, ...] = ()  # remarks of the renderer
    problem: InvalidRow | None = None  # set if the row cannot be rendered


def scale_weights(documents: Sequence[Document], weight: float) -> Sequence[Document]:
    """Multiply all target weights by `weight`."""
    if weight == 1:
        return documents
    factor = np.float32(weight)
    return [replace(document, weights_L=document.weights_L * factor) for document in documents]


def apply_max_length(
    row_id: str, documents: Sequence[Document], max_length: int | None, on_overlong: OverlongPolicy
) -> PreparedRow:
    """Drop or truncate (at the end) documents over `max_length` tokens.

    Documents without a supervised token are dropped. Raises InputError under `refuse`."""
    fitted: list[Document] = []
    num_overlong = 0
    num_truncated = 0
    is_answer_too_long = False
    drop_reason = "no supervised token"
    for document in documents:
        if max_length is not None and len(document) > max_length:
            if on_overlong == "refuse":
                message = f"the row has {len(document)} tokens, but max_length is {max_length}"
                fix = "raise max_length, or set on_overlong to drop or truncate"
                raise InputError(message, where=row_id, fix=fix)
            num_overlong += 1
            is_answer_too_long |= bool(np.count_nonzero(document.weights_L) > max_length)
            if on_overlong == "drop":
                drop_reason = "longer than max_length"
                continue
            drop_reason = "no supervised token after truncation"
            document = replace(
                document,
                tokens_L=document.tokens_L[:max_length],
                weights_L=document.weights_L[:max_length],
            )
            num_truncated += bool(document.weights_L.any())
        if document.weights_L.any():
            fitted.append(document)
    return PreparedRow(
        id=row_id,
        documents=tuple(fitted),
        drop_reason="" if fitted else drop_reason,
        num_overlong=num_overlong,
        num_truncated=num_truncated,
        is_answer_too_long=is_answer_too_long,
    )
