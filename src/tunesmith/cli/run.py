"""The verbs of the command line that run: `demo`, `train`, `resume`, and `report`, the page that they leave.

Each is a function as in cli.py, where the table of all verbs is. Imports stand inside the functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api, dataverbs
from tunesmith.cli.args import AllowCode, AsJson, Run, Wish, read_wish, say
from tunesmith.core.errors import GateError, TunesmithError
from tunesmith.core.events import Event
from tunesmith.core.run_dir import is_run, is_staged

Track = Annotated[
    str | None,
    typer.Option(metavar="TRACKER", help="Send the events to tensorboard or wandb, too.", show_default=False),
]


def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="The run folder; else runs/demo-N.", show_default=False)
    ] = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on the embedded example: look, plan, prove, measure, train, measure again."""
    from tunesmith.cli.views.tables import data_view, plan_table
    from tunesmith.recipe.demo import SHOWN_ROWS

    known = api.demo_facts(output_dir)
    decided = api.plan(known)
    if not as_json:
        say(None, data_view(decided.data), *dataverbs.data_show(known, rows=SHOWN_ROWS), as_json=False)
        say(None, plan_table(decided), as_json=False)
    events = api.train(decided, known)
    _follow(events, Path(decided["output_dir"]), decided.steps, track=track, as_json=as_json)


def train(wish: Wish = None, allow_code: AllowCode = False, track: Track = None, as_json: AsJson = False) -> None:
    """Plan, prove, measure, train, measure again; all in one run folder."""
    known = api.gather(read_wish(wish))
    decided = api.plan(known)
    events = api.train(decided, known, allow_code=allow_code)
    _follow(events, Path(decided["output_dir"]), decided.steps, track=track, as_json=as_json)


def resume(
    folder: Run,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Go on though data, model, recipe or libraries have changed.")
    ] = False,
    from_step: Annotated[
        int | None, typer.Option(help="The checkpoint to go on from; else the newest valid one.", show_default=False)
    ] = None,
    allow_code: AllowCode = False,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was interrupted, after its last checkpoint."""
    events = api.resume(folder, allow_drift=allow_drift, from_step=from_step, allow_code=allow_code)
    _follow(events, folder, api.read_plan(folder).steps, track=track, as_json=as_json)


def report(
    folder: Run,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; else RUN/report.html.", show_default=False)
    ] = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: one file that needs no network, finished or not."""
    place = api.write_report(folder, out=out)
    if track is not None:
        from tunesmith.report.trackers import send

        send(folder, track)
    say({"report": str(place)}, str(place), as_json=as_json)


# ---------------------------------------------------------------- what verbs share


def _follow(events: Iterable[Event], folder: Path, steps: int, *, track: str | None, as_json: bool) -> None:
    """Show a run as it goes, then its record."""
    from tunesmith.cli.progress import Progress
    from tunesmith.cli.views.tables import record_view

    with _tracked(folder, track), Progress(steps) as progress:
        try:
            for event in events:
                progress.show(event)
        except GateError:
            write_page(folder)
            raise
    record = api.read_record(folder)
    if not is_staged(folder):  # a sum over stages says nothing of a plan
        api.remember(record)  # this process has held nothing but the run
    say(record, record_view(record), as_json=as_json)
    write_page(folder)


@contextmanager
def _tracked(folder: Path, track: str | None) -> Iterator[None]:
    """A tracker that fails is one warning, and nothing to the run."""
    if track is None:
        yield
        return
    from tunesmith.report.trackers import Tracked

    tracked = Tracked(folder, track)
    try:
        with tracked:
            yield
    finally:
        if tracked.problem:
            again = f"tunesmith report {folder} --track {track}"
            sys.stderr.write(f"warning: {track} has not got everything: {tracked.problem}; later: {again}\n")


def write_page(folder: Path) -> None:
    """The page of a run. A run is what it is without one, and without the package that makes it."""
    if find_spec("tunesmith.report") is None or not is_run(folder):
        return
    try:
        sys.stderr.write(f"report: {api.write_report(folder)}\n")
    except TunesmithError as error:
        sys.stderr.write(f"warning: no report: {error}\n")
