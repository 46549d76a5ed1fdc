"""Rehearsal: general rows trained together with the data, to reduce forgetting.

    rows, seed, ratio -> RehearsalSampler -> rehearsal documents of a step

The ratio is a share of tokens, not of rows: of all tokens up to any step, rehearsal has its share,
up to half a row. The documents of a step are a pure function of the step, the seed and the changes
of the ratio so far; there is no state. Each pass takes every row once, in its own order. A long
text gives one window per pass, and the next window in the next pass. The tokens of a row are
estimated from its bytes, which are known without rendering it. Left out: the ratio
(plan/rehearsal.py), and leakage of held-out rows (golden_set.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from tunesmith.core.types import Document
from tunesmith.data.dataset import Dataset
from tunesmith.data.pretraining import count_windows, cut_window
from tunesmith.data.sampler import CyclicSampler, RatioChanges, iter_ratio_segments

REHEARSAL_ROLE = "rehearsal"  # role of the rows, and task of their documents
FIRST_PASS = 2**32  # so that no pass has the order of an epoch of the data


@dataclass(frozen=True, eq=False)
class RehearsalSampler:
    """M rehearsal rows, sampled in passes."""

    dataset: Dataset
    sampler: CyclicSampler  # its items are the rows, with their estimated tokens per pass
    max_tokens: int  # per document or window
    step_tokens: float  # of the data in a step; if it replaces data, of the full step
    ratio: float  # share of all tokens, from the first step on
    should_replace_data: bool

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        total_tokens: int,
        max_tokens: int,
        step_tokens: float,
        ratio: float,
        seed: int,
        should_replace_data: bool = False,
    ) -> RehearsalSampler:
        """Build the sampler; `total_tokens` counts all rows in full length."""
        bytes_M = np.array(
            [dataset.get_row_bytes(i) for i in range(len(dataset))], dtype=np.float64
        )
        tokens_M = bytes_M * (total_tokens / bytes_M.sum())
        sampler = CyclicSampler(tokens_M / count_windows(tokens_M, max_tokens), seed, FIRST_PASS)
        return cls(dataset, sampler, max_tokens, step_tokens, ratio, should_replace_data)

    def read_documents(self, step: int, ratio_changes: RatioChanges = ()) -> list[Document]:
        """Return the rehearsal documents of step 1, 2, ...; at a small ratio most steps have none.

        `ratio_changes` are those before this step."""
        first = self.sampler.count_due_items(self._compute_due_tokens(step - 1, ratio_changes))
        last = self.sampler.count_due_items(self._compute_due_tokens(step, ratio_changes))
        documents: list[Document] = []
        for position in range(first, last):
            pass_index, row = self.sampler.get_item(position)
            documents += self.read_row(row, pass_index)
        return documents

    def _compute_due_tokens(self, step: int, ratio_changes: RatioChanges) -> float:
        """Return the number of rehearsal tokens up to `step`.

        Per token of the data that is ratio / (1 - ratio), or ratio if it replaces data."""
        segment_tokens: list[float] = []
        for steps, ratio in iter_ratio_segments(step, self.ratio, ratio_changes):
            token_ratio = ratio if self.should_replace_data else ratio / (1 - ratio)
            segment_tokens.append(steps * self.step_tokens * token_ratio)
        return sum(segment_tokens)

    def read_row(self, row: int, pass_index: int = 0) -> list[Document]:
        """Return the documents of a row as one pass trains them; none if they are too long."""
        is_text = self.dataset.get_part(row).format == "text"
        documents: list[Document] = []
        for document in self.dataset.render_documents(row):
            if is_text:
                num_windows = int(count_windows(len(document), self.max_tokens))
                document = cut_window(document, self.max_tokens, (pass_index + row) % num_windows)
            elif len(document) > self.max_tokens:
                continue
            documents.append(dataclasses.replace(document, task=REHEARSAL_ROLE))
        return documents
