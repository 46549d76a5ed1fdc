"""`doctor` tries the C compiler: one that cannot compile is not ok."""

from __future__ import annotations

import pytest

from tunesmith import api


def test_a_compiler_that_cannot_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    checks = {check.name: check for check in api.doctor().checks}
    assert not checks["C compiler"].is_ok
    assert checks["C compiler"].value == "/bin/false cannot compile: exit code 1"
