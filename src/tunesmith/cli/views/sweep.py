"""Views of `tune sweep`: a line per evaluation and trial, then configurations and effects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_duration
from tunesmith.cli.views import make_table
from tunesmith.core.events import EVAL_TASK, Score, TrainingEnd
from tunesmith.core.formatting import format_count, format_value
from tunesmith.core.sweep_record import (
    WINNER_FILE,
    ConfigurationRecord,
    SweepEvent,
    SweepRecord,
    SweepStart,
    TrialEnd,
    TrialEvent,
    TrialStart,
    name_trial,
)
from tunesmith.evaluate.results import format_comparison
from tunesmith.evaluate.statistics import format_p

VERDICT_STYLES = {"better": "bold green", "worse": "dim"}


def report_sweep(events: Iterable[SweepEvent]) -> SweepRecord:
    """Print the progress of a sweep on stderr; return the record at its end."""
    trained: set[int] = set()  # trials whose further scores repeat those of a checkpoint
    number = 0
    for event in events:
        if isinstance(event, SweepRecord):
            return event
        if isinstance(event, (TrialStart, TrialEvent)):
            number = event.number
        run_event = event.event if isinstance(event, TrialEvent) else event
        if isinstance(run_event, TrainingEnd):
            trained.add(number)
        if not isinstance(run_event, Score) or number not in trained:
            write_stderr(format_event(event))
    raise AssertionError("a sweep ends with its record")


def format_event(event: SweepEvent) -> str:
    """Return the line of an event, or the lines; "" for one without news."""
    if isinstance(event, SweepStart):
        seeds = format_count(len(event.seeds), "seed")
        configurations = format_count(event.configurations, "configuration")
        line = f"sweep in {event.folder}: {configurations}, {seeds}, by {event.metric}\n"
        if event.finished_trials:
            line += f"{format_count(event.finished_trials, 'trial')} done before\n"
        return line
    if isinstance(event, TrialStart):
        spec = event.spec
        head = f"{name_trial(spec.number)}, {spec.number + 1} of at most {event.max_trials}"
        return f"{head}: {format_value(spec.settings)}, seed {spec.seed}\n"
    if isinstance(event, TrialEnd):
        return f"{format_trial_end(event)}\n"
    if isinstance(event, TrialEvent):
        line = format_event(event.event)
        return line and f"  {name_trial(event.number)},{line[1:]}"
    if isinstance(event, Score) and event.task.partition(":")[0] == EVAL_TASK and event.step:
        return f"  step {event.step}: {event.task} {event.metric} {event.value:.4f}\n"
    return ""


def format_trial_end(event: TrialEnd) -> str:
    trial = event.trial
    outcome = trial.reason
    if trial.value is not None:
        outcome = f"{trial.value:.4f} on eval_data" + f" ({trial.reason})" * bool(trial.reason)
    line = f"  {trial.folder} {trial.state}: {outcome}, "
    line += f"{trial.steps} of {trial.planned_steps} steps"
    if event.remaining_trials:
        line += f"; at most {event.remaining_trials} more"
        if event.remaining_seconds is not None:
            line += f", {format_duration(event.remaining_seconds)}"
    return line


def render_sweep(record: SweepRecord) -> RenderableType:
    """Show the configurations, the best first, what mattered, and the winner on test_data."""
    parts: list[RenderableType] = [_render_configurations(record)]
    if record.effects:
        parts.append(_render_effects(record))
    if record.winner_trial is not None:
        trial = record.get_trial(record.winner_trial)
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
        run = folder / record.get_trial(record.winner_trial).folder
        parts.append(escape_markup(f"run: {run}; recipe: {folder / WINNER_FILE}"))
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
    return f"{comparison.difference:+.3f} \\[{comparison.low:+.3f}, {comparison.high:+.3f}]"


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


def _render_effects(record: SweepRecord) -> Table:
    """Show each value against the winner's value of its key, all else equal."""
    title = f"What mattered: {record.metric} minus that of the winner's value, all else equal"
    columns = ("key", "value", "winner's", "pairs", "difference", "")
    table = make_table(title, *columns, numbers=("value", "winner's", "pairs"))
    for effect in record.effects:
        interval = ""
        if effect.difference is not None:
            interval = f"{effect.difference:+.3f} \\[{effect.low:+.3f}, {effect.high:+.3f}]"
        level = effect.level or "rank correlation"
        table.add_row(
            effect.key, level, effect.best_level, str(effect.pairs), interval, effect.verdict
        )
    return table
