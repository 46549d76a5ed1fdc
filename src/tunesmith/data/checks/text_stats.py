"""All rows of all roles, read once: what their texts say, as a few numbers a row.

    data sets by role -> read_all -> Reading: Texts of each role, rows that are alike, passages that are trained

No text is kept. What checks of single rows have to say (said.py) is counted, with the first rows of
each kind."""

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
from tunesmith.data.checks.minhash import (
    NUM_BANDS,
    SHINGLE_WORDS,
    MinHasher,
    NearDuplicates,
    find_near_duplicates,
)
from tunesmith.data.checks.ngram_overlap import NGRAM_WORDS, NgramIndex, NgramOverlap
from tunesmith.data.checks.ngrams import exclude_values, hash_unique_ngrams, hash_words
from tunesmith.data.dataset import Dataset
from tunesmith.data.rehearsal import REHEARSAL_ROLE as REHEARSAL
from tunesmith.data.sampler import permutation

TRAINED_ROLES = ("data", REHEARSAL)
SAMPLE_ROWS = 2_000  # rows, from which is seen what most rows have in common
COMMON_SHARE, COMMON_ROWS = (
    0.1,
    10,
)  # what more than both of these have is a frame, not what a row says
MAX_NAMED_ROWS = 1000  # of a finding; what is printed shows a few of them
OPENING_WORDS = 3  # words of an answer with which many may begin
MAX_LANGUAGE_ROWS = 50_000  # telling a language takes as long as everything else
NO_JSON, GOOD_JSON, BROKEN_JSON = range(3)


@dataclass(frozen=True, eq=False)
class RowTexts:
    """One row as checks read it: `prompt` is its last question, `answer` its last answer, `turns`
    what user and assistant say, `texts` everything."""

    example: Example
    prompt: str
    answer: str
    turns: tuple[str, ...]
    texts: tuple[str, ...]

    @cached_property
    def _word_cache(self) -> dict[str, np.ndarray]:
        return {}

    def get_words(self, text: str) -> np.ndarray:
        """uint64 [words] of one of its texts, reckoned once."""
        if text not in self._word_cache:
            self._word_cache[text] = hash_words(text)
        return self._word_cache[text]

    @property
    def words(self) -> list[np.ndarray]:
        """Of each turn."""
        return [self.get_words(text) for text in self.turns]

    @cached_property
    def plain_answer(self) -> str:
        """In small letters, with straight apostrophes."""
        return self.answer.lower().replace("’", "'")


def extract_row_texts(example: Example) -> RowTexts:
    if example.text is not None:
        texts = (example.prompt, example.text) if example.prompt else (example.text,)
        return RowTexts(example, example.prompt or "", example.text, texts, texts)
    texts = tuple(message["content"] for message in example.messages)
    turns = tuple(m["content"] for m in example.messages if m["role"] in ("user", "assistant"))
    prompt = next(
        (m["content"] for m in reversed(example.messages[:-1]) if m["role"] == "user"), ""
    )
    return RowTexts(example, prompt, texts[-1], turns, texts)


RowFinder = Callable[
    [RowTexts], Iterator[tuple[str, str]]
]  # a row -> what is wrong with it: kind, what to show


@dataclass
class CheckCounts:
    """Rows of which one check of single rows has something to say."""

    num_rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    examples: list[str] = field(default_factory=list[str])

    def add_row(self, row_id: str, matches: Mapping[str, str]) -> None:
        """`found`: kind -> what to show of it."""
        self.num_rows += 1
        self.kinds.update(matches.keys())
        if len(self.examples) < MAX_NAMED_ROWS:
            self.examples.append(" ".join([row_id, *filter(None, matches.values())]))


