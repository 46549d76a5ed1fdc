"""Attention over stored keys equals plain attention over the whole row."""

import pytest
import torch
from torch import nn

from tunesmith.model.attention import Rule, reference
from tunesmith.model.cache import BLOCK, RowCache
from tunesmith.types import Layout

HEADS, GROUPS, SIZE = 6, 2, 8
RULES = {
    "plain": Rule(scale=0.3),
    "window": Rule(scale=0.3, window=4),
    "wide window": Rule(scale=0.3, window=500),
    "soft cap": Rule(scale=0.3, softcap=2.0),
    "both": Rule(scale=0.3, window=5, softcap=2.0),
}


class Rows:
    """Rows of random q, k, v of which the cache has seen the first `lengths`, and the answer for a whole row."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, 2 * BLOCK)
        self.q = torch.randn(*shape, HEADS, SIZE, generator=generator, dtype=torch.float64)
        self.k = torch.randn(*shape, GROUPS, SIZE, generator=generator, dtype=torch.float64)
        self.v = torch.randn(*shape, GROUPS, SIZE, generator=generator, dtype=torch.float64)

    def part(self, row: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        return self.q[row, start:end], self.k[row, start:end], self.v[row, start:end]

    def expected(self, row: int, start: int, end: int, rule: Rule) -> torch.Tensor:
        return reference(*self.part(row, 0, end), Layout((0,), (end,)), rule)[start:end]


def packed(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout]:
    lengths = tuple(len(q) for q, _, _ in parts)
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q, k, v, Layout(starts, lengths)


def extend(cache: RowCache, layer: nn.Module, rows: Rows, order: list[int], rule: Rule) -> None:
    """One step of all rows, checked against plain attention."""
    places = cache.advance(torch.device("cpu")).tolist()
    out = cache.attend(
        layer, *packed([rows.part(r, n, n + 1) for r, n in zip(order, places, strict=True)]), rule, "auto"
    )
    expected = [rows.expected(r, n, n + 1, rule) for r, n in zip(order, places, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lengths", [(3, 9, 1), (7, 7, 7)], ids=["ragged", "equal"])
def test_rows_join_and_leave_at_any_time(rule: Rule, lengths: tuple[int, ...]) -> None:
    rows, layer, cache = Rows(4), nn.Module(), RowCache(slots=3)
    cache.admit(lengths)
    out = cache.attend(layer, *packed([rows.part(r, 0, n) for r, n in enumerate(lengths)]), rule, "reference")
    torch.testing.assert_close(out, torch.cat([rows.expected(r, 0, n, rule) for r, n in enumerate(lengths)]))
    for _ in range(3):
        extend(cache, layer, rows, [0, 1, 2], rule)
    cache.drop(0)  # row 2 moves into its place
    extend(cache, layer, rows, [2, 1], rule)
    cache.admit([5])
    cache.attend(layer, *packed([rows.part(3, 0, 5)]), rule, "reference")
    for _ in range(BLOCK):  # the stores grow on the way
        extend(cache, layer, rows, [2, 1, 3], rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_shared_beginning_stands_before_every_row(rule: Rule) -> None:
    rows, layer, cache = Rows(2), nn.Module(), RowCache(slots=2)
    for x in (rows.q, rows.k, rows.v):
        x[1, :6] = x[0, :6]
    cache.admit([6])
    cache.attend(layer, *packed([rows.part(0, 0, 6)]), rule, "reference")
    cache.share()
    assert (cache.lengths, cache.shared) == ([], 6)
    cache.admit([4, 1])
    out = cache.attend(layer, *packed([rows.part(0, 6, 10), rows.part(1, 6, 7)]), rule, "reference")
    torch.testing.assert_close(out, torch.cat([rows.expected(0, 6, 10, rule), rows.expected(1, 6, 7, rule)]))
    for _ in range(3):
        extend(cache, layer, rows, [0, 1], rule)
