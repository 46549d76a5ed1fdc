"""The user's documents as passages that can be looked up: BM25 over SQLite's full-text index, in memory.

    folder or file -> Passages; passages.best(question, 3) -> texts, the best one first

A passage is a paragraph; short ones go together, and of a long one there are windows, which overlap. FTS5 comes with
Python, stems English words and ranks by BM25 (k1 1.2, b 0.75). Left out: an index by meaning, which would need a second
model; what the model makes of what is found.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError, MachineError
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.text_metrics import evened

LEAST, MOST, OVERLAP = 20, 120, 30  # words of a passage; those that two windows share
ASKED_WORDS = 64  # of a question; more make it no clearer
RECALL_AT = (1, 3, 5, 10)
GIVE = "give --documents a folder of .txt and .md files, or a file with a `text` in each row"


class Passages:
    """`fingerprint`: of the files they come from."""

    def __init__(self, texts: Sequence[str], fingerprint: str = "") -> None:
        self.fingerprint, self.count = fingerprint, len(texts)
        self._index = sqlite3.connect(":memory:")
        try:
            self._index.execute("CREATE VIRTUAL TABLE passages USING fts5(text, tokenize='porter unicode61')")
        except sqlite3.OperationalError as error:
            raise MachineError(f"this Python's SQLite has no full-text index: {error}", where="--documents") from error
        self._index.executemany("INSERT INTO passages VALUES (?)", ((text,) for text in texts))

    def best(self, question: str, count: int) -> list[str]:
        """At most `count` passages that share a word with the question."""
        words = list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:ASKED_WORDS]
        if not words:
            return []
        asked = " OR ".join(f'"{word}"' for word in words)
        found = self._index.execute(
            "SELECT text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?", (asked, count)
        )
        return [text for (text,) in found]

    def place_of(self, question: str, answer: str, within: int = RECALL_AT[-1]) -> int | None:
        """The rank, from 1, of the first passage that holds the answer."""
        found = self.best(question, within)
        return next((rank for rank, text in enumerate(found, start=1) if evened(answer) in evened(text)), None)


def open_passages(path: Path) -> Passages:
    """Raises InputError for documents that are missing, empty, no text or not UTF-8; each names its file."""
    source = open_source(path)
    texts = [passage for row in range(len(source)) for passage in split(_text(source.row(row).data, source.id(row)))]
    if not texts:
        raise InputError("the documents hold no words", where=f"--documents: {path}", fix=GIVE)
    return Passages(texts, source.fingerprint)


def _text(row: dict[str, object], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError("the row has no `text`", where=where, fix=GIVE)
    return text


def split(text: str) -> Iterator[str]:
    """Paragraphs; one of less than LEAST words, such as a heading, goes with the next, and of one with more than MOST
    words its windows."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        held = f"{held}\n\n{paragraph.strip()}".strip()
        words = held.split()
        if len(words) < LEAST:
            continue
        if len(words) <= MOST:
            yield held
        else:
            last = max(1, len(words) - OVERLAP)
            yield from (" ".join(words[start : start + MOST]) for start in range(0, last, MOST - OVERLAP))
        held = ""
    if held:
        yield held
