"""`make evidence-quick`: each experiment of the book of claims runs, measures what its first claim
compares, and is on the page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiment_modules import import_module

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_parts_of_all_experiments_work() -> None:
    definitions = import_module("experiments.definitions")
    run = import_module("experiments.run")
    command = [sys.executable, "-m", "experiments.run", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (run.QUICK_WORK / "evidence.md").read_text()
    for experiment in definitions.load_experiments():
        stored = run.load_results(run.QUICK_WORK / "results" / experiment.name / run.RESULTS_FILE)
        assert stored, experiment.name
        assert not any(each.run.failure for each in stored), experiment.name
        assert f"## {experiment.rule} {experiment.title}" in page
    assert "not run yet" not in page
