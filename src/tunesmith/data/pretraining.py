"""Texts as windows of tokens, for continued pretraining.

    Dataset of texts -> open_corpus -> PretrainingCorpus -> read_window(i)
    tokens per step -> WindowSampler -> windows of a step
    tokenizer -> find_separator -> the token that ended each document when a model was pretrained

Every text is encoded once, in parts, into a temporary file. So the numbers of tokens and of steps
are exact, a window is one read, and memory holds only a few numbers per text. A text ends in the
EOS token; nothing else is added.

A long text is cut into windows of even length. Each window begins with the last token of the one
before, so every token of a text but the first is a target in exactly one window."""

from __future__ import annotations

import re
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.data.chat_template.render_notes import CONTROL_LIKE_TEXT
from tunesmith.data.dataset import NOT_RENDERED, Dataset
from tunesmith.data.length_stats import DatasetScan, iter_batches
from tunesmith.data.readers.invalid_row import InvalidRow, RejectedRows
from tunesmith.data.readers.local_file import TempCopy
from tunesmith.data.sampler import CyclicSampler, RatioChanges, iter_ratio_segments, prefetch
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

TOKEN_BYTES = 4
DENSE = "no white space"  # flag of rows with a very long run without white space
_DENSE_RUN = re.compile(r"[!-~]{10000}")  # ASCII only: some languages are written without spaces
_HALF_RUN_CHARS = 5000
_HALF_RUN = re.compile(rf"[!-~]{{{_HALF_RUN_CHARS}}}")

# (row, text, its tokens in parts)
EncodedText = tuple[int, str, Iterator[Sequence[int] | np.ndarray]]


# ---------------------------------------------------------------- windows of one text


def count_windows(tokens_N: Any, max_targets: int) -> Any:
    """Return the number of windows of texts with `tokens_N` tokens; for an array or one number.

    A window of t tokens has t - 1 targets."""
    return np.maximum(1, np.ceil((tokens_N - 1) / max_targets)).astype(np.int64)


