"""The planned peak of each kind of layer beside attention, and of dense models, is within 15% of
that of a run in a process of its own."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise

ROOT = Path(__file__).parents[3]
KINDS = ("llama", "delta", "conv", "mamba2", "experts", "between")
TOLERANCE = 0.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_planned_peak_is_near_the_measured_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.train.memory_model import ROWS, compute_ratio, run_case, write_model

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(kind, tmp_path / kind)
    words, batch = ROWS[0]
    result = run_case(str(tmp_path / kind), "lora", words, batch)
    assert compute_ratio(result) == pytest.approx(1, abs=TOLERANCE)
