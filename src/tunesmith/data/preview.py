"""Rows as the model will see them: every token, and whether it is trained.

    Prepared (the documents of a row) -> texts for the terminal

Trained runs stand between ⟦ and ⟧ and in green, so they are told apart without colour too; ⟦×0.5
says a weight other than 1. A control token has ◆ before it; text that only looks like one has not.
White space that makes a token of its own is made visible, and characters that would steer the
terminal or hide in the text are spelled out. A character that takes several tokens is shown once,
with all its ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.text import Text

from tunesmith.core.types import Document
from tunesmith.data.truncation import PreparedRow

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import Renderer

TRAINED_STYLE, PLAIN_STYLE, CONTROL_STYLE, IDS_STYLE = "bold green", "dim", " reverse", "cyan"
SIDE_LABELS = {
    "chosen": "trained, the answer to prefer",
    "rejected": "trained, the answer to prefer it to",
    "banned": "trained away from",
}
MAX_CHAR_TOKENS = 6  # of one character


class TokenPiece(NamedTuple):
    """The least run of tokens that makes whole characters."""

    text: str
    ids: tuple[int, ...]
    weight: float
    is_control: bool


def render_preview(
    prepared: PreparedRow, renderer: Renderer, *, should_show_ids: bool = False
) -> Iterator[Text]:
    """A header and the tokens of each document of a row; one line with the reason if nothing is
    left of it."""
    if prepared.drop_reason:
        yield Text.assemble((prepared.id, "bold"), f"  dropped: {prepared.drop_reason}")
    for number, document in enumerate(prepared.documents, 1):
        document_label = (
            f"  document {number} of {len(prepared.documents)}"
            if len(prepared.documents) > 1
            else ""
        )
        num_supervised, side_label = (
            int(np.count_nonzero(document.weights_L)),
            SIDE_LABELS.get(document.side, "trained"),
        )
        yield Text.assemble(
            (prepared.id, "bold"),
            f"{document_label}  {len(document)} tokens, {num_supervised} {side_label}",
        )
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
            text.append(
                f"◆{visible_text}" if piece.is_control else visible_text.removesuffix("\n"),
                style + CONTROL_STYLE * piece.is_control,
            )
            if should_show_ids:
                text.append(f"‹{' '.join(map(str, piece.ids))}›", IDS_STYLE)
            text.append(line_end)
        if weight:
            text.append("⟧", style)
    text.rstrip()
    return text


def iter_pieces(document: Document, renderer: Renderer) -> Iterator[TokenPiece]:
    """Cut a document into pieces, each decoded behind its left neighbour: some tokenizers eat a
    first space."""
    tokens, weights = document.tokens_L.tolist(), document.weights_L.tolist()
    begin = 0
    for end in range(1, len(tokens) + 1):
        previous = tokens[max(0, begin - 1) : begin]
        text = renderer.decode([*previous, *tokens[begin:end]])[len(renderer.decode(previous)) :]
        is_unfinished = (
            text.endswith("\ufffd") and end - begin < MAX_CHAR_TOKENS and end < len(tokens)
        )
        if is_unfinished and weights[end] == weights[begin]:
            continue
        yield TokenPiece(
            text, tuple(tokens[begin:end]), weights[begin], tokens[begin] in renderer.control_ids
        )
        begin = end


def escape_invisible(text: str) -> str:
    """Line ends, tabs and lone spaces as signs; steering and invisible characters by their
    number."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character in VISIBLE_SIGNS:
        return VISIBLE_SIGNS[character]
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"\\u{{{ord(character):x}}}" if is_hidden else character


VISIBLE_SIGNS = {"\n": "⏎\n", "\t": "⇥"}
