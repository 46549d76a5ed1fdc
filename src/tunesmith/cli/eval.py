"""The verbs of the command line that measure models and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api
from tunesmith.cli.args import AllowCode, AsJson, print_result
from tunesmith.core.errors import GateError, InputError

MODEL_REF_HELP = "a run, RUN@0.5, RUN/checkpoints/step-N, an adapter, a model"
TargetArg = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help=f"What to measure: {MODEL_REF_HELP}.", show_default=False
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Rows to measure on, instead of the run's own.", show_default=False
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Metrics instead of the run's: 'chrf, numeric: 0.1'."),
]


def evaluate(
    target: TargetArg,
    data: DataOption = None,
    metrics: MetricsOption = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 4 if worse than before, or much is forgotten.")
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="What `never` came to, beside a told base and banned tokens."
        ),
    ] = False,
    relearning: Annotated[
        bool,
        typer.Option(
            "--recovery", help="Is what general text lost gone, or back after texts of its domain?"
        ),
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run again, or a base, an adapter or a checkpoint on a file: before and after on the
    same items."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.forgetting import format_relearning
    from tunesmith.cli.views.tables import (
        render_baselines,
        render_comparisons,
        render_gates,
        render_scores,
    )

    exclusive_flags = [
        name for name, is_set in (("--baselines", baselines), ("--recovery", relearning)) if is_set
    ]
    if len(exclusive_flags) > 1 or (exclusive_flags and (data or metrics or gate)):
        raise InputError(
            f"{exclusive_flags[0]} goes with a run alone",
            where="command line",
            fix="leave the others out",
        )
    if baselines:
        baseline_results = measuring()(api.evaluate_baselines)(target, allow_code=allow_code)
        print_result(
            {"baselines": baseline_results}, render_baselines(baseline_results), as_json=as_json
        )
        return
    if relearning:
        changes = measuring()(api.measure_relearning)(target)
        print_result(
            {"recovery": changes},
            render_comparisons(changes),
            *format_relearning(changes),
            as_json=as_json,
        )
        return
    report = measuring()(api.evaluate_full)(
        target, data=data, metrics=metrics, allow_code=allow_code
    )
    view = (
        render_comparisons(report.comparisons)
        if report.comparisons
        else render_scores(report.scores)
    )
    gate_results = report.check_gates() if gate else ()
    output = {
        "scores": report.scores,
        "comparisons": report.comparisons,
        **({"gates": gate_results} if gate else {}),
    }
    print_result(output, view, *([render_gates(gate_results)] if gate else []), as_json=as_json)
    if failed := [gate_result.name for gate_result in gate_results if not gate_result.passed]:
        raise GateError(f"not passed: {', '.join(failed)}", where=target)


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help=f"{MODEL_REF_HELP}, base, or a JSONL file of answers."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; the change is from A to B.")],
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Two models on the same items, item by item: what differs, and whether that is more than
    chance."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.tables import render_model_comparison

    comparison = measuring()(api.compare)(a, b, allow_code=allow_code)
    print_result(comparison, render_model_comparison(comparison), as_json=as_json)