def find_window(num_tokens: int, max_targets: int, index: int) -> tuple[int, int]:
    """Return (begin, end) of a window of a text with `num_tokens` tokens."""
    size = -(-(num_tokens - 1) // int(count_windows(num_tokens, max_targets)))
    return index * size, min(num_tokens, (index + 1) * size + 1)


def cut_window(document: Document, max_targets: int, index: int) -> Document:
    """Return a window of a document as a new document."""
    begin, end = find_window(len(document), max_targets, index)
    weights_L = document.weights_L[begin:end].copy()
    weights_L[0] = 0
    return replace(document, tokens_L=document.tokens_L[begin:end], weights_L=weights_L)


# ---------------------------------------------------------------- all texts


@dataclass(frozen=True, eq=False)
class PretrainingCorpus:
    """N encoded texts in W windows."""

    dataset: Dataset
    token_file: TempCopy
    starts_N: np.ndarray  # int64, offset of each text in the file, in tokens
    tokens_N: np.ndarray  # int64, 0 for a text that cannot be encoded
    max_targets: int  # per window
    flagged: Mapping[str, list[str]]  # DENSE or CONTROL_LIKE_TEXT -> row ids
    rejected_rows: RejectedRows  # rows that cannot be encoded

    @cached_property
    def firsts_N(self) -> np.ndarray:
        """int64 [N + 1]: index of the first window of each text, then W."""
        counts_N = np.where(self.tokens_N > 0, count_windows(self.tokens_N, self.max_targets), 0)
        return np.concatenate(([0], np.cumsum(counts_N)))

    def __len__(self) -> int:
        return int(self.firsts_N[-1])

    @cached_property
    def lengths_W(self) -> np.ndarray:
        """int64: tokens of each window."""
        counts_N = np.diff(self.firsts_N)
        has_windows_N = counts_N > 0
        counts_K = counts_N[has_windows_N]
        tokens_K = self.tokens_N[has_windows_N]
        sizes_K = -(-(tokens_K - 1) // counts_K)
        lengths_W = np.repeat(sizes_K + 1, counts_K)
        last_windows_K = self.firsts_N[1:][has_windows_N] - 1
        lengths_W[last_windows_K] = tokens_K - (counts_K - 1) * sizes_K
        return lengths_W

    def get_windows(self, row: int) -> range:
        """Return the indices of the windows of a text."""
        return range(int(self.firsts_N[row]), int(self.firsts_N[row + 1]))

    def read_window(self, index: int) -> Document:
        """Read window 0 .. W - 1. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row = int(np.searchsorted(self.firsts_N, index, side="right")) - 1
        index_in_text = index - int(self.firsts_N[row])
        begin, end = find_window(int(self.tokens_N[row]), self.max_targets, index_in_text)
        offset = TOKEN_BYTES * (int(self.starts_N[row]) + begin)
        raw = self.token_file.read(offset, TOKEN_BYTES * (end - begin))
        tokens_L = np.frombuffer(raw, dtype=np.int32)
        weights_L = np.full(len(tokens_L), self.dataset.get_part(row).weight, dtype=np.float32)
        weights_L[0] = 0
        return Document(self.dataset.get_id(row), tokens_L, weights_L)

    def build_scan(self) -> DatasetScan:
        """Return a scan of all rows for the data check; its documents are the windows."""
        flagged = {kind: ids for kind, ids in self.flagged.items() if kind == DENSE}
        notes = {kind: ids for kind, ids in self.flagged.items() if kind == CONTROL_LIKE_TEXT}
        return DatasetScan(
            rows_R=np.arange(len(self.dataset)),
            lengths_D=self.lengths_W,
            supervised_tokens=int(self.lengths_W.sum()) - len(self),
            num_truncated=0,
            dropped={},
            flagged=flagged,
            notes=notes,
            rejected_rows=self.rejected_rows,
            rare_rejected_rows=RejectedRows(),
            scanned_share=1,
        )


def open_corpus(dataset: Dataset, window_tokens: int) -> PretrainingCorpus:
    """Encode every text of a data set into windows of at most `window_tokens` tokens.

    Raises MachineError if the disk has no space for the temporary file."""
    token_file = TempCopy(Path(dataset.path), sys.maxsize)
    starts = array("q")
    ends = array("q")
    flagged: defaultdict[str, list[str]] = defaultdict(list)
    rejected_rows = RejectedRows()
    num_tokens = 0
    for row, text, parts in _iter_texts(dataset):
        row_id = dataset.get_id(row)
        starts.append(num_tokens)
        try:
            for part in parts:
                token_file.write(np.array(part, dtype=np.int32).tobytes())
                num_tokens += len(part)
        except InputError as error:
            problem = InvalidRow(NOT_RENDERED, error.message, where=row_id, fix=error.fix)
            rejected_rows.count(problem)
            ends.append(starts[-1])
            continue
        ends.append(num_tokens)
        if _is_dense(text):
            flagged[DENSE].append(row_id)
        if dataset.renderer.tokenizer.pattern.search(text):
            flagged[CONTROL_LIKE_TEXT].append(row_id)
    token_file.flush()
    starts_N = np.array(starts, dtype=np.int64)
    return PretrainingCorpus(
        dataset=dataset,
        token_file=token_file,
        starts_N=starts_N,
        tokens_N=np.array(ends) - starts_N,
        max_targets=window_tokens - 1,
        flagged=flagged,
        rejected_rows=rejected_rows,
    )


def _iter_texts(dataset: Dataset) -> Iterator[EncodedText]:
    """Encode every row; a batch is encoded on all cores while the one before is written."""

    def encode_batch(batch: list[int]) -> Iterator[EncodedText]:
        texts = [dataset.read_example(row).text or "" for row in batch]
        return zip(batch, texts, dataset.renderer.iter_texts_ids(texts), strict=True)

    batches = iter_batches(dataset, range(len(dataset)))
    yield from chain.from_iterable(prefetch(batches, encode_batch))


def _is_dense(text: str) -> bool:
    """Tell whether a text has a run of 10,000 characters without white space."""
    # Such a run contains half a run that begins at a multiple of 5,000, which is faster to find.
    starts = range(0, len(text), _HALF_RUN_CHARS)
    return any(_HALF_RUN.match(text, start) for start in starts) and bool(_DENSE_RUN.search(text))


@dataclass(frozen=True, eq=False)
class WindowSampler:
    """The windows of every step, from passes over all windows in random order.

    Of its `step_tokens` a step takes what rehearsal leaves, to within half a window. The last step
    takes the rest of the epochs; if the rehearsal ratio changes, the number of steps stays the
    same instead."""

    corpus: PretrainingCorpus
    sampler: CyclicSampler
    step_tokens: float
    total_tokens: float  # of all epochs
    rehearsal_ratio: float  # share of rehearsal, from the first step on

    @classmethod
    def from_corpus(
        cls,
        corpus: PretrainingCorpus,
        *,
        step_tokens: float,
        epochs: float,
        seed: int,
        rehearsal_ratio: float = 0,
    ) -> WindowSampler:
        """Build the sampler for a number of epochs."""
        sampler = CyclicSampler(corpus.lengths_W, seed)
        total_tokens = epochs * float(corpus.lengths_W.sum())
        return cls(corpus, sampler, step_tokens, total_tokens, rehearsal_ratio)

    def read_documents(self, step: int, ratio_changes: RatioChanges = ()) -> list[Document]:
        """Return the windows of step 1, 2, ...; none after the last epoch.

        A pure function of the texts and the arguments."""
        first = self.sampler.count_due_items(self._compute_due_tokens(step - 1, ratio_changes))
        last = self.sampler.count_due_items(self._compute_due_tokens(step, ratio_changes))
        windows = [self.sampler.get_item(position)[1] for position in range(first, last)]
        return [self.corpus.read_window(window) for window in windows]

    def _compute_due_tokens(self, step: int, ratio_changes: RatioChanges) -> float:
        """Return the number of tokens of the data up to `step`."""
        segments = iter_ratio_segments(step, self.rehearsal_ratio, ratio_changes)
        due_tokens = sum(steps * self.step_tokens * (1 - ratio) for steps, ratio in segments)
        return due_tokens if ratio_changes else min(self.total_tokens, due_tokens)


# ---------------------------------------------------------------- the token between documents

# The EOS token of a chat model ends answers and was set later; the separator is still in the
# vocabulary under its old name. So it is the first of the usual names that is a control token, else
# the EOS token.

# GPT-2 and NeoX, OLMo, Phi, Qwen, SmolLM, StarCoder; Llama 3, Granite; Gemma; Llama 2, Mistral;
# DeepSeek.
SEPARATOR_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


class SeparatorToken(NamedTuple):
    id: int
    text: str
    reason: str


def find_separator(tokenizer: ChatTokenizer) -> SeparatorToken:
    """Return the separator. Raises InputError for a tokenizer without one."""
    eos = tokenizer.special_tokens.get("eos_token", "")
    for name in SEPARATOR_TOKENS:
        if name in tokenizer.controls:
            eos_note = f"the EOS token, {eos}, ends answers" if eos else "no EOS token is set"
            if name == eos:
                eos_note = "the EOS token"
            reason = f"usual document separator; {eos_note}"
            return SeparatorToken(tokenizer.controls[name].id, name, reason)
    if tokenizer.eos_id is None:
        raise InputError(
            "the tokenizer has no token that ends a document",
            where="tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )
    reason = f"the EOS token; it has none of {', '.join(SEPARATOR_TOKENS)}"
    return SeparatorToken(tokenizer.eos_id, eos, reason)
