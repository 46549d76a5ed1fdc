"""A small renderer that is easy to count with: one token a word, two control tokens a turn."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import RenderedRow

START, END = 0, 1


@dataclass
class Words:
    """Tokens are words with the white space before them. A turn is START, role, words, END."""

    has_template: bool = True
    vocabulary: list[str] = field(default_factory=lambda: ["<s>", "</s>"])
    control_ids: frozenset[int] = frozenset({START, END})
    end_ids: tuple[int, ...] = (END,)

    def encode_text(self, text: str) -> list[int]:
        words = re.findall(r"\s*\S+|\s+", text)
        for word in words:
            if word not in self.vocabulary:
                self.vocabulary.append(word)
        return [self.vocabulary.index(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def render_rows(self, examples: list[Example]) -> list[RenderedRow]:
        return [self.render(example) for example in examples]

    def render(self, example: Example) -> RenderedRow:
        tokens, weights, notes = [], [], []
        if example.text is not None:
            before, after = self.encode_text(example.prompt or ""), self.encode_text(example.text)
            tokens, weights = (
                [START, *before, *after, END],
                [0.0] * (1 + len(before)) + [1.0] * (len(after) + 1),
            )
        for message, weight in zip(example.messages, example.turn_weights, strict=True):
            if "unrenderable" in message["content"]:
                return RenderedRow(example, error=InputError("not rendered", where=example.id))
            words = self.encode_text(message["content"])
            tokens += [START, *self.encode_text(message["role"]), *words, END]
            weights += [0.0, 0.0, *[weight] * (len(words) + 1)]
            if "</s>" in message["content"]:
                notes.append("control text is trained as text")
        document = Document(example.id, np.array(tokens, np.int32), np.array(weights, np.float32))
        return RenderedRow(example, (document,), tuple(notes))


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file below tmp_path from text or bytes, and return its path."""

    def write_file(content: str | bytes, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
