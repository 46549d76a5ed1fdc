"""A row crosses at most 20 files from its line to its loss, those that docs/design/structure.md
lists: traced in a run, by the functions that take or return the row in any of its forms."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import tunesmith
from tiny_runs import make_tiny_recipe, train
from tunesmith.core.types import Batch, Document, Example, Pack, Row
from tunesmith.data.chat_template.assistant_spans import AssistantSpan
from tunesmith.data.chat_template.conversation import Conversation
from tunesmith.data.chat_template.encode import EncodedText, TrackedText
from tunesmith.data.chat_template.renderer import RenderedRow
from tunesmith.train.loop import TrainingLoop

PACKAGE = Path(tunesmith.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "design" / "structure.md"
MAX_FILES = 20
FORMS = (Row, Example, Conversation, TrackedText, EncodedText, AssistantSpan, RenderedRow, Document)
PACKED_FORMS = (Pack, Batch)
# What runs inside Jinja while the template does, and the types themselves.
INSIDE_TEMPLATE = {
    "data/chat_template/compiled_template.py",
    "data/chat_template/sandbox.py",
    "data/chat_template/tracked_str.py",
    "core/types.py",
}


def holds_row(value: Any) -> bool:
    """Whether a value is a row: raw, as text, parsed, rendered, as tokens, packed."""
    if isinstance(value, (list, tuple)):
        return bool(value) and holds_row(value[0])
    if isinstance(value, dict):
        return "messages" in value or "role" in value
    if isinstance(value, str):
        return '"sum"' in value
    return isinstance(value, FORMS + PACKED_FORMS)


@contextmanager
def tracing_files(files: dict[str, None]) -> Iterator[None]:
    """Collect the files of the package whose functions take or return a row, on all threads."""

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(PACKAGE):
            return
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [argument] if event == "return" else [frame.f_locals.get(name) for name in names]
        if any(map(holds_row, values)):
            files[str(path.relative_to(PACKAGE))] = None

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type] - None ends it


def test_a_row_crosses_at_most_twenty_files_and_the_page_lists_them(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, None] = {}
    take_step = TrainingLoop._take_step

    def trace_first_step(loop: TrainingLoop) -> Any:
        if loop.step:
            return take_step(loop)
        with tracing_files(files):
            return take_step(loop)

    monkeypatch.setattr(TrainingLoop, "_take_step", trace_first_step)
    train(make_tiny_recipe(tiny_folder, tmp_path))
    crossed = [name for name in files if name not in INSIDE_TEMPLATE]
    assert "data/readers/decode.py" in crossed
    assert "train/losses.py" in crossed
    assert len(crossed) <= MAX_FILES
    section = PAGE.read_text().partition("## The way of a row")[2].partition("\n## ")[0]
    listed = re.findall(r"`((?:data|session|train|model)/[\w/]+\.py)`", section)
    assert sorted(listed) == sorted(crossed)
