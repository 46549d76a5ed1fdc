"""The rows of one data role, readable in any order.

    files -> open_dataset (parse-only pass) -> Dataset; Dataset.prepare(i) -> Prepared (documents of row i)

The parse-only pass reads every row once, so the number of rows (and of steps) is known and every broken row is reported
before anything starts. It keeps a few numbers a row, never the rows: row i is read and rendered again when asked for.
A row whose documents all fall away keeps its slot, with no documents. Order and steps: `schedule.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tunesmith.data.formats import detect, parse
from tunesmith.data.sources import Source, open_source
from tunesmith.errors import InputError
from tunesmith.recipe import DataSource
from tunesmith.types import Document, Example, Json, Row

if TYPE_CHECKING:
    from tunesmith.data.render import Renderer

Overlong = Literal["drop", "truncate", "refuse"]
FIRST_ROWS = 20  # enough to see a format
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Prepared:
    """What a row became, and what was lost on the way."""

    id: str
    documents: tuple[Document, ...]  # empty if the row is dropped; it keeps its slot
    dropped: str = ""  # why no document is left
    overlong: int = 0  # documents longer than max_length: dropped or truncated
    truncated: int = 0
    answer_too_long: bool = False  # one document's trained tokens alone do not fit
    notes: tuple[str, ...] = ()  # what the render had to say


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of one role. N rows; the digests compare contents with white space evened out."""

    sources: tuple[Source, ...]
    formats: tuple[str, ...]  # of each source
    reasons: tuple[str, ...]
    renderer: Renderer
    source_N: np.ndarray  # int32, into sources
    row_N: np.ndarray  # int64, into the rows of that source
    contents_N: np.ndarray  # uint64, digest of the whole row
    prompts_N: np.ndarray  # uint64, digest of what stands before the last answer
    max_length: int | None = None  # tokens of a document
    overlong: Overlong = "drop"

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def path(self) -> str:
        return ", ".join(str(source.path) for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """sha256 over the bytes of the file; of several files, over their sha256."""
        prints = [source.fingerprint for source in self.sources]
        return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()

    def id(self, index: int) -> str:
        return self.sources[self.source_N[index]].id(self.row_N[index])

    def row(self, index: int) -> Row:
        return self.sources[self.source_N[index]].row(self.row_N[index])

    def example(self, index: int) -> Example:
        return parse(self.row(index), self.formats[self.source_N[index]], self.renderer.has_template)

    def understand(self, index: int) -> tuple[Example, Prepared]:
        """Render one row and apply the over-long policy. Raises InputError if the row cannot be rendered."""
        example = self.example(index)
        rendered = self.renderer.documents(example)
        prepared = fit(example.id, rendered.documents, self.max_length, self.overlong)
        return example, dataclasses.replace(prepared, notes=tuple(rendered.notes))

    def prepare(self, index: int) -> Prepared:
        return self.understand(index)[1]

    def documents(self, index: int) -> tuple[Document, ...]:
        return self.prepare(index).documents

    def take(self, rows_K: np.ndarray) -> Dataset:
        """The data set of these rows, in this order."""
        names = ("source_N", "row_N", "contents_N", "prompts_N")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows_K] for name in names})

    def limited(self, max_length: int | None, overlong: Overlong) -> Dataset:
        """The same rows under another length policy."""
        return dataclasses.replace(self, max_length=max_length, overlong=overlong)


def fit(row_id: str, documents: Sequence[Document], max_length: int | None, overlong: Overlong) -> Prepared:
    """Apply the over-long policy: `drop` the document, `truncate` it (the front stays), or `refuse` with InputError.

    A document without a trained token is never kept.
    """
    kept: list[Document] = []
    long = truncated = 0
    answer_too_long = False
    reason = "nothing is trained"
    for document in documents:
        if max_length is not None and len(document) > max_length:
            if overlong == "refuse":
                what = f"the row has {len(document)} tokens, max_length is {max_length}"
                raise InputError(what, where=row_id, fix="raise max_length, or set overlong to drop or truncate")
            long += 1
            answer_too_long |= bool(np.count_nonzero(document.weights_L) > max_length)
            reason = "longer than max_length"
            if overlong == "drop":
                continue
            reason = "nothing trained is left after truncation"
            document = Document(document.id, document.tokens_L[:max_length], document.weights_L[:max_length])
            truncated += bool(document.weights_L.any())
        if document.weights_L.any():
            kept.append(document)
    return Prepared(row_id, tuple(kept), "" if kept else reason, long, truncated, answer_too_long)


