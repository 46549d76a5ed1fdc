"""Read all rows of all roles once, and keep a few numbers per row.

    data sets by role -> compute_text_stats -> TextStats: RoleTextStats of each role, near
                                               duplicates, n-gram overlap of held-out roles

No text is kept. Checks of single rows (`row_checks.py`) run in the same pass: their matches are
counted, with the first rows as examples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tunesmith.core.json_io import MAX_TEXT_VALUES, has_more_values
from tunesmith.core.types import Example
from tunesmith.data.checks import language_id
from tunesmith.data.checks.minhash import (
    NUM_BANDS,
    SHINGLE_WORDS,
    MinHasher,
    NearDuplicates,
    find_near_duplicates,
)
from tunesmith.data.checks.ngrams import (
    NGRAM_WORDS,
    NgramIndex,
    NgramOverlap,
    exclude_values,
    hash_unique_ngrams,
    hash_words,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.hashing import iter_collapsed
from tunesmith.data.rehearsal import REHEARSAL_ROLE as REHEARSAL
from tunesmith.data.sampler import permute_rows

TRAINED_ROLES = ("data", REHEARSAL)
SAMPLE_ROWS = 2_000  # from which n-grams common to most rows are estimated
# An n-gram in more rows than both of these belongs to an instruction or frame, not to a row.
COMMON_SHARE = 0.1
COMMON_ROWS = 10
MAX_NAMED_ROWS = 1000  # per finding; the terminal shows a few of them
MAX_LANGUAGE_ROWS = 50_000  # language detection takes as long as everything else
NUM_PARTS = 2  # of a row, each with a language of its own: prompt and answer
NO_JSON = 0
GOOD_JSON = 1
BROKEN_JSON = 2


@dataclass(frozen=True, eq=False)
class RowTexts:
    """The texts of a row: its last user message and last answer, those of all user and assistant
    messages, and those of all messages."""

    example: Example
    prompt: str
    answer: str
    turns: tuple[str, ...]
    texts: tuple[str, ...]

    @cached_property
    def _word_cache(self) -> dict[str, np.ndarray]:
        return {}

    def get_words(self, text: str) -> np.ndarray:
        """Return uint64 [words] of one of the texts, hashed once."""
        if text not in self._word_cache:
            self._word_cache[text] = hash_words(text)
        return self._word_cache[text]

    @property
    def words(self) -> list[np.ndarray]:
        """The word hashes of each turn."""
        return [self.get_words(text) for text in self.turns]

    @cached_property
    def plain_answer(self) -> str:
        """The answer in lower case, with straight apostrophes."""
        return self.answer.lower().replace("’", "'")


def extract_row_texts(example: Example) -> RowTexts:
    if example.text is not None:
        texts = (example.prompt, example.text) if example.prompt else (example.text,)
        return RowTexts(example, example.prompt or "", example.text, texts, texts)
    texts = tuple(message["content"] for message in example.messages)
    turns = tuple(m["content"] for m in example.messages if m["role"] in ("user", "assistant"))
    prompt = ""
    for message in example.messages[:-1]:
        if message["role"] == "user":
            prompt = message["content"]
    return RowTexts(example, prompt, texts[-1], turns, texts)


# row -> (kind, excerpt) of each problem
RowFinder = Callable[[RowTexts], Iterator[tuple[str, str]]]


@dataclass
class CheckCounts:
    """The rows that one check of single rows matched."""

    num_rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    examples: list[str] = field(default_factory=list[str])  # row id and excerpts

    def add_row(self, row_id: str, matches: Mapping[str, str]) -> None:
        """Count a row. `matches` maps kinds to excerpts."""
        self.num_rows += 1
        self.kinds.update(matches.keys())
        if len(self.examples) < MAX_NAMED_ROWS:
            self.examples.append(" ".join([row_id, *filter(None, matches.values())]))


@dataclass(frozen=True, eq=False)
class RoleTextStats:
    """Numbers of the N rows of a role."""

    check_counts: dict[str, CheckCounts]  # by name of the check
    answer_digests_N: np.ndarray  # uint64, last answer, case and white space normalized
    answer_chars_N: np.ndarray  # int64
    prompt_chars_N: np.ndarray  # int64
    rejected_chars_N: np.ndarray  # int64, rejected answer of a pair
    json_kind_N: np.ndarray  # uint8, NO_JSON | GOOD_JSON | BROKEN_JSON
    # int16, into language_id.list_languages(), -1: no text; None without py3langid
    languages_PN: np.ndarray | None
    is_clear_PN: np.ndarray  # bool, whether the language is certain
    is_sampled_N: np.ndarray  # bool, whether the languages are guessed
    common_lines: frozenset[str]  # of prompts, such as an instruction: they have no part in it

    @classmethod
    def make_empty(cls, count: int, common_lines: frozenset[str]) -> RoleTextStats:
        parts = (NUM_PARTS, count)
        return cls(
            check_counts={},
            answer_digests_N=np.zeros(count, dtype=np.uint64),
            answer_chars_N=np.zeros(count, dtype=np.int64),
            prompt_chars_N=np.zeros(count, dtype=np.int64),
            rejected_chars_N=np.zeros(count, dtype=np.int64),
            json_kind_N=np.zeros(count, dtype=np.uint8),
            languages_PN=np.full(parts, -1, dtype=np.int16) if language_id.is_installed() else None,
            is_clear_PN=np.zeros(parts, dtype=bool),
            is_sampled_N=np.isin(np.arange(count), permute_rows(0, 0, count)[:MAX_LANGUAGE_ROWS]),
            common_lines=common_lines,
        )

    def record_row(self, index: int, row: RowTexts) -> None:
        answer = "".join(iter_collapsed(row.answer))
        self.answer_digests_N[index] = compute_digest(answer.lower())
        self.answer_chars_N[index] = len(answer)
        self.prompt_chars_N[index] = len(row.prompt)
        if row.example.rejected is not None:
            self.rejected_chars_N[index] = len(extract_row_texts(row.example.rejected).answer)
        self.json_kind_N[index] = _classify_json(answer)
        if self.languages_PN is not None and self.is_sampled_N[index]:
            for part, text in enumerate(self.extract_parts(row)):
                guess = language_id.guess_language(text)
                self.languages_PN[part, index], self.is_clear_PN[part, index] = guess

    def extract_parts(self, row: RowTexts) -> tuple[str, str]:
        """Return the texts whose languages are guessed: the prompt without what many prompts
        share, and the answer, empty if it is JSON."""
        lines = [line for line in row.prompt.splitlines() if line.strip() not in self.common_lines]
        is_json = _classify_json(row.answer.strip()) != NO_JSON
        return "\n".join(lines), "" if is_json else row.answer


@dataclass(frozen=True, eq=False)
class TextStats:
    roles: Mapping[str, RoleTextStats]
    near_duplicates: NearDuplicates | None  # None without datasketch
    ngram_overlaps: Mapping[str, NgramOverlap]  # of the held-out roles


def compute_digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _classify_json(answer: str) -> int:
    if not answer.startswith(("{", "[")) or has_more_values(answer, MAX_TEXT_VALUES):
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
    """Return uint64, ascending: n-grams that many rows of a role share, such as those of its
    instruction."""
    role_grams = [np.empty(0, dtype=np.uint64)]
    for dataset in datasets.values():
        _, unique_rows = np.unique(dataset.contents_N, return_index=True)
        if len(unique_rows) <= COMMON_ROWS:
            continue  # too few to share any
        sample = unique_rows[permute_rows(0, 0, len(unique_rows))[:SAMPLE_ROWS]]
        texts = [extract_row_texts(dataset.read_example(row)) for row in sample.tolist()]
        grams = [hash_unique_ngrams(row.words, n) for row in texts]
        values, counts = np.unique(np.concatenate(grams), return_counts=True)
        role_grams.append(values[counts > max(COMMON_ROWS, COMMON_SHARE * len(sample))])
    return np.unique(np.concatenate(role_grams))


def find_common_lines(dataset: Dataset) -> frozenset[str]:
    """Return the lines that many prompts share."""
    sample = permute_rows(0, 0, len(dataset))[:SAMPLE_ROWS].tolist()
    counts: Counter[str] = Counter()
    for index in sample:
        prompt = extract_row_texts(dataset.read_example(index)).prompt
        counts.update({line.strip() for line in prompt.splitlines()})
    limit = max(COMMON_ROWS, COMMON_SHARE * len(sample))
    return frozenset(line for line, count in counts.items() if count > limit)


def extract_ngrams(row: RowTexts, common: np.ndarray) -> np.ndarray:
    """Return the shingles of a row that are not in `common`, or all if there are no others."""
    grams = hash_unique_ngrams(row.words, SHINGLE_WORDS)
    row_grams = exclude_values(grams, common)
    return row_grams if len(row_grams) else grams


def compute_text_stats(
    datasets: Mapping[str, Dataset], checks: Mapping[str, RowFinder]
) -> TextStats:
    """Read all rows once, after held-out rows were read to index their n-grams."""
    trained_roles = [role for role in TRAINED_ROLES if role in datasets]
    trained_contents = np.concatenate([datasets[role].contents_N for role in trained_roles])
    common = find_common_ngrams(datasets, NGRAM_WORDS)
    indexes: dict[str, NgramIndex] = {}
    for role, dataset in datasets.items():
        if role not in TRAINED_ROLES:
            indexes[role] = NgramIndex((row.words for row in iter_rows(dataset)), common)
    stats_pass = _StatsPass(datasets, indexes, checks)
    role_stats = {role: stats_pass.read_role(role) for role in datasets}
    overlaps = {role: index.compute_overlap(trained_contents) for role, index in indexes.items()}
    return TextStats(role_stats, stats_pass.find_near_duplicates(), overlaps)


class _StatsPass:
    """State of the pass over all rows."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        indexes: Mapping[str, NgramIndex],
        checks: Mapping[str, RowFinder],
    ) -> None:
        self.datasets = datasets
        self.indexes = indexes
        self.checks = checks
        self.common = find_common_ngrams(datasets, SHINGLE_WORDS)
        self.bands: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.earlier_contents = np.empty(0, dtype=np.uint64)  # digests of the roles read so far
        try:
            self.min_hasher = MinHasher()
        except ImportError:
            self.min_hasher = None

    def read_role(self, role: str) -> RoleTextStats:
        dataset = self.datasets[role]
        stats = RoleTextStats.make_empty(len(dataset), find_common_lines(dataset))
        is_hashed_N = self._mark_new_rows(dataset)
        bands_NB = np.zeros((len(dataset) if self.min_hasher else 0, NUM_BANDS), dtype=np.uint64)
        for index, row in enumerate(iter_rows(dataset)):
            stats.record_row(index, row)
            for name, find_matches in self.checks.items():
                if matches := dict(find_matches(row)):
                    counts = stats.check_counts.setdefault(name, CheckCounts())
                    counts.add_row(row.example.id, matches)
            if role in TRAINED_ROLES:
                for ngram_index in self.indexes.values():
                    ngram_index.mark_trained(row.words)
            if self.min_hasher and is_hashed_N[index]:
                grams = extract_ngrams(row, self.common)
                is_hashed_N[index] = len(grams) > 0
                bands_NB[index] = self.min_hasher.compute_bands(grams)
        if self.min_hasher:
            self.bands[role] = np.flatnonzero(is_hashed_N), bands_NB[is_hashed_N]
        return stats

    def _mark_new_rows(self, dataset: Dataset) -> np.ndarray:
        """Return whether each row is the first with its content, in all roles read so far."""
        is_new_N = np.zeros(len(dataset), dtype=bool)
        is_new_N[np.unique(dataset.contents_N, return_index=True)[1]] = True
        is_new_N &= ~np.isin(dataset.contents_N, self.earlier_contents)
        self.earlier_contents = np.union1d(self.earlier_contents, dataset.contents_N)
        return is_new_N

    def find_near_duplicates(self) -> NearDuplicates | None:
        if self.min_hasher is None:
            return None
        return find_near_duplicates(self.bands, self._read_ngrams)

    def _read_ngrams(self, role: str, row: int) -> np.ndarray:
        example = self.datasets[role].read_example(row)
        return extract_ngrams(extract_row_texts(example), self.common)
