"""Steps of a tokenizer.json over which the tokenizers library panics.

    find_step_problem(step) -> what is wrong, or ""
    find_post_processor_problem(component) -> the same

A panic is caught (`TokenizerErrors`), but Rust has written its own lines to the terminal by then,
and some come only in the middle of a text. Left out: what the library refuses by an error; the
tables of SentencePiece (`charsmap.py`).
"""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Json


def find_step_problem(step: Json) -> str:
    """Return what is wrong with a step of a normalizer, pre-tokenizer or decoder."""
    kind = step.get("type")
    if kind == "FixedLength" and step.get("length") == 0:
        return "cuts a text into pieces of no characters"
    if kind == "Prepend" and step.get("prepend") == "":
        return "prepends nothing"
    if kind == "Replace" and step.get("pattern") == {"String": ""}:
        return "replaces an empty text"
    # "stop" is of the decoder: it panics over a piece that is shorter
    if kind == "Strip" and step.get("stop", 0) != 0:
        return "removes characters from the end of decoded pieces"
    return ""


def find_post_processor_problem(component: Any) -> str:
    """Return what is wrong with a post-processor, for the single texts that are encoded here."""
    processors = _list_processors(component)
    # the library does not implement the second one
    if sum(step.get("type") == "TemplateProcessing" for step in processors) > 1:
        return "has one TemplateProcessing after another"
    for step in processors:
        pieces = step.get("single") if step.get("type") == "TemplateProcessing" else None
        names = step.get("special_tokens")
        for piece in pieces if isinstance(pieces, list) else []:
            if _get_id(piece, "Sequence") not in ("", "A"):
                return "has a second text where there is one"
            token = _get_id(piece, "SpecialToken")
            if token and isinstance(names, dict) and token not in names:
                return f"has a token that its special_tokens lack: {token!r:.40}"
    return ""


def _list_processors(component: Any) -> list[Json]:
    """Return a post-processor's steps, inside sequences too."""
    todo: list[Any] = [component]
    steps: list[Json] = []
    while todo:
        step = todo.pop()
        if isinstance(step, dict):
            steps.append(step)
            inner = step.get("processors")
            todo += inner if isinstance(inner, list) else []
    return steps


def _get_id(piece: Any, key: str) -> str:
    """Return the id in a piece of a template such as {"Sequence": {"id": "A"}}, or ""."""
    value = piece.get(key) if isinstance(piece, dict) else None
    return str(value.get("id", "")) if isinstance(value, dict) else ""
