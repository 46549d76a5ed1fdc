"""Shared by the effect tests: every measured change goes into the test report with its interval."""

from collections.abc import Callable

import pytest

from effect_runs import Record
from tunesmith.core.types import Comparison


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Write a comparison into the report that `make effects` makes its table of."""

    def record_comparison(comparison: Comparison) -> None:
        change = f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"
        name = f"{comparison.task} {comparison.metric}"
        record_property(name, f"{change} n={comparison.after.n}")

    return record_comparison
