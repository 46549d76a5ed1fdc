"""The user's documents as passages that can be looked up: BM25 over SQLite's full-text index, in
memory.

    folder or file -> Passages; passages.best(question, 3) -> texts, the best one first

A passage is a paragraph; short ones go together, and of a long one there are windows, which
overlap. FTS5 comes with Python, stems English words and ranks by BM25 (k1 1.2, b 0.75). Left out:
an index by meaning, which would need a second model; what the model makes of what is found."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError, MachineError
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.text_metrics import normalise_words

MIN_WORDS, MAX_WORDS, OVERLAP_WORDS = (
    20,
    120,
    30,
)  # words of a passage; those that two windows share
MAX_QUERY_WORDS = 64  # of a question; more make it no clearer
RECALL_CUTOFFS = (1, 3, 5, 10)
DOCUMENTS_HINT = (
    "give --documents a folder of .txt and .md files, or a file with a `text` in each row"
)


class PassageIndex:
    """`fingerprint`: of the files they come from."""

    def __init__(self, texts: Sequence[str], fingerprint: str = "") -> None:
        self.fingerprint, self.num_passages = fingerprint, len(texts)
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
        """At most `count` passages that share a word with the question."""
        words = list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:MAX_QUERY_WORDS]
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)
        rows = self._index.execute(
            "SELECT text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?", (query, count)
        )
        return [text for (text,) in rows]

    def find_rank(
        self, question: str, answer: str, max_rank: int = RECALL_CUTOFFS[-1]
    ) -> int | None:
        """The rank, from 1, of the first passage that holds the answer."""
        texts = self.search(question, max_rank)
        return next(
            (
                rank
                for rank, text in enumerate(texts, start=1)
                if normalise_words(answer) in normalise_words(text)
            ),
            None,
        )


def open_passages(path: Path) -> PassageIndex:
    """Raises InputError for documents that are missing, empty, no text or not UTF-8; each names its
    file."""
    source = open_source(path)
    texts = [
        passage
        for row in range(len(source))
        for passage in split_passages(_require_text(source.read_row(row).data, source.get_id(row)))
    ]
    if not texts:
        raise InputError(
            "the documents hold no words", where=f"--documents: {path}", fix=DOCUMENTS_HINT
        )
    return PassageIndex(texts, source.fingerprint)


def _require_text(row: dict[str, object], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError("the row has no `text`", where=where, fix=DOCUMENTS_HINT)
    return text


def split_passages(text: str) -> Iterator[str]:
    """Paragraphs; one of less than LEAST words, such as a heading, goes with the next, and of one
    with more than MOST words its windows."""
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
            yield from (
                " ".join(words[start : start + MAX_WORDS])
                for start in range(0, end, MAX_WORDS - OVERLAP_WORDS)
            )
        pending = ""
    if pending:
        yield pending
