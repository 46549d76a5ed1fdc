"""All rows of all roles, read once: what their texts say, as a few numbers a row.

    data sets by role -> read_all -> Reading: Texts of each role, rows that are alike, passages that are trained

No text is kept. What checks of single rows have to say (said.py) is counted, with the first rows of each kind.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tunesmith.core.types import Example
from tunesmith.data.checks import language_id
from tunesmith.data.checks.minhash import BANDS, WORDS, Alike, Signer, joined
from tunesmith.data.checks.ngram_overlap import GRAM, Parts, Passages
from tunesmith.data.checks.ngrams import all_grams, outside, words_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.rehearsal import NAME as REHEARSAL
from tunesmith.data.sampler import order

TRAINED = ("data", REHEARSAL)
SAMPLE = 2_000  # rows, from which is seen what most rows have in common
COMMON_SHARE, COMMON_ROWS = 0.1, 10  # what more than both of these have is a frame, not what a row says
NAMED_ROWS = 1000  # of a finding; what is printed shows a few of them
OPENING = 3  # words of an answer with which many may begin
LANGUAGE_ROWS = 50_000  # telling a language takes as long as everything else
NO_JSON, GOOD_JSON, BROKEN_JSON = range(3)


@dataclass(frozen=True, eq=False)
class Row:
    """One row as checks read it: `prompt` is its last question, `answer` its last answer, `turns` what user and
    assistant say, `texts` everything."""

    example: Example
    prompt: str
    answer: str
    turns: tuple[str, ...]
    texts: tuple[str, ...]

    @cached_property
    def _known(self) -> dict[str, np.ndarray]:
        return {}

    def words_in(self, text: str) -> np.ndarray:
        """uint64 [words] of one of its texts, reckoned once."""
        if text not in self._known:
            self._known[text] = words_of(text)
        return self._known[text]

    @property
    def words(self) -> list[np.ndarray]:
        """Of each turn."""
        return [self.words_in(text) for text in self.turns]

    @cached_property
    def plain_answer(self) -> str:
        """In small letters, with straight apostrophes."""
        return self.answer.lower().replace("’", "'")


def row_of(example: Example) -> Row:
    if example.text is not None:
        texts = (example.prompt, example.text) if example.prompt else (example.text,)
        return Row(example, example.prompt or "", example.text, texts, texts)
    texts = tuple(message["content"] for message in example.messages)
    turns = tuple(m["content"] for m in example.messages if m["role"] in ("user", "assistant"))
    prompt = next((m["content"] for m in reversed(example.messages[:-1]) if m["role"] == "user"), "")
    return Row(example, prompt, texts[-1], turns, texts)


Find = Callable[[Row], Iterator[tuple[str, str]]]  # a row -> what is wrong with it: kind, what to show


@dataclass
class Noted:
    """Rows of which one check of single rows has something to say."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    first: list[str] = field(default_factory=list[str])

    def add(self, id: str, found: Mapping[str, str]) -> None:
        """`found`: kind -> what to show of it."""
        self.rows += 1
        self.kinds.update(found.keys())
        if len(self.first) < NAMED_ROWS:
            self.first.append(" ".join([id, *filter(None, found.values())]))


@dataclass(frozen=True, eq=False)
class Texts:
    """What the N rows of a role say."""

    noted: dict[str, Noted]  # check of single rows -> what it found
    answers_N: np.ndarray  # uint64, digest of the last answer, case and white space evened out
    openings_N: np.ndarray  # uint64, digest of its opening
    answer_chars_N: np.ndarray  # int64
    prompt_chars_N: np.ndarray  # int64
    other_chars_N: np.ndarray  # int64, of the rejected answer
    json_N: np.ndarray  # uint8, NO_JSON | GOOD_JSON | BROKEN_JSON
    languages_N: np.ndarray | None  # int16, into languages.names(), -1: too little text; None without py3langid
    told_N: np.ndarray  # bool, whether the language is asked for: of many rows a sample

    @classmethod
    def empty(cls, count: int) -> Texts:
        return cls(
            noted={},
            answers_N=np.zeros(count, dtype=np.uint64),
            openings_N=np.zeros(count, dtype=np.uint64),
            answer_chars_N=np.zeros(count, dtype=np.int64),
            prompt_chars_N=np.zeros(count, dtype=np.int64),
            other_chars_N=np.zeros(count, dtype=np.int64),
            json_N=np.zeros(count, dtype=np.uint8),
            languages_N=np.full(count, -1, dtype=np.int16) if language_id.installed() else None,
            told_N=np.isin(np.arange(count), order(0, 0, count)[:LANGUAGE_ROWS]),
        )

    def note(self, at: int, row: Row) -> None:
        answer = " ".join(row.answer.split())
        self.answers_N[at] = digest(answer.lower())
        self.openings_N[at] = digest(opening_of(answer).lower())
        self.answer_chars_N[at], self.prompt_chars_N[at] = len(answer), len(row.prompt)
        if row.example.rejected is not None:
            self.other_chars_N[at] = len(row_of(row.example.rejected).answer)
        self.json_N[at] = _json(answer)
        if self.languages_N is not None and self.told_N[at] and self.json_N[at] == NO_JSON:
            self.languages_N[at] = language_id.language(row.answer)