@dataclass(frozen=True, eq=False)
class RoleTextStats:
    """What the N rows of a role say."""

    check_counts: dict[str, CheckCounts]  # check of single rows -> what it found
    answer_digests_N: (
        np.ndarray
    )  # uint64, digest of the last answer, case and white space evened out
    opening_digests_N: np.ndarray  # uint64, digest of its opening
    answer_chars_N: np.ndarray  # int64
    prompt_chars_N: np.ndarray  # int64
    rejected_chars_N: np.ndarray  # int64, of the rejected answer
    json_kind_N: np.ndarray  # uint8, NO_JSON | GOOD_JSON | BROKEN_JSON
    languages_N: (
        np.ndarray | None
    )  # int16, into languages.names(), -1: too little text; None without py3langid
    is_sampled_N: np.ndarray  # bool, whether the language is asked for: of many rows a sample

    @classmethod
    def make_empty(cls, count: int) -> RoleTextStats:
        return cls(
            check_counts={},
            answer_digests_N=np.zeros(count, dtype=np.uint64),
            opening_digests_N=np.zeros(count, dtype=np.uint64),
            answer_chars_N=np.zeros(count, dtype=np.int64),
            prompt_chars_N=np.zeros(count, dtype=np.int64),
            rejected_chars_N=np.zeros(count, dtype=np.int64),
            json_kind_N=np.zeros(count, dtype=np.uint8),
            languages_N=np.full(count, -1, dtype=np.int16) if language_id.is_installed() else None,
            is_sampled_N=np.isin(np.arange(count), permutation(0, 0, count)[:MAX_LANGUAGE_ROWS]),
        )

    def record_row(self, index: int, row: RowTexts) -> None:
        answer = " ".join(row.answer.split())
        self.answer_digests_N[index] = compute_digest(answer.lower())
        self.opening_digests_N[index] = compute_digest(extract_opening(answer).lower())
        self.answer_chars_N[index], self.prompt_chars_N[index] = len(answer), len(row.prompt)
        if row.example.rejected is not None:
            self.rejected_chars_N[index] = len(extract_row_texts(row.example.rejected).answer)
        self.json_kind_N[index] = _classify_json(answer)
        if (
            self.languages_N is not None
            and self.is_sampled_N[index]
            and self.json_kind_N[index] == NO_JSON
        ):
            self.languages_N[index] = language_id.detect_language(row.answer)


@dataclass(frozen=True, eq=False)
class TextStats:
    roles: Mapping[str, RoleTextStats]
    near_duplicates: NearDuplicates | None  # None without datasketch
    ngram_overlaps: Mapping[str, NgramOverlap]  # of the held-out roles


def extract_opening(answer: str) -> str:
    """Its first words: up to a sign, as in "Great question!", at most three."""
    words = answer.split(None, OPENING_WORDS)[:OPENING_WORDS]
    opening_end = next(
        (number for number, word in enumerate(words, 1) if word[-1] in "!,.:;?"), OPENING_WORDS
    )
    return " ".join(words[:opening_end])


def compute_digest(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big"
    )


def _classify_json(answer: str) -> int:
    if not answer.startswith(("{", "[")):
        return NO_JSON
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return BROKEN_JSON
    return GOOD_JSON


def iter_rows(dataset: Dataset) -> Iterator[RowTexts]:
    for index in range(len(dataset)):
        yield extract_row_texts(dataset.read_example(index))


def find_common_ngrams(datasets: Mapping[str, Dataset], n: int) -> np.ndarray:
    """uint64, ascending: runs of n words that many rows of a role have: its instruction, its
    frame."""
    role_grams = [np.empty(0, dtype=np.uint64)]
    for dataset in datasets.values():
        _, unique_rows = np.unique(dataset.contents_N, return_index=True)
        sample = unique_rows[permutation(0, 0, len(unique_rows))[:SAMPLE_ROWS]]
        grams = [
            hash_unique_ngrams(extract_row_texts(dataset.read_example(int(index))).words, n)
            for index in sample
        ]
        values, counts = np.unique(np.concatenate(grams), return_counts=True)
        role_grams.append(values[counts > max(COMMON_ROWS, COMMON_SHARE * len(sample))])
    return np.unique(np.concatenate(role_grams))


