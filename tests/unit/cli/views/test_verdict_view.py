"""What is still wrong, in the terminal: whole intervals in 80 columns, hostile names as text."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import RenderableType

from tunesmith.cli.output import TerminalConsole
from tunesmith.cli.views.verdict import MAX_ROWS, render_errors, render_verdict
from tunesmith.core.evidence import (
    Confusion,
    ErrorAnalysis,
    ErrorGroup,
    ErrorTable,
    NextStep,
    RunVerdict,
    Shortcut,
)

HOSTILE = "\x1b[2J[red]x[/]\u202e\r\nnext"
GROUP = ErrorGroup("new_upstream = true", 33, 33, 1.0, 0.9, 1.0, 33, 0, 90, ("test.jsonl:5",))


def render(view: RenderableType, width: int = 80) -> str:
    output = io.StringIO()
    TerminalConsole(file=output, width=width).print(view, highlight=False)
    return output.getvalue()


def make_analysis(*groups: ErrorGroup, by: str = "field") -> ErrorAnalysis:
    return ErrorAnalysis(
        "exact_match", True, 80, 35, 0, 35, 0, 0.44, 0.33, 0.55, 0.0, (ErrorTable(by, groups),)
    )


def test_a_row_has_its_interval_whole_in_80_columns() -> None:
    lines = render(render_errors(make_analysis(GROUP))).splitlines()
    assert lines[0].startswith("By exact_match: 45 of 80 answers are wrong (before 80; 35 fixed")
    (row,) = [line for line in lines if line.startswith("new_upstream = true")]
    assert row.split() == [
        *("new_upstream", "=", "true"),
        *("33", "33", "100%", "90-100%", "33", "90", "test.jsonl:5"),
    ]
    assert max(map(len, lines)) <= 80


def test_values_of_a_long_field_can_be_told_apart() -> None:
    name = "customer.address." + "part." * 20 + "country"
    groups = [replace(GROUP, name=f"{name} = {value}") for value in ("true", "false")]
    text = render(render_errors(make_analysis(*groups)), 120)
    assert text.count("customer.address.") == 2
    assert "untry = true " in text
    assert "untry = false " in text


def test_groups_without_errors_are_hidden_and_many_are_counted() -> None:
    right = replace(GROUP, name="right", wrong=0, rows=())
    groups = [replace(GROUP, name=f"field {index}") for index in range(30)]
    text = render(render_errors(make_analysis(*groups, right)))
    assert "right" not in text
    assert f"... and {30 - MAX_ROWS} more: --json" in text
    assert "Errors by field" not in render(render_errors(make_analysis(right)))


def test_labels_with_few_rows_have_counts_and_no_rates() -> None:
    few = replace(GROUP, name=HOSTILE, n=3, wrong=1, answered=2)
    weak = replace(few, name="net", n=9, wrong=3, answered=7, f1=(0.5, 0.2, 0.8))
    analysis = replace(
        make_analysis(),
        tables=(ErrorTable("label", (weak, *[few] * 6)),),
        confusions=(Confusion("", "net", None, 3),),
        other_answers={HOSTILE: 2},
    )
    text = render(render_errors(analysis), 80)
    assert re.search(r"net +6 of 7 +6 of 9 +0.50 \(0.20-0.80\)", text)
    assert re.search(r"2 of 2 +2 of 3 +too few", text)
    assert "... and 2 more: --json" in text
    assert re.search(r"net +no label +3", text)
    assert "no label: 3 of 80 answers, most often" in text
    assert not {"\x1b", "\u202e", "\r"} & set(text)


def test_names_of_two_models_head_the_columns() -> None:
    assert "(A 80; 35 fixed" in render(render_errors(make_analysis(GROUP), ("A", "B")))


@pytest.mark.parametrize("width", [80, 120])
def test_hostile_names_are_text_on_one_line(width: int) -> None:
    analysis = replace(
        make_analysis(replace(GROUP, name=HOSTILE * 50, rows=(HOSTILE,))),
        confusions=(Confusion(HOSTILE, HOSTILE, HOSTILE, 3),),
        shortcuts=(Shortcut(HOSTILE, HOSTILE, 80, 80, 40, 0.001, rows=(HOSTILE,)),),
    )
    verdict = RunVerdict(
        "harmful", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), (NextStep(HOSTILE, HOSTILE),)
    )
    for view in (render_errors(analysis), render_verdict(verdict)):
        text = render(view, width)
        assert not {"\x1b", "\u202e", "\r"} & set(text)
        assert "[red]" in text


def test_a_long_command_can_be_copied() -> None:
    command = "tunesmith train runs/demo-1/recipe.yaml --num-train-epochs 3 --output-dir runs/x-3"
    text = render(render_verdict(RunVerdict("no effect", "", next_steps=(NextStep("a", command),))))
    lines = [line.strip() for line in text.splitlines()[-2:]]
    assert lines[0].endswith(" \\")
    assert f"{lines[0][:-2]} {lines[1]}" == command
