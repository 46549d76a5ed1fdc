"""Rows as the model will see them: every token, and whether it is trained.

    Prepared (the documents of a row) -> texts for the terminal

Trained runs stand between ⟦ and ⟧ and in green, so they are told apart without colour too; ⟦×0.5 says a weight other
than 1. A control token has ◆ before it; text that only looks like one has not. White space that makes a token of its
own is made visible, and characters that would steer the terminal or hide in the text are spelled out. A character that
takes several tokens is shown once, with all its ids.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.text import Text

from tunesmith.core.types import Document
from tunesmith.data.truncation import Prepared

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import Renderer

TRAINED, PLAIN, CONTROL, IDS = "bold green", "dim", " reverse", "cyan"
SIDES = {
    "chosen": "trained, the answer to prefer",
    "rejected": "trained, the answer to prefer it to",
    "banned": "trained away from",
}
MOST_TOKENS = 6  # of one character


class Piece(NamedTuple):
    """The least run of tokens that makes whole characters."""

    text: str
    ids: tuple[int, ...]
    weight: float
    control: bool


def coloured(prepared: Prepared, renderer: Renderer, *, ids: bool = False) -> Iterator[Text]:
    """A header and the tokens of each document of a row; one line with the reason if nothing is left of it."""
    if prepared.dropped:
        yield Text.assemble((prepared.id, "bold"), f"  dropped: {prepared.dropped}")
    for number, document in enumerate(prepared.documents, 1):
        which = f"  document {number} of {len(prepared.documents)}" if len(prepared.documents) > 1 else ""
        trained, side = int(np.count_nonzero(document.weights_L)), SIDES.get(document.side, "trained")
        yield Text.assemble((prepared.id, "bold"), f"{which}  {len(document)} tokens, {trained} {side}")
        yield _tokens(document, renderer, ids)
    for note in prepared.notes:
        yield Text.assemble(("note: ", "yellow"), visible(note))


def _tokens(document: Document, renderer: Renderer, ids: bool) -> Text:
    text = Text()
    for weight, run in groupby(pieces(document, renderer), key=lambda piece: piece.weight):
        style = TRAINED if weight else PLAIN
        if weight:
            text.append("⟦" if weight == 1 else f"⟦×{weight:g} ", style)
        for piece in run:
            shown = visible(piece.text)
            line_end = "\n" if shown.endswith("\n") else ""
            text.append(f"◆{shown}" if piece.control else shown.removesuffix("\n"), style + CONTROL * piece.control)
            if ids:
                text.append(f"‹{' '.join(map(str, piece.ids))}›", IDS)
            text.append(line_end)
        if weight:
            text.append("⟧", style)
    text.rstrip()
    return text


def pieces(document: Document, renderer: Renderer) -> Iterator[Piece]:
    """Cut a document into pieces, each decoded behind its left neighbour: some tokenizers eat a first space."""
    tokens, weights = document.tokens_L.tolist(), document.weights_L.tolist()
    begin = 0
    for end in range(1, len(tokens) + 1):
        before = tokens[max(0, begin - 1) : begin]
        text = renderer.decode([*before, *tokens[begin:end]])[len(renderer.decode(before)) :]
        unfinished = text.endswith("\ufffd") and end - begin < MOST_TOKENS and end < len(tokens)
        if unfinished and weights[end] == weights[begin]:
            continue
        yield Piece(text, tuple(tokens[begin:end]), weights[begin], tokens[begin] in renderer.control_ids)
        begin = end


def visible(text: str) -> str:
    """Line ends, tabs and lone spaces as signs; steering and invisible characters by their number."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"\\u{{{ord(character):x}}}" if hidden else character


SIGNS = {"\n": "⏎\n", "\t": "⇥"}
