"""Seeds of the effect tests: `make slow` runs the first, `make effects` all three."""

import pytest

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.more_seeds) for seed in (1, 2))]
