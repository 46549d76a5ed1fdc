"""Which rehearsal rows go with which step: general rows trained beside the data, so that less is
forgotten.

    rows, seed, ratio -> Rehearsal; rehearsal.documents_of(step) -> documents

The ratio is of tokens, not of rows: of all tokens up to any step, rehearsal has its share, up to
half a row. What goes with a step is a pure function of the step, the seed and the changes of the
ratio so far; nothing is kept. A pass over the rows takes each once, in an order of its own. A long
text gives one piece a pass, and the next piece in the next. Rows count by their bytes, which are
known without reading them: tokens are in proportion to bytes. Left out: the ratio
(plan/rehearsal.py), and whether the rows may be used (contamination.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from tunesmith.core.types import Document
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import CyclicSampler, RatioChanges, iter_ratio_segments
from tunesmith.data.windows import count_windows, cut_window

REHEARSAL_ROLE = "rehearsal"  # role of the rows, task of their documents
FIRST_PASS = 2**32  # added to the number of a pass, so that its order is none of the data's epochs


@dataclass(frozen=True, eq=False)
class RehearsalSampler:
    """M rows, taken in passes. A place counts rows over all passes."""

    dataset: Dataset
    sampler: CyclicSampler  # of the rows, with about how many tokens each gives in a pass
    max_tokens: int  # tokens of a piece at most
    step_tokens: float  # of the data, in a step; of the whole step where it takes the place of data
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
        """`tokens`: of all rows, uncut."""
        bytes_M = np.array(
            [dataset.get_row_bytes(i) for i in range(len(dataset))], dtype=np.float64
        )
        tokens_M = bytes_M * (total_tokens / bytes_M.sum())
        sampler = CyclicSampler(tokens_M / count_windows(tokens_M, max_tokens), seed, FIRST_PASS)
        return cls(dataset, sampler, max_tokens, step_tokens, ratio, should_replace_data)

    def read_documents(self, step: int, ratio_changes: RatioChanges = ()) -> list[Document]:
        """The rehearsal documents of step 1.. ; most steps of a small ratio have none."""
        positions = range(
            *(
                self.sampler.count_due_items(self._compute_due_tokens(steps, ratio_changes))
                for steps in (step - 1, step)
            )
        )
        return [
            document for position in positions for document in self._read_row_documents(position)
        ]

    def _compute_due_tokens(self, step: int, ratio_changes: RatioChanges) -> float:
        """Rehearsal tokens up to `step`: ratio / (1 - ratio) for each token of the data, or ratio
        of every token."""
        return sum(
            steps * self.step_tokens * (ratio if self.should_replace_data else ratio / (1 - ratio))
            for steps, ratio in iter_ratio_segments(step, self.ratio, ratio_changes)
        )

    def _read_row_documents(self, position: int) -> list[Document]:
        pass_index, row = self.sampler.get_item(position)
        documents = [
            dataclasses.replace(document, task=REHEARSAL_ROLE)
            for document in self.dataset.render_documents(row)
        ]
        if self.dataset.get_part(row).format == "text":
            return [
                _pick_window(document, self.max_tokens, pass_index + row) for document in documents
            ]
        return [document for document in documents if len(document) <= self.max_tokens]


def _pick_window(document: Document, max_targets: int, turn: int) -> Document:
    """One of the windows of a text, another one each turn."""
    return cut_window(document, max_targets, turn % int(count_windows(len(document), max_targets)))