def extract_ngrams(row: RowTexts, common: np.ndarray) -> np.ndarray:
    """What a row says beside its frame; a row that says nothing else is compared whole."""
    grams = hash_unique_ngrams(row.words, SHINGLE_WORDS)
    row_grams = exclude_values(grams, common)
    return row_grams if len(row_grams) else grams


def compute_text_stats(
    datasets: Mapping[str, Dataset], checks: Mapping[str, RowFinder]
) -> TextStats:
    """One pass over all rows; held-out ones, of which passages are looked for, are read once more
    before."""
    trained_contents = np.concatenate(
        [datasets[role].contents_N for role in TRAINED_ROLES if role in datasets]
    )
    common = find_common_ngrams(datasets, NGRAM_WORDS)
    indexes = {
        role: NgramIndex((row.words for row in iter_rows(dataset)), common)
        for role, dataset in datasets.items()
        if role not in TRAINED_ROLES
    }
    stats_pass = _StatsPass(datasets, indexes, checks)
    role_stats = {role: stats_pass.read_role(role) for role in datasets}
    return TextStats(
        role_stats,
        stats_pass.find_near_duplicates(),
        {role: index.compute_overlap(trained_contents) for role, index in indexes.items()},
    )


class _StatsPass:
    """What is remembered from row to row."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        indexes: Mapping[str, NgramIndex],
        checks: Mapping[str, RowFinder],
    ) -> None:
        self.datasets, self.indexes, self.checks = datasets, indexes, checks
        self.common = find_common_ngrams(datasets, SHINGLE_WORDS)
        self.bands: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.earlier_contents = np.empty(0, dtype=np.uint64)  # digests of the rows before this role
        try:
            self.min_hasher = MinHasher()
        except ImportError:
            self.min_hasher = None

    def read_role(self, role: str) -> RoleTextStats:
        dataset = self.datasets[role]
        stats, is_signed_N, bands_NB = (
            RoleTextStats.make_empty(len(dataset)),
            self._mark_new_rows(dataset),
            np.empty((0, NUM_BANDS), np.uint64),
        )
        if self.min_hasher:
            bands_NB = np.zeros((len(dataset), NUM_BANDS), dtype=np.uint64)
        for index, row in enumerate(iter_rows(dataset)):
            stats.record_row(index, row)
            for name, find_matches in self.checks.items():
                if matches := dict(find_matches(row)):
                    stats.check_counts.setdefault(name, CheckCounts()).add_row(
                        row.example.id, matches
                    )
            if role in TRAINED_ROLES:
                for ngram_index in self.indexes.values():
                    ngram_index.mark_trained(row.words)
            if self.min_hasher and is_signed_N[index]:
                grams = extract_ngrams(row, self.common)
                is_signed_N[index] = len(grams) > 0
                bands_NB[index] = self.min_hasher.compute_bands(grams)
        if self.min_hasher:
            self.bands[role] = np.flatnonzero(is_signed_N), bands_NB[is_signed_N]
        return stats

    def _mark_new_rows(self, dataset: Dataset) -> np.ndarray:
        """Which rows are the first with their content, in this role and those before it."""
        is_new_N = np.zeros(len(dataset), dtype=bool)
        is_new_N[np.unique(dataset.contents_N, return_index=True)[1]] = True
        is_new_N &= ~np.isin(dataset.contents_N, self.earlier_contents)
        self.earlier_contents = np.union1d(self.earlier_contents, dataset.contents_N)
        return is_new_N

    def find_near_duplicates(self) -> NearDuplicates | None:
        if self.min_hasher is None:
            return None
        return find_near_duplicates(
            self.bands,
            lambda role, row: extract_ngrams(
                extract_row_texts(self.datasets[role].read_example(row)), self.common
            ),
        )
