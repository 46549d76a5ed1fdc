import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.core.hardware import measure_machine, parse_version
from tunesmith.session import doctor
from tunesmith.session.doctor import diagnose


def test_a_healthy_machine(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path / "runs")
    assert diagnosis.is_ok, diagnosis.checks
    assert {check.name: check.value for check in diagnosis.checks}["write, fsync, rename"] == str(
        tmp_path
    )
    assert list(tmp_path.iterdir()) == []  # nothing left behind


@pytest.mark.parametrize(
    ("has_bf16", "value"), [(True, "bf16"), (False, "fp32: no bf16 in hardware")]
)
def test_a_cpu_says_what_it_computes_in(
    has_bf16: bool, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = replace(measure_machine(tmp_path), has_bf16_matmul=has_bf16)
    monkeypatch.setattr(doctor, "measure_machine", lambda _folder: machine)
    checks = {check.name: check for check in diagnose(tmp_path).checks}
    assert checks["precision"].value.startswith(value)
    assert checks["precision"].is_ok


def test_a_place_that_cannot_be_written() -> None:
    diagnosis = diagnose(Path("/proc/runs"))
    failed = [check for check in diagnosis.checks if not check.is_ok and check.is_required]
    assert [check.name for check in failed] == ["write, fsync, rename"]
    assert failed[0].fix
    assert not diagnosis.is_ok


def test_floors_are_compared_as_numbers() -> None:
    assert parse_version("2.13.0+cpu") > parse_version("2.6")
    assert parse_version("5.3.0rc1") == parse_version("5.3")


def test_extras_that_are_missing_are_named_with_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    declared = extras["project"]["optional-dependencies"]
    for extra, (packages, _) in doctor.EXTRAS.items():
        assert [re.split(r"[>=]", text)[0] for text in declared[extra]] == list(packages)
    assert set(declared) - set(doctor.EXTRAS) == {"dev", "mutation"}
    for module in ("bitsandbytes", "pyarrow", "fla"):
        monkeypatch.setitem(sys.modules, module, None)
    diagnosis = diagnose(tmp_path)
    failed = {check.name: check for check in diagnosis.checks if check.name.startswith("extra")}
    assert failed["extra qlora"].value == "bitsandbytes not installed"
    assert (
        "pip install '.[qlora]' in tunesmith's folder for method: qlora"
        in failed["extra qlora"].fix
    )
    assert not failed["extra parquet"].is_ok
    assert failed["extra fla"].value == "fla-core not installed"
    assert failed["extra audit"].is_ok
