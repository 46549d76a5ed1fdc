"""The edge of every output: results on stdout, everything else on stderr.

    print_result(value, view, as_json=False)    one JSON object, or `rich` views
    write_stderr("warning: ...\\n")              a message
    TerminalConsole(stderr=True)                what progress is printed with

Text of a model, row, recipe or file name may hold terminal escapes: all of these make control
characters visible (`core/formatting.py`). Nothing else in cli/ writes text of a stranger. Left out:
what libraries write (core/library_output.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from tunesmith.core.formatting import escape_controls
from tunesmith.core.json_io import dump_json, to_jsonable
from tunesmith.core.types import __version__

PIPE_WIDTH = 120
BACKSLASH = "\\"


class TerminalConsole(Console):
    """A console that makes control characters in the text of any view visible, and shows names such
    as `:key:` as they are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(emoji=False, **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)


def print_result(value: Any, *views: Any, as_json: bool) -> None:
    """Print the result of a verb: one JSON object for programs, or `rich` views for people."""
    if as_json:
        text = dump_json({"tunesmith": __version__, **to_jsonable(value)}).decode()
        sys.stdout.write(escape_controls(text, json=True))
        return
    if sys.stdout.isatty():
        console = TerminalConsole()
    else:
        width = os.environ.get("COLUMNS", "")
        console = TerminalConsole(width=int(width) if width.isdecimal() else PIPE_WIDTH)
    # A plain string may come from data or a model: it is never read as markup.
    texts = [Text(escape_controls(view)) if isinstance(view, str) else view for view in views]
    if sys.stdout.isatty():
        for text in texts:
            console.print(text, highlight=False)
        return
    with console.capture() as capture:
        for part in _list_parts(texts):
            # in a pipe, a path or an answer stays one line
            console.print(part, soft_wrap=isinstance(part, str | Text), highlight=False)
    sys.stdout.write("\n".join(map(str.rstrip, capture.get().split("\n"))))


def _list_parts(views: Iterable[Any]) -> Iterable[Any]:
    """Return the views with the parts of a group one by one."""
    for view in views:
        if isinstance(view, Group):
            yield from _list_parts(view.renderables)
        else:
            yield view


def flatten_text(text: str, max_length: int = 100) -> str:
    """Put untrusted text on one line, without control characters; a long one is cut."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= max_length else plain[: max_length - 1] + "…"


def format_single_line(text: str, max_length: int = 100) -> str:
    """Do as `flatten_text` does, for a string that is read as markup."""
    return escape_markup(flatten_text(text, max_length))


def escape_markup(text: str) -> str:
    """Escape text for a string that is read as markup.

    `escape` of rich doubles one backslash at the end, which is right only before a tag: elsewhere
    it would be shown twice. So a tag that does nothing follows."""
    plain = text.rstrip("\\")
    num_backslashes = len(text) - len(plain)
    if not num_backslashes:
        return escape(text)
    return f"[none]{escape(plain)}{2 * num_backslashes * BACKSLASH}[/none]"


def write_stderr(text: str) -> None:
    sys.stderr.write(escape_controls(text))
    sys.stderr.flush()


def hide_download_bars() -> None:
    """Keep the progress bars of huggingface_hub out of logs: they are drawn for a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
