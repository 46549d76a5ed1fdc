"""A pytest plugin: hypothesis stops at the first failing example and seeks no smaller one.

In a mutation run only the fact counts that a test fails.
"""

from __future__ import annotations

import hypothesis

PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)


def pytest_collection() -> None:
    """Load the profile after conftest.py has loaded its own, before tests are imported."""
    hypothesis.settings.register_profile(
        "no shrink", deadline=None, phases=PHASES, database=None, derandomize=True
    )
    hypothesis.settings.load_profile("no shrink")
