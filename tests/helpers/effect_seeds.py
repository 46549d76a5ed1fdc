"""Seeds of the effect tests, and the type of the fixture that records a measured change."""

from collections.abc import Callable

import pytest

from tunesmith.core.types import Comparison

# `make slow` runs the first seed, `make effects` all three.
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.more_seeds) for seed in (1, 2))]

Record = Callable[[Comparison], None]
