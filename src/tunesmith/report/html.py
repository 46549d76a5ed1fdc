"""Render the templates of the report: one Jinja environment in which everything is escaped.

In: the name of a file in templates/ and its values. Out: HTML.

Rows and answers are untrusted text. Autoescape handles markup; characters that are invisible or
change the order of other text (direction marks, zero widths, control characters, lone surrogates)
are shown by their code: `[U+202E]` everywhere, or as an element with the filter `mark_hidden`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tunesmith.core.formatting import format_bytes, format_duration, format_rows, format_value

# C0 and C1 controls without tab and line feed, direction marks, zero widths without joiners, lone
# surrogates, tag characters
HIDDEN_CHARS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffc\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def render_template(name: str, **values: Any) -> str:
    """Render templates/NAME. Raises jinja2.UndefinedError for a value that the template lacks."""
    return ENVIRONMENT.get_template(name).render(values)


def hash_source(source: str) -> str:
    """Return the hash of a style or script, as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def mark_hidden(text: str) -> Markup:
    """Escape text and show each hidden character as an element; for content, not attributes."""
    shown = HIDDEN_CHARS.sub(
        lambda match: f'<b class="hidden">{format_codepoint(match[0])}</b>', str(escape(text))
    )
    return Markup(shown)


def show_hidden(value: Any) -> Any:
    """Replace each hidden character by its code in brackets; None becomes empty.

    Runs on every value of every template, so the result is safe in attributes too. Markup passes.
    """
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Markup):
        return HIDDEN_CHARS.sub(lambda match: f"[{format_codepoint(match[0])}]", value)
    return value


def format_codepoint(char: str) -> str:
    return f"U+{ord(char):04X}"


def format_signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _make_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=show_hidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {
        "mark_hidden": mark_hidden,
        "commas": lambda number: f"{number:,}",
        "decimal": lambda number: f"{number:.3f}",
        "signed": format_signed,
        "as_bytes": format_bytes,
        "as_duration": format_duration,
        "as_rows": format_rows,
        "as_setting": format_value,
    }
    return environment


ENVIRONMENT = _make_environment()
