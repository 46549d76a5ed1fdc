"""Index the user's documents as passages: BM25 over SQLite's full-text index, in memory.

    folder or file -> PassageIndex; index.search(question, 3) -> passages, the best first

A passage is a paragraph; short ones are joined, and long ones are cut into overlapping windows.
FTS5 comes with Python, stems English words and ranks by BM25 (k1 1.2, b 0.75). Left out: embedding
search, which would need a second model.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError, MachineError
from tunesmith.data.readers.sources import open_source

# words of a passage
MIN_WORDS = 20
MAX_WORDS = 120
OVERLAP_WORDS = 30  # shared by two windows
MAX_QUERY_WORDS = 64  # more do not help
DOCUMENTS_HINT = "give --documents a folder of .txt and .md files, or a file with a `text` per row"


class PassageIndex:
    """A searchable set of passages; `fingerprint` is that of their files."""

    def __init__(self, texts: Sequence[str], fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self._index = sqlite3.connect(":memory:")
        try:
            self._index.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(text, tokenize='porter unicode61')"
            )
        except sqlite3.OperationalError as error:
            raise MachineError(
                f"this Python's SQLite has no full-text index: {error}", where="--documents"
            ) from error
        self._index.executemany("INSERT INTO passages VALUES (?)", ((text,) for text in texts))

    def search(self, question: str, count: int) -> list[str]:
        """Return at most `count` passages that share a word with the question."""
        words = list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:MAX_QUERY_WORDS]
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)
        rows = self._index.execute(
            "SELECT text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?", (query, count)
        )
        return [text for (text,) in rows]


def open_passages(path: Path) -> PassageIndex:
    """Raises InputError, naming the file, for documents that are missing, empty or not UTF-8."""
    source = open_source(path)
    texts: list[str] = []
    for row in range(len(source)):
        text = _require_text(source.read_row(row).data, source.get_id(row))
        texts += split_passages(text)
    if not texts:
        raise InputError(
            "the documents contain no words", where=f"--documents: {path}", fix=DOCUMENTS_HINT
        )
    return PassageIndex(texts, source.fingerprint)


def _require_text(row: dict[str, object], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError("the row has no `text`", where=where, fix=DOCUMENTS_HINT)
    return text


def split_passages(text: str) -> Iterator[str]:
    """Yield paragraphs; a short one, such as a heading, joins the next, a long one is windowed."""
    pending = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        pending = f"{pending}\n\n{paragraph.strip()}".strip()
        words = pending.split()
        if len(words) < MIN_WORDS:
            continue
        if len(words) <= MAX_WORDS:
            yield pending
        else:
            end = max(1, len(words) - OVERLAP_WORDS)
            for start in range(0, end, MAX_WORDS - OVERLAP_WORDS):
                yield " ".join(words[start : start + MAX_WORDS])
        pending = ""
    if pending:
        yield pending
