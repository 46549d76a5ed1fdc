"""Long texts as windows: even stretches of tokens, each of which begins with the last token of the
one before.

So every token but the first of a text is a target in exactly one window. The functions count
targets, of which a window has one fewer than tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.core.types import Document


def count_windows(tokens_N: Any, max_targets: int) -> Any:
    """How many windows of at most so many targets texts of so many tokens have. An array, or a
    number."""
    return np.maximum(1, np.ceil((tokens_N - 1) / max_targets)).astype(np.int64)


def find_window(num_tokens: int, max_targets: int, index: int) -> tuple[int, int]:
    """Where window `number` of a text of so many tokens begins and ends."""
    size = -(-(num_tokens - 1) // int(count_windows(num_tokens, max_targets)))
    return index * size, min(num_tokens, (index + 1) * size + 1)


def cut_window(document: Document, max_targets: int, index: int) -> Document:
    """A window of a document, which stays as it is."""
    begin, end = find_window(len(document), max_targets, index)
    weights_L = document.weights_L[begin:end].copy()
    weights_L[0] = 0
    return replace(document, tokens_L=document.tokens_L[begin:end], weights_L=weights_L)
