"""Ten thousand cases in a fixed time of the processor: rows, files, recipes, and sequences of step,
save and crash."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from test_recipe_fuzz import recipes_explored
from test_rows_fuzz import files_explored, rows_explored
from test_state_machine import sequences_explored

from tunesmith.data.chat_template.renderer import Renderer

SECONDS = 600


@pytest.mark.slow
def test_ten_thousand_cases(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most ten minutes of the processor, whatever else it does; a kind that is done early
    leaves its share."""
    renderer = Renderer.from_folder(tiny_folder, now=datetime(2026, 1, 1))
    kinds: dict[str, tuple[float, Callable[[float], dict[str, int]]]] = {
        "sequences": (0.4, lambda seconds: sequences_explored(100, seconds, steps=50)),
        "recipes": (0.5, lambda seconds: recipes_explored(2500, seconds)),
        "rows": (0.6, lambda seconds: rows_explored(4000, seconds, renderer)),
        "files": (1.0, lambda seconds: files_explored(4500, seconds, renderer)),
    }
    until, total = time.process_time() + SECONDS, 0
    for kind, (share, explored) in kinds.items():
        started = time.process_time()
        seen = explored((until - started) * share)
        cases = seen["sequences"] if kind == "sequences" else sum(seen.values())
        total += cases
        with capsys.disabled():
            sys.stdout.write(
                f"{kind}: {cases:,} in {time.process_time() - started:.0f} s, {dict(seen)}\n"
            )
        assert min(seen.values()) >= 100, kind
    assert total >= 10_000
