"""Fixtures of the effect tests: measured changes go into the test report with their intervals."""

from collections.abc import Callable

import pytest

from effect_seeds import Record
from tunesmith.core.types import Comparison


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Write a comparison into the report from which `make effects` makes its table."""

    def record_comparison(comparison: Comparison) -> None:
        change = f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"
        name = f"{comparison.task} {comparison.metric}"
        record_property(name, f"{change} n={comparison.after.n}")

    return record_comparison
