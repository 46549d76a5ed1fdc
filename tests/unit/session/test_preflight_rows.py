"""The rows that preflight reads: the first ones, and the shortest and the longest of the others."""

from types import SimpleNamespace

from tunesmith.session import session


class FakeRows:
    def __init__(self, sizes: list[int], max_size: int) -> None:
        self.sizes, self.max_size = sizes, max_size

    def __len__(self) -> int:
        return len(self.sizes)

    def get_row_bytes(self, index: int) -> int:
        return self.sizes[index]

    def render_row(self, index: int) -> tuple[None, SimpleNamespace]:
        is_dropped = self.sizes[index] > self.max_size
        return None, SimpleNamespace(documents=() if is_dropped else ("document",))


def test_the_longest_row_of_the_run_is_read_wherever_it_stands() -> None:
    sizes = [50] * 900
    sizes[870], sizes[400], sizes[333] = 900, 800, 700
    sizes[555], sizes[899] = 3, 5
    rows = FakeRows(sizes, max_size=850)
    extremes = session._find_extreme_rows(rows)  # type: ignore[arg-type]
    assert {400, 333, 555, 899} < set(extremes), "870 is dropped: over max_length"
    assert 870 not in extremes
    assert len(extremes) == 2 * session.EXTREME_ROWS


def test_few_rows_are_all_read_anyway() -> None:
    assert session._find_extreme_rows(FakeRows([5] * 200, 9)) == []  # type: ignore[arg-type]


def test_many_rows_over_the_length_do_not_hide_the_longest_usable_ones() -> None:
    """More rows without documents than are tried one by one, at the long end and at the short."""
    sizes = [50 + index for index in range(1000)]
    rows = FakeRows(sizes, max_size=50 + 789)
    extremes = session._find_extreme_rows(rows)  # type: ignore[arg-type]
    assert all(rows.render_row(index)[1].documents for index in extremes)
    assert {789, 788, session.PROBE_ROWS} <= set(extremes), "789 is the longest that is used"
    assert len(extremes) == 2 * session.EXTREME_ROWS


def test_rows_that_are_all_over_the_length_end_the_search() -> None:
    assert session._find_extreme_rows(FakeRows([50] * 1000, max_size=9)) == []  # type: ignore[arg-type]
