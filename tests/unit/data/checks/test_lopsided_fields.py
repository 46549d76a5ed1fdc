"""`data check` warns of fields for which a constant would score well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tunesmith
from tiny_runs import make_chat_row, write_rows
from tunesmith.core.types import Finding

Answer = Callable[[int], object]


def check(folder: Path, model: Path, answer: Answer, count: int = 40) -> list[Finding]:
    rows = [make_chat_row(f"question {index}", json.dumps(answer(index))) for index in range(count)]
    path = write_rows(folder / "rows.jsonl", rows)
    reports = tunesmith.data_check({"model": str(model), "data": str(path)})
    return [finding for finding in reports["data"].findings if finding.check == "lopsided"]


def test_a_lopsided_field_is_named_with_its_share_and_rows(
    tmp_path: Path, tiny_folder: Path
) -> None:
    (finding,) = check(tmp_path, tiny_folder, lambda index: {"id": index, "flag": index % 10 == 3})
    assert finding.level == "warn"
    assert finding.message == (
        "flag is false in 90.0% of the rows (36 of 40): a constant would score well"
    )
    assert finding.rows == tuple(f"rows.jsonl:{row}" for row in (4, 14, 24, 34))
    assert "errors by expected value" in finding.fix


@pytest.mark.parametrize(
    "answer",
    [
        lambda index: {"id": index, "flag": index % 4 == 0},  # 75%
        lambda index: {"id": index, "flag": True},  # a constant is right
        lambda index: {"id": index, **({"rare": 1} if index < 3 else {})},  # hardly any rows
        lambda index: "a" if index else "b",  # a label
    ],
)
def test_what_is_not_lopsided_is_not_named(
    answer: Answer, tmp_path: Path, tiny_folder: Path
) -> None:
    assert check(tmp_path, tiny_folder, answer) == []


def test_few_rows_say_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    assert check(tmp_path, tiny_folder, lambda index: {"flag": index == 3}, count=10) == []


def test_many_lopsided_fields_are_counted(tmp_path: Path, tiny_folder: Path) -> None:
    findings = check(
        tmp_path,
        tiny_folder,
        lambda index: {f"\x1b[2J{name}": index % 20 == name for name in range(12)},
    )
    assert len(findings) == 6
    assert findings[-1].message == "7 more fields have one value in over 80% of the rows"
    assert "\x1b" not in "".join(finding.message for finding in findings)
