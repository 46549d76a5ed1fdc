"""Which rehearsal rows go with which step: general rows trained beside the data, so that less is forgotten.

    rows, seed, ratio -> Rehearsal; rehearsal.documents_of(step) -> documents

The ratio is of tokens, not of rows: of all tokens up to any step, rehearsal has its share, up to half a row. What goes
with a step is a pure function of the step, the seed and the changes of the ratio so far; nothing is kept. A pass over
the rows takes each once, in an order of its own. A long text gives one piece a pass, and the next piece in the next.
Rows count by their bytes, which are known without reading them: tokens are in proportion to bytes. Left out: the ratio
(plan/rehearsal.py), and whether the rows may be used (contamination.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from tunesmith.core.types import Document
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import Changes, Passes, spans
from tunesmith.data.windows import window, window_counts

NAME = "rehearsal"  # role of the rows, task of their documents
PASSES = 2**32  # added to the number of a pass, so that its order is none of the data's epochs


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """M rows, taken in passes. A place counts rows over all passes."""

    rows: Dataset
    passes: Passes  # of the rows, with about how many tokens each gives in a pass
    length: int  # tokens of a piece at most
    step_tokens: float  # of the data, in a step; of the whole step where it takes the place of data
    ratio: float  # share of all tokens, from the first step on
    replaces: bool

    @classmethod
    def of(
        cls,
        rows: Dataset,
        *,
        tokens: int,
        length: int,
        step_tokens: float,
        ratio: float,
        seed: int,
        replaces: bool = False,
    ) -> Rehearsal:
        """`tokens`: of all rows, uncut."""
        bytes_M = np.array([rows.row_bytes(i) for i in range(len(rows))], dtype=np.float64)
        tokens_M = bytes_M * (tokens / bytes_M.sum())
        passes = Passes(tokens_M / window_counts(tokens_M, length), seed, PASSES)
        return cls(rows, passes, length, step_tokens, ratio, replaces)

    def documents_of(self, step: int, changes: Changes = ()) -> list[Document]:
        """The rehearsal documents of step 1.. ; most steps of a small ratio have none."""
        places = range(*(self.passes.taken(self._due(done, changes)) for done in (step - 1, step)))
        return [document for place in places for document in self._documents(place)]

    def _due(self, step: int, changes: Changes) -> float:
        """Rehearsal tokens up to `step`: ratio / (1 - ratio) for each token of the data, or ratio of every token."""
        return sum(
            steps * self.step_tokens * (ratio if self.replaces else ratio / (1 - ratio))
            for steps, ratio in spans(step, self.ratio, changes)
        )

    def _documents(self, place: int) -> list[Document]:
        number, row = self.passes.item(place)
        found = [dataclasses.replace(document, task=NAME) for document in self.rows.documents(row)]
        if self.rows.part(row).format == "text":
            return [_piece(document, self.length, number + row) for document in found]
        return [document for document in found if len(document) <= self.length]


def _piece(document: Document, length: int, turn: int) -> Document:
    """One of the windows of a text, another one each turn."""
    return window(document, length, turn % int(window_counts(len(document), length)))