@dataclass(frozen=True, eq=False)
class Reading:
    roles: Mapping[str, Texts]
    alike: Alike | None  # None without datasketch
    parts: Mapping[str, Parts]  # of the held-out roles


def opening_of(answer: str) -> str:
    """Its first words: up to a sign, as in "Great question!", at most three."""
    words = answer.split(None, OPENING)[:OPENING]
    closed = next((number for number, word in enumerate(words, 1) if word[-1] in "!,.:;?"), OPENING)
    return " ".join(words[:closed])


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def _json(answer: str) -> int:
    if not answer.startswith(("{", "[")):
        return NO_JSON
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return BROKEN_JSON
    return GOOD_JSON


def rows_of(dataset: Dataset) -> Iterator[Row]:
    for index in range(len(dataset)):
        yield row_of(dataset.example(index))


def common_grams(datasets: Mapping[str, Dataset], n: int) -> np.ndarray:
    """uint64, ascending: runs of n words that many rows of a role have: its instruction, its frame."""
    found = [np.empty(0, dtype=np.uint64)]
    for dataset in datasets.values():
        _, different = np.unique(dataset.contents_N, return_index=True)
        sample = different[order(0, 0, len(different))[:SAMPLE]]
        grams = [all_grams(row_of(dataset.example(int(index))).words, n) for index in sample]
        values, counts = np.unique(np.concatenate(grams), return_counts=True)
        found.append(values[counts > max(COMMON_ROWS, COMMON_SHARE * len(sample))])
    return np.unique(np.concatenate(found))


def said_grams(row: Row, common: np.ndarray) -> np.ndarray:
    """What a row says beside its frame; a row that says nothing else is compared whole."""
    grams = all_grams(row.words, WORDS)
    said = outside(grams, common)
    return said if len(said) else grams


def read_all(datasets: Mapping[str, Dataset], checks: Mapping[str, Find]) -> Reading:
    """One pass over all rows; held-out ones, of which passages are looked for, are read once more before."""
    trained = np.concatenate([datasets[role].contents_N for role in TRAINED if role in datasets])
    frame = common_grams(datasets, GRAM)
    passages = {
        role: Passages((row.words for row in rows_of(dataset)), frame)
        for role, dataset in datasets.items()
        if role not in TRAINED
    }
    pass_ = _Pass(datasets, passages, checks)
    texts = {role: pass_.read(role) for role in datasets}
    return Reading(texts, pass_.alike(), {role: one.found(trained) for role, one in passages.items()})


class _Pass:
    """What is remembered from row to row."""

    def __init__(
        self, datasets: Mapping[str, Dataset], passages: Mapping[str, Passages], checks: Mapping[str, Find]
    ) -> None:
        self.datasets, self.passages, self.checks = datasets, passages, checks
        self.common = common_grams(datasets, WORDS)
        self.bands: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.seen = np.empty(0, dtype=np.uint64)  # digests of the rows before this role
        try:
            self.signer = Signer()
        except ImportError:
            self.signer = None

    def read(self, role: str) -> Texts:
        dataset = self.datasets[role]
        texts, signs_N, bands_NB = Texts.empty(len(dataset)), self._new(dataset), np.empty((0, BANDS), np.uint64)
        if self.signer:
            bands_NB = np.zeros((len(dataset), BANDS), dtype=np.uint64)
        for index, row in enumerate(rows_of(dataset)):
            texts.note(index, row)
            for name, find in self.checks.items():
                if found := dict(find(row)):
                    texts.noted.setdefault(name, Noted()).add(row.example.id, found)
            if role in TRAINED:
                for held_out in self.passages.values():
                    held_out.meet(row.words)
            if self.signer and signs_N[index]:
                grams = said_grams(row, self.common)
                signs_N[index] = len(grams) > 0
                bands_NB[index] = self.signer.bands(grams)
        if self.signer:
            self.bands[role] = np.flatnonzero(signs_N), bands_NB[signs_N]
        return texts

    def _new(self, dataset: Dataset) -> np.ndarray:
        """Which rows are the first with their content, in this role and those before it."""
        new_N = np.zeros(len(dataset), dtype=bool)
        new_N[np.unique(dataset.contents_N, return_index=True)[1]] = True
        new_N &= ~np.isin(dataset.contents_N, self.seen)
        self.seen = np.union1d(self.seen, dataset.contents_N)
        return new_N

    def alike(self) -> Alike | None:
        if self.signer is None:
            return None
        return joined(self.bands, lambda role, row: said_grams(row_of(self.datasets[role].example(row)), self.common))
