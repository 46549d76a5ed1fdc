"""`make effects`: what tests measure goes through pytest's report into a page."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiment_modules import import_module

iter_rows = import_module("benchmarks.effects").iter_rows
ROOT = Path(__file__).parents[3]
MEASURING_TEST = """
import pytest

@pytest.mark.parametrize(("method", "seed"), [("lora", 0), ("dora", 2)])
def test_loss_falls(method, seed, record_property):
    record_property("test loss", "-1.000 [-1.100, -0.900] n=40")
    assert method == "lora"
"""


@pytest.mark.promise
def test_the_report_of_a_test_run_becomes_rows_of_a_page(tmp_path: Path) -> None:
    file = tmp_path / "test_measuring.py"
    file.write_text(MEASURING_TEST)
    report = tmp_path / "report.xml"
    pytest_args = ["-c", str(ROOT / "pyproject.toml"), "-n0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-P", "-m", "pytest", *pytest_args, f"--junitxml={report}", file]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    measured = "test loss | -1.000 [-1.100, -0.900] n=40"
    assert sorted(iter_rows(report)) == [
        f"| loss falls (dora) | 2 | {measured} | failed |",
        f"| loss falls (lora) | 0 | {measured} | passed |",
    ]
