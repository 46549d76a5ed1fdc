"""The verbs of the command line that run: `demo`, `train`, `resume`, and `report`, the page that
they leave.

Each is a function as in cli.py, where the table of all verbs is. Imports stand inside the
functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api, dataverbs
from tunesmith.cli.args import (
    AllowCode,
    AsJson,
    RecipeArgs,
    RunArg,
    parse_recipe_args,
    print_result,
)
from tunesmith.core.errors import GateError, TunesmithError
from tunesmith.core.events import Event
from tunesmith.core.run_dir import is_run, is_staged

TrackOption = Annotated[
    str | None,
    typer.Option(
        metavar="TRACKER", help="Send the events to tensorboard or wandb, too.", show_default=False
    ),
]


def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="The run folder; else runs/demo-N.", show_default=False)
    ] = None,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on the embedded example: look, plan, prove, measure, train, measure again."""
    from tunesmith.cli.views.tables import render_data, render_plan
    from tunesmith.recipe.demo import NUM_PREVIEW_ROWS

    inputs = api.load_demo_inputs(output_dir)
    run_plan = api.plan(inputs)
    if not as_json:
        print_result(
            None,
            render_data(run_plan.data),
            *dataverbs.data_show(inputs, rows=NUM_PREVIEW_ROWS),
            as_json=False,
        )
        print_result(None, render_plan(run_plan), as_json=False)
    events = api.train(run_plan, inputs)
    _show_run(events, Path(run_plan["output_dir"]), run_plan.steps, track=track, as_json=as_json)


def train(
    args: RecipeArgs = None,
    allow_code: AllowCode = False,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """Plan, prove, measure, train, measure again; all in one run folder."""
    inputs = api.load_inputs(parse_recipe_args(args))
    run_plan = api.plan(inputs)
    events = api.train(run_plan, inputs, allow_code=allow_code)
    _show_run(events, Path(run_plan["output_dir"]), run_plan.steps, track=track, as_json=as_json)


def resume(
    folder: RunArg,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-drift", help="Go on though data, model, recipe or libraries have changed."
        ),
    ] = False,
    checkpoint: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint to go on from; else the newest valid one.", show_default=False
        ),
    ] = None,
    allow_code: AllowCode = False,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was interrupted, after its last checkpoint."""
    events = api.resume(
        folder, allow_drift=allow_changes, from_step=checkpoint, allow_code=allow_code
    )
    _show_run(events, folder, api.read_plan(folder).steps, track=track, as_json=as_json)


def report(
    folder: RunArg,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to write it; else RUN/report.html.", show_default=False
        ),
    ] = None,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: one file that needs no network, finished or not."""
    report_path = api.write_report(folder, out=out)
    if track is not None:
        from tunesmith.report.trackers import send_events

        send_events(folder, track)
    print_result({"report": str(report_path)}, str(report_path), as_json=as_json)


# ---------------------------------------------------------------- what verbs share


def _show_run(
    events: Iterable[Event], folder: Path, steps: int, *, track: str | None, as_json: bool
) -> None:
    """Show a run as it goes, then its record."""
    from tunesmith.cli.progress import Progress
    from tunesmith.cli.views.tables import render_run_record

    with _tracking(folder, track), Progress(steps) as progress:
        try:
            for event in events:
                progress.show_event(event)
        except GateError:
            write_page(folder)
            raise
    record = api.read_record(folder)
    if not is_staged(folder):  # a sum over stages says nothing of a plan
        api.record_run_history(record)  # this process has held nothing but the run
    print_result(record, render_run_record(record), as_json=as_json)
    write_page(folder)


@contextmanager
def _tracking(folder: Path, track: str | None) -> Iterator[None]:
    """A tracker that fails is one warning, and nothing to the run."""
    if track is None:
        yield
        return
    from tunesmith.report.trackers import TrackerProcess

    tracker = TrackerProcess(folder, track)
    try:
        with tracker:
            yield
    finally:
        if tracker.problem:
            retry_command = f"tunesmith report {folder} --track {track}"
            sys.stderr.write(
                f"warning: {track} has not got everything: {tracker.problem}; later: {retry_command}\n"
            )


def write_page(folder: Path) -> None:
    """The page of a run. A run is what it is without one, and without the package that makes it."""
    if find_spec("tunesmith.report") is None or not is_run(folder):
        return
    try:
        sys.stderr.write(f"report: {api.write_report(folder)}\n")
    except TunesmithError as error:
        sys.stderr.write(f"warning: no report: {error}\n")
