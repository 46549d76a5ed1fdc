"""Verbs on runs: `demo`, `train`, `resume`, `report` and `runs`, which lists them.

Each verb is a function; cli/app.py has the table. Imports are inside the functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api
from tunesmith.cli.args import (
    AllowCode,
    AsJson,
    RecipeArgs,
    RunArg,
    parse_recipe_args,
)
from tunesmith.cli.help import option, switch
from tunesmith.cli.launch import GpusOption, launch, list_flags, main_rank
from tunesmith.cli.output import TerminalConsole, print_result, write_stderr
from tunesmith.core.errors import GateError, InputError, TunesmithError
from tunesmith.core.events import Event
from tunesmith.core.run_dir import RUNS_ROOT, is_run
from tunesmith.core.types import Plan
from tunesmith.plan.stages import StagedPlan

WATCH_SECONDS = 1.0  # between two readings of the folders
MAX_SHOWN_RUNS = 100  # without --all

TrackOption = Annotated[str | None, option("TRACKER", "Also log to tensorboard or wandb.")]


def demo(
    output_dir: Annotated[
        Path | None, option("FOLDER", "Run folder; runs/demo-N by default.")
    ] = None,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """Run the embedded example from data check to report."""
    from tunesmith.cli.views.data import render_data
    from tunesmith.cli.views.plan import render_plan
    from tunesmith.recipe.demo import NUM_PREVIEW_ROWS

    inputs = api.load_demo_inputs(output_dir)
    run_plan = api.plan(inputs)
    if not as_json:
        preview = api.data_show(inputs, rows=NUM_PREVIEW_ROWS)
        print_result(None, render_data(run_plan.data), *preview, as_json=False)
        print_result(None, render_plan(run_plan), as_json=False)
    events = api.train(run_plan, inputs)
    run_dir = Path(run_plan.config.output_dir)
    _show_run(events, run_dir, run_plan.steps, track=track, as_json=as_json)


def train(
    args: RecipeArgs = None,
    allow_code: AllowCode = False,
    track: TrackOption = None,
    gpus: GpusOption = None,
    as_json: AsJson = False,
) -> None:
    """Plan, check, train and measure a recipe in one run folder."""
    if gpus is not None:
        flags = list_flags(allow_code=allow_code, track=track, json=as_json)
        raise typer.Exit(launch(gpus, ["train", *(args or ()), *flags]))
    read_recipe = cache(partial(parse_recipe_args, args))  # which says once what it takes
    with main_rank(read_recipe) as ranks:
        inputs = api.load_inputs(read_recipe())
        run_plan = api.plan(inputs)
        run_dir = Path(run_plan.config.output_dir)
        if interrupted := api.find_interrupted_run(run_plan, ranks):
            run_dir = interrupted
            events = api.resume(run_dir, allow_code=allow_code, ranks=ranks)
        else:
            _warn_of_plan(run_plan)
            events = api.train(run_plan, inputs, allow_code=allow_code, ranks=ranks)
        _show_run(events, run_dir, run_plan.steps, track=track, as_json=as_json)


def resume(
    folder: RunArg,
    allow_changes: Annotated[
        bool, switch("--allow-changes", "Resume with changed data, model or libraries.")
    ] = False,
    checkpoint: Annotated[
        int | None, option("STEP", "Checkpoint step; default: newest valid.")
    ] = None,
    allow_code: AllowCode = False,
    track: TrackOption = None,
    gpus: GpusOption = None,
    as_json: AsJson = False,
) -> None:
    """Resume an interrupted run from a checkpoint."""
    if gpus is not None:
        flags = list_flags(allow_code=allow_code, track=track, json=as_json)
        flags += list_flags(allow_changes=allow_changes, checkpoint=checkpoint)
        raise typer.Exit(launch(gpus, ["resume", str(folder), *flags]))
    with main_rank() as ranks:
        events = api.resume(
            folder,
            allow_changes=allow_changes,
            checkpoint=checkpoint,
            allow_code=allow_code,
            ranks=ranks,
        )
        _show_run(events, folder, api.read_plan(folder).steps, track=track, as_json=as_json)


def report(
    folder: RunArg,
    out: Annotated[Path | None, option("FILE", "Output; RUN/report.html by default.")] = None,
    track: TrackOption = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML report of a run and print its verdict."""
    from tunesmith.cli.views.verdict import render_verdict

    report_path = api.write_report(folder, out=out)
    if track is not None:
        from tunesmith.report.trackers import export_run

        export_run(folder, track)
    if not is_run(folder):  # a sweep
        print_result({"report": str(report_path)}, str(report_path), as_json=as_json)
        return
    verdict = api.read_verdict(folder)
    output = {"report": str(report_path), "verdict": verdict}
    print_result(output, render_verdict(verdict), str(report_path), as_json=as_json)


