"""Show rows as the model sees them: every token, and whether it is trained.

    PreparedRow (the documents of a row) -> texts for the terminal

Trained runs are green and enclosed in ⟦ and ⟧, so they are visible without color too; ⟦×0.5 shows a
weight other than 1. A control token has ◆ before it; text that only looks like one does not. White
space that is a separate token is made visible, and characters that would control the terminal or
hide in the text are escaped. A character of several tokens is shown once, with all its ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.text import Text

from tunesmith.core.formatting import escape_controls
from tunesmith.core.types import Document, WeightedText
from tunesmith.data.truncation import PreparedRow

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import Renderer

TRAINED_STYLE = "bold green"
PLAIN_STYLE = "dim"
CONTROL_STYLE = " reverse"
IDS_STYLE = "cyan"
SIDE_LABELS = {
    "chosen": "trained (chosen)",
    "rejected": "trained (rejected)",
    "banned": "trained away from",
    "desirable": "trained (desirable)",
    "undesirable": "trained (undesirable)",
}
MAX_CHAR_TOKENS = 6  # of one character
VISIBLE_SIGNS = {"\n": "⏎\n", "\t": "⇥"}


class TokenPiece(NamedTuple):
    """The shortest run of tokens that decodes to complete characters."""

    text: str
    ids: tuple[int, ...]
    weight: float
    is_control: bool


def render_preview(
    prepared: PreparedRow, renderer: Renderer, *, should_show_ids: bool = False
) -> Iterator[Text]:
    """Yield a header and the tokens of each document of a row, or why it has none."""
    row_id = (escape_controls(prepared.id, keep=""), "bold")
    if prepared.drop_reason:
        yield Text.assemble(row_id, f"  dropped: {escape_controls(prepared.drop_reason)}")
    num_documents = len(prepared.documents)
    for number, document in enumerate(prepared.documents, 1):
        label = f"  document {number} of {num_documents}" if num_documents > 1 else ""
        num_supervised = int(np.count_nonzero(document.weights_L))
        side_label = SIDE_LABELS.get(document.side, "trained")
        header = f"{label}  {len(document)} tokens, {num_supervised} {side_label}"
        yield Text.assemble(row_id, header)
        yield _render_tokens(document, renderer, should_show_ids)
    for note in prepared.notes:
        yield Text.assemble(("note: ", "yellow"), escape_invisible(note))


def _render_tokens(document: Document, renderer: Renderer, should_show_ids: bool) -> Text:
    text = Text()
    for weight, run in groupby(iter_pieces(document, renderer), key=lambda piece: piece.weight):
        style = TRAINED_STYLE if weight else PLAIN_STYLE
        if weight:
            text.append("⟦" if weight == 1 else f"⟦×{weight:g} ", style)
        for piece in run:
            visible_text = escape_invisible(piece.text)
            line_end = "\n" if visible_text.endswith("\n") else ""
            if piece.is_control:
                text.append(f"◆{visible_text}", style + CONTROL_STYLE)
            else:
                text.append(visible_text.removesuffix("\n"), style)
            if should_show_ids:
                text.append(f"‹{' '.join(map(str, piece.ids))}›", IDS_STYLE)
            text.append(line_end)
        if weight:
            text.append("⟧", style)
    text.rstrip()
    return text


def split_by_weight(document: Document, renderer: Renderer, limit: int) -> list[WeightedText]:
    """Return the text of the first `limit` tokens, a part for each run of equal weights."""
    beginning = replace(
        document, tokens_L=document.tokens_L[:limit], weights_L=document.weights_L[:limit]
    )
    parts: list[WeightedText] = []
    for weight, run in groupby(iter_pieces(beginning, renderer), key=lambda piece: piece.weight):
        parts.append(WeightedText("".join(piece.text for piece in run), weight))
    return parts


def iter_pieces(document: Document, renderer: Renderer) -> Iterator[TokenPiece]:
    """Split a document into pieces.

    Each is decoded after its left neighbor, since some tokenizers drop a leading space."""
    tokens = document.tokens_L.tolist()
    weights = document.weights_L.tolist()
    begin = 0
    for end in range(1, len(tokens) + 1):
        previous = tokens[max(0, begin - 1) : begin]
        ids = tokens[begin:end]
        text = renderer.decode([*previous, *ids])[len(renderer.decode(previous)) :]
        # The replacement character: the next token may complete it.
        is_incomplete = text.endswith("\ufffd") and len(ids) < MAX_CHAR_TOKENS
        if is_incomplete and end < len(tokens) and weights[end] == weights[begin]:
            continue
        is_control = tokens[begin] in renderer.control_ids
        yield TokenPiece(text, tuple(ids), weights[begin], is_control)
        begin = end


def escape_invisible(text: str) -> str:
    """Show line breaks, tabs and lone spaces as signs, and escape invisible characters."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character in VISIBLE_SIGNS:
        return VISIBLE_SIGNS[character]
    return escape_controls(character, keep="")
