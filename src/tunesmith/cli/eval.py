"""The verbs of the command line that measure models and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api
from tunesmith.cli.args import AllowCode, AsJson, say
from tunesmith.core.errors import GateError, InputError

SIDES = "a run, RUN@0.5, RUN/checkpoints/step-N, an adapter, a model"
Target = Annotated[str, typer.Argument(metavar="TARGET", help=f"What to measure: {SIDES}.", show_default=False)]
Data = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Rows to measure on, instead of the run's own.", show_default=False)
]
Metrics = Annotated[
    str | None, typer.Option(metavar="LIST", help="Metrics instead of the run's: 'chrf, numeric: 0.1'.")
]


def evaluate(
    target: Target,
    data: Data = None,
    metrics: Metrics = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 4 if worse than before, or much is forgotten.")
    ] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="What `never` came to, beside a told base and banned tokens.")
    ] = False,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="Is what general text lost gone, or back after texts of its domain?")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run again, or a base, an adapter or a checkpoint on a file: before and after on the same items."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.forgetting import recovery_lines
    from tunesmith.cli.views.tables import baseline_table, comparison_table, gate_table, score_table

    asked = [name for name, given in (("--baselines", baselines), ("--recovery", recovery)) if given]
    if len(asked) > 1 or (asked and (data or metrics or gate)):
        raise InputError(f"{asked[0]} goes with a run alone", where="command line", fix="leave the others out")
    if baselines:
        found = measuring()(api.baselines)(target, allow_code=allow_code)
        say({"baselines": found}, baseline_table(found), as_json=as_json)
        return
    if recovery:
        changes = measuring()(api.recovery)(target)
        say({"recovery": changes}, comparison_table(changes), *recovery_lines(changes), as_json=as_json)
        return
    evaluated = measuring()(api.examine)(target, data=data, metrics=metrics, allow_code=allow_code)
    view = comparison_table(evaluated.comparisons) if evaluated.comparisons else score_table(evaluated.scores)
    judged = evaluated.gates() if gate else ()
    shown = {"scores": evaluated.scores, "comparisons": evaluated.comparisons, **({"gates": judged} if gate else {})}
    say(shown, view, *([gate_table(judged)] if gate else []), as_json=as_json)
    if failed := [one.name for one in judged if not one.passed]:
        raise GateError(f"not passed: {', '.join(failed)}", where=target)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{SIDES}, base, or a JSONL file of answers.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; the change is from A to B.")],
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Two models on the same items, item by item: what differs, and whether that is more than chance."""
    from tunesmith.cli.progress import measuring
    from tunesmith.cli.views.tables import compared_view

    compared = measuring()(api.compare)(a, b, allow_code=allow_code)
    say(compared, compared_view(compared), as_json=as_json)