def list_runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Where to look; runs/ by default.")
    ] = None,
    watch: Annotated[bool, switch("--watch", "Update until Ctrl-C.")] = False,
    show_all: Annotated[bool, switch("--all", "Show all runs, not the newest 100.")] = False,
    as_json: AsJson = False,
) -> None:
    """List runs with state, score, memory and age."""
    from tunesmith.cli.views.runs import render_runs
    from tunesmith.session.run_list import list_newest_runs

    roots = folders or [RUNS_ROOT]
    if watch and (as_json or show_all):
        message = f"--watch and {'--json' if as_json else '--all'} cannot be combined"
        raise InputError(message, where="command line", fix="pass one of them")
    if watch:
        _watch_runs(roots)
        return
    if as_json or show_all:
        run_list = api.list_runs(roots)
        print_result({"runs": run_list}, render_runs(run_list, time.time()), as_json=as_json)
        return
    newest, num_older = list_newest_runs(roots, MAX_SHOWN_RUNS)
    print_result(None, render_runs(newest, time.time(), num_older), as_json=False)


def _watch_runs(roots: list[Path]) -> None:
    from rich.live import Live

    from tunesmith.cli.views.runs import render_runs
    from tunesmith.session.run_list import list_newest_runs

    console = TerminalConsole()
    if not console.is_terminal:
        message = "--watch needs a terminal"
        raise InputError(message, where="command line", fix="leave it out, or use --json")
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            newest, num_older = list_newest_runs(roots, max(1, console.height - 3))
            live.update(render_runs(newest, time.time(), num_older), refresh=True)
            time.sleep(WATCH_SECONDS)


# ---------------------------------------------------------------- shared


def _warn_of_plan(plan: Plan | StagedPlan) -> None:
    """Print the warnings of a plan, each once, with its stage if there are several."""
    plans = plan.plans if isinstance(plan, StagedPlan) else (plan,)
    for number, stage_plan in enumerate(plans, start=1):
        stage = f"stage {number}, {stage_plan.config.stage}: " if len(plans) > 1 else ""
        for warning in stage_plan.warnings:
            write_stderr(f"warning: {stage}{warning}\n")


def _show_run(
    events: Iterable[Event], folder: Path, steps: int, *, track: str | None, as_json: bool
) -> None:
    """Show the events of a run as they happen, then its record and report."""
    from tunesmith.cli.progress import Progress
    from tunesmith.cli.views.results import render_gates, render_run_record
    from tunesmith.evaluate.regression_gate import build_limit_gates
    from tunesmith.evaluate.run_verdict import describe_end, is_collapsed
    from tunesmith.recipe.metric_limits import parse_limits

    with _tracking(folder, track) as send_event, Progress(steps) as progress:
        try:
            for event in events:
                progress.show_event(event)
                send_event(event)
        except GateError:
            write_page(folder)
            raise
    record = api.read_record(folder)
    limits = parse_limits(record.plan.recipe.get("gates") or {})
    gates = build_limit_gates([comparison.after for comparison in record.comparisons], limits)
    views = [render_gates(gates)] if gates else []
    print_result(record, render_run_record(record), *views, as_json=as_json)
    write_page(folder)
    if is_collapsed(record):
        fix = "train with a lower learning_rate; what was measured is in the report"
        raise GateError(
            f"{describe_end(record)}; it is not better than before", where=str(folder), fix=fix
        )
    if failed := [gate.name for gate in gates if not gate.passed]:
        raise GateError(f"failed: {', '.join(failed)}", where=str(folder))


@contextmanager
def _tracking(folder: Path, track: str | None) -> Iterator[Callable[[Event], None]]:
    """Yield what sends an event to the tracker, if any. A tracker that fails is one warning."""
    if track is None:
        yield lambda _: None
        return
    from tunesmith.report.trackers import RunTracker

    tracker = RunTracker(folder, track)
    try:
        with tracker:
            yield tracker.send
    finally:
        if tracker.problem:
            retry_command = f"tunesmith report {folder} --track {track}"
            write_stderr(
                f"warning: {track} did not get everything: {tracker.problem}\n"
                f"  fix: {retry_command}\n"
            )


def write_page(folder: Path) -> None:
    """Write the report of a run, if the report package is installed; a failure is a warning."""
    if find_spec("tunesmith.report") is None or not is_run(folder):
        return
    try:
        write_stderr(f"report: {api.write_report(folder)}\n")
    except TunesmithError as error:
        write_stderr(f"warning: no report: {error}\n")
