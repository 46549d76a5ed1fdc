"""Verbs that measure models: `eval` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith import api
from tunesmith.cli.args import AllowCode, AsJson
from tunesmith.cli.help import complete_runs
from tunesmith.cli.output import print_result
from tunesmith.core.errors import GateError


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            autocompletion=complete_runs,
            help="RUN, RUN@0.5, RUN/checkpoints/step-N, adapter or model.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Evaluate on this file, not the run's rows.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Metrics instead of the run's: 'chrf, numeric: 0.1'."),
    ] = None,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit with 4 if a metric fails its margin."),
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model before and after training, item by item."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.results import render_comparisons, render_gates, render_scores
    from tunesmith.cli.views.verdict import render_errors

    with measuring():
        report = api.evaluate(target, data=data, metrics=metrics, allow_code=allow_code)
    output: dict[str, Any] = {
        "scores": report.scores,
        "comparisons": report.comparisons,
        "errors": report.errors,
    }
    views = [
        render_comparisons(report.comparisons)
        if report.comparisons
        else render_scores(report.scores)
    ]
    if report.errors is not None:
        views.append(render_errors(report.errors))
    gates = report.check_gates() if gate else ()
    if gate:
        output["gates"] = gates
        views.append(render_gates(gates))
    print_result(output, *views, as_json=as_json)
    if failed := [result.name for result in gates if not result.passed]:
        raise GateError(f"failed: {', '.join(failed)}", where=target)


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="An eval TARGET, `base`, or a JSONL file of answers."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Same; differences are B minus A.")],
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models item by item, with significance tests."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.results import render_model_comparison

    with measuring():
        comparison = api.compare(a, b, allow_code=allow_code)
    print_result(comparison, render_model_comparison(comparison), as_json=as_json)