def open_dataset(
    files: Sequence[DataSource],
    renderer: Renderer,
    *,
    max_length: int | None = None,
    overlong: Overlong = "drop",
    max_examples: int | None = None,
) -> Dataset:
    """Read every row once and remember where it is. `max_examples` takes the first rows of all files together.

    Raises InputError that counts the unusable rows of a file and names the first ones.
    """
    names = Counter(file.path.name for file in files)
    opened: list[_Opened] = []
    left = max_examples
    for file in files:
        if left == 0:
            break
        name = file.path.name if names[file.path.name] == 1 else str(file.path)
        opened.append(_open_file(file, name, left, renderer.has_template))
        left = left if left is None else left - len(opened[-1].digests_N2)
    digests_N2 = np.concatenate([part.digests_N2 for part in opened])
    return Dataset(
        sources=tuple(part.source for part in opened),
        formats=tuple(part.format for part in opened),
        reasons=tuple(part.reason for part in opened),
        renderer=renderer,
        source_N=np.repeat(np.arange(len(opened), dtype=np.int32), [len(part.digests_N2) for part in opened]),
        row_N=np.concatenate([np.arange(len(part.digests_N2)) for part in opened]),
        contents_N=digests_N2[:, 0],
        prompts_N=digests_N2[:, 1],
        max_length=max_length,
        overlong=overlong,
    )


class _Opened(NamedTuple):
    source: Source
    format: str
    reason: str
    digests_N2: np.ndarray


def _open_file(file: DataSource, name: str, limit: int | None, has_template: bool) -> _Opened:
    source = open_source(file.path, name=name)
    rows = range(min(n for n in (len(source), file.max_examples, limit) if n is not None))
    if file.format == "auto":
        format, reason = detect(_first_rows(source, rows), has_template)
    else:
        format, reason = file.format, "the recipe says so"
    digests_N2 = np.zeros((len(rows), 2), dtype=np.uint64)
    problems: list[InputError] = []
    for i in rows:
        try:
            digests_N2[i] = digests(parse(source.row(i), format, has_template))
        except InputError as error:
            problems.append(error)
    raise_all(problems, len(rows), str(file.path))
    return _Opened(source, format, reason, digests_N2)


def _first_rows(source: Source, rows: range) -> list[Row]:
    """The first rows that can be decoded; the others are reported with all problems of the file."""
    found: list[Row] = []
    problems: list[InputError] = []
    for i in rows[:FIRST_ROWS]:
        try:
            found.append(source.row(i))
        except InputError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return found


def raise_all(problems: Sequence[InputError], rows: int, where: str) -> None:
    """Raise one error that stands for all of them; do nothing if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"\n  {problem.where}: {problem.what}" for problem in problems[:SHOWN_ERRORS]]
    more = f"\n  and {len(problems) - SHOWN_ERRORS:,} more" if len(problems) > SHOWN_ERRORS else ""
    what = f"{len(problems):,} of {rows:,} rows cannot be used:{''.join(lines)}{more}"
    raise InputError(what, where=where, fix=problems[0].fix)


def digests(example: Example) -> tuple[int, int]:
    """64-bit digests of (the whole example, what stands before its last answer), white space evened out.

    With nothing before its answer, as in a plain text, both digests are the same.
    """
    if example.text is not None:
        return _digests([example.prompt] if example.prompt else [], [example.text])
    *before, answer = [_parts(message) for message in example.messages]
    tools = [json.dumps(example.tools, sort_keys=True)] if example.tools else []
    return _digests([*tools, *chain.from_iterable(before)], answer)


def _parts(message: Json) -> tuple[str, str, str]:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return message["role"], message["content"], json.dumps(rest, sort_keys=True) if rest else ""


def _digests(prompt: Sequence[str], answer: Sequence[str]) -> tuple[int, int]:
    hasher = hashlib.blake2b(_even(prompt), digest_size=8)
    first = int.from_bytes(hasher.digest(), "big")
    hasher.update(_even(answer))
    whole = int.from_bytes(hasher.digest(), "big")
    return whole, first if prompt else whole


def _even(parts: Sequence[str]) -> bytes:
    return "".join(" ".join(part.split()) + "\0" for part in parts).encode()
