"""Views of `tune sweep`: a line per evaluation and trial, then the configurations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.sweep.records import (
    ConfigurationRecord,
    SweepEvent,
    SweepRecord,
    SweepStart,
    TrialRecord,
    TrialScore,
    TrialStart,
)
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_count, format_value
from tunesmith.evaluate.results import format_comparison
from tunesmith.evaluate.statistics import format_p

VERDICT_STYLES = {"better": "bold green", "worse": "dim"}


def report_sweep(events: Iterable[SweepEvent]) -> SweepRecord:
    """Print the progress of a sweep on stderr; return the record at its end."""
    for event in events:
        if isinstance(event, SweepRecord):
            return event
        write_stderr(f"{format_event(event)}\n")
    raise AssertionError("a sweep ends with its record")


def format_event(event: SweepEvent) -> str:
    """Return the line of an event."""
    if isinstance(event, SweepStart):
        seeds = format_count(len(event.seeds), "seed")
        configurations = format_count(event.configurations, "configuration")
        done = f", {event.finished_trials} trials done before" if event.finished_trials else ""
        return f"sweep in {event.folder}: {configurations}, {seeds}, by {event.metric}{done}"
    if isinstance(event, TrialStart):
        spec = event.spec
        head = f"{spec.name}, {spec.number + 1} of at most {event.max_trials}"
        return f"{head}: {format_value(spec.settings)}, seed {spec.seed}"
    if isinstance(event, TrialScore):
        score = event.score
        value = f"{score.task} {score.metric} {score.value:.4f}"
        return f"  {event.spec.name}, step {score.step}: {value}"
    assert not isinstance(event, SweepRecord)
    return format_trial_end(event.trial)


def format_trial_end(trial: TrialRecord) -> str:
    outcome = trial.reason
    if trial.value is not None:
        outcome = f"{trial.value:.4f} on eval_data" + f" ({trial.reason})" * bool(trial.reason)
    steps = f"{trial.steps} of {trial.planned_steps} steps"
    return f"  {trial.folder} {trial.state}: {outcome}, {steps}"


def render_sweep(record: SweepRecord) -> RenderableType:
    """Show the configurations, the best first, and the winner on test_data."""
    parts: list[RenderableType] = [_render_configurations(record)]
    if record.winner_trial is not None:
        trial = record.trials[record.winner_trial]
        name = format_value(trial.settings)
        num_seeds = len(record.configurations[trial.configuration].trials)
        if num_seeds > 1:
            name += f", seed {trial.seed}, the best of {num_seeds}"
        reads = "once" if record.test_reads == 1 else f"for {record.test_reads} winners"
        parts.append(f"[bold]winner[/] {escape_markup(name)}; on test_data, {reads}:")
        parts += [escape_markup(f"  {format_comparison(comparison)}") for comparison in record.test]
    parts += [f"[yellow]note[/] {escape_markup(caveat)}" for caveat in record.caveats]
    if record.winner_trial is not None:
        folder = Path(record.folder)
        run = folder / record.trials[record.winner_trial].folder
        parts.append(escape_markup(f"run: {run}; recipe: {folder / 'winner.yaml'}"))
    return Group(*parts)


def _render_configurations(record: SweepRecord) -> Table:
    title = f"{record.metric} on {format_count(record.rows, 'row')} of eval_data (95% CI)"
    if record.base_value is not None:
        title += f", {record.base_value:.3f} before training"
    keys = list(record.configurations[0].settings) if record.configurations else []
    columns = ("no.", *keys, "seeds", record.metric, "minus the winner's", "")
    table = make_table(title, *columns, numbers=("no.", *keys, "seeds", record.metric))
    table.columns[-2].no_wrap = True  # intervals stay whole
    for configuration in record.list_ranked():
        values = [format_value(configuration.settings[key]) for key in keys]
        table.add_row(
            str(configuration.number),
            *values,
            str(len(configuration.trials)),
            "-" if configuration.value is None else f"{configuration.value:.3f}",
            _format_difference(configuration),
            describe_outcome(record, configuration),
        )
    return table


def _format_difference(configuration: ConfigurationRecord) -> str:
    comparison = configuration.comparison
    if comparison is None:
        return ""
    low, high = comparison.interval
    return f"{comparison.difference:+.3f} \\[{low:+.3f}, {high:+.3f}]"


def describe_outcome(record: SweepRecord, configuration: ConfigurationRecord) -> Text:
    """Return the verdict with its corrected p, or why there is none."""
    if configuration.number == record.winner:
        return Text("winner", "bold green")
    if configuration.comparison is None:
        return Text(record.describe_end(configuration), "dim")
    text = configuration.verdict
    if configuration.p_value is not None:
        text += f", {format_p(configuration.p_value)}"
    return Text(text, VERDICT_STYLES.get(configuration.verdict, ""))
