"""Write the page of a sweep: one file without script that loads nothing and sends nothing.

    write_sweep_page(folder) -> FOLDER/sweep.html       from sweep.json and winner.yaml alone

Configurations from best to worst, what mattered, the metric over the steps of every trial, and the
recipe of the winner, without folders: absolute paths name the user. The look is that of the page of
a run (page.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tunesmith.core.atomic import write_file
from tunesmith.core.formatting import format_count, format_value, hide_folders, iter_paths
from tunesmith.core.sweep_record import (
    WINNER_FILE,
    ConfigurationRecord,
    SweepRecord,
    TrialRecord,
    read_sweep,
)
from tunesmith.core.types import Comparison, __version__
from tunesmith.evaluate.statistics import format_p, judge_comparisons
from tunesmith.recipe.yaml_lines import read_yaml
from tunesmith.report.html import hash_source, render_template
from tunesmith.report.svg_charts import (
    Axes,
    LineChart,
    Point,
    Series,
    Strip,
    build_line_chart,
    build_strip,
)

PAGE_FILE = "sweep.html"
MAX_LINES = 40  # of a chart
MAX_LEGEND_LINES = 6
STATE_OUTCOMES = {"worse": "worse", "better": "better"}


@dataclass(frozen=True)
class ConfigurationRow:
    configuration: ConfigurationRecord
    values: tuple[str, ...]
    outcome: str  # a class of page.css
    text: str
    strip: Strip | None  # of the difference, in shares of the widest


@dataclass(frozen=True)
class MeasuredRow:
    comparison: Comparison
    verdict: str


@dataclass(frozen=True)
class SweepView:
    record: SweepRecord
    keys: tuple[str, ...]
    headline: str
    facts: tuple[str, ...]
    rows: tuple[ConfigurationRow, ...]
    tests: tuple[MeasuredRow, ...]
    key_charts: tuple[LineChart, ...]
    curve_chart: LineChart | None
    recipe: str


def write_sweep_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page and return its path.

    Raises InputError for a folder that is no sweep, and for a damaged recipe of the winner."""
    record = read_sweep(folder)
    recipe_file = folder / WINNER_FILE
    recipe = ""
    paths: list[str | Path] = [folder.absolute(), record.model]
    if recipe_file.exists():
        recipe = recipe_file.read_text(encoding="utf-8")
        paths += iter_paths(read_yaml(recipe_file).values)
    page = render_sweep_page(record, recipe)
    path = out or folder / PAGE_FILE
    write_file(path, hide_folders(page, paths, lambda name: str(escape(name))).encode())
    return path


def render_sweep_page(record: SweepRecord, recipe: str) -> str:
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return render_template(
        "sweep.html.jinja",
        view=build_view(record, recipe),
        style=Markup(style),
        style_hash=hash_source(style),
        version=__version__,
    )


def build_view(record: SweepRecord, recipe: str) -> SweepView:
    keys = tuple(record.configurations[0].settings) if record.configurations else ()
    verdicts = judge_comparisons(record.test)
    return SweepView(
        record=record,
        keys=keys,
        headline=_describe_winner(record),
        facts=tuple(_list_facts(record)),
        rows=tuple(_build_rows(record, keys)),
        tests=tuple(map(MeasuredRow, record.test, verdicts)),
        key_charts=tuple(_build_key_charts(record, keys)),
        curve_chart=_build_curve_chart(record),
        recipe=recipe,
    )


def _describe_winner(record: SweepRecord) -> str:
    if record.winner is None:
        return "No trial reached its end"
    return format_value(record.configurations[record.winner].settings)


def _list_facts(record: SweepRecord) -> Iterator[str]:
    yield record.model
    seeds = format_count(len(record.seeds), "seed")
    yield f"{record.search}, {format_count(len(record.configurations), 'configuration')}, {seeds}"
    for state in ("complete", "pruned", "failed", "unfinished"):
        if count := record.count_trials(state):
            words = {"pruned": "stopped early"}.get(state, state)
            yield f"{format_count(count, 'trial')} {words}"


# ---------------------------------------------------------------- configurations


def _build_rows(record: SweepRecord, keys: Sequence[str]) -> Iterator[ConfigurationRow]:
    widest = 0.0
    for configuration in record.configurations:
        if configuration.comparison is not None:
            bounds = (configuration.comparison.low, configuration.comparison.high)
            widest = max(widest, *map(abs, bounds))
    for configuration in record.list_ranked():
        values = tuple(format_value(configuration.settings[key]) for key in keys)
        outcome, text = describe_outcome(record, configuration)
        strip = None
        if (comparison := configuration.comparison) is not None and widest:
            strip = build_strip(
                comparison.low / widest, comparison.difference / widest, comparison.high / widest
            )
        yield ConfigurationRow(configuration, values, outcome, text, strip)


def describe_outcome(record: SweepRecord, configuration: ConfigurationRecord) -> tuple[str, str]:
    """Return a class of page.css, and the verdict in words."""
    if configuration.number == record.winner:
        return "better", "winner"
    if configuration.comparison is None:
        return "unclear", record.describe_end(configuration)
    outcome = STATE_OUTCOMES.get(configuration.verdict, "same")
    p_value = "" if configuration.p_value is None else f", {format_p(configuration.p_value)}"
    return outcome, configuration.verdict + p_value


# ---------------------------------------------------------------- charts


def _build_key_charts(record: SweepRecord, keys: Sequence[str]) -> Iterator[LineChart]:
    """Yield a chart for each key with numbers: the metric over its values, all else equal."""
    complete = [c for c in record.configurations if c.value is not None]
    for index, key in enumerate(keys):
        values = [configuration.settings[key] for configuration in complete]
        if len(set(values)) < 2 or not all(type(value) in (int, float) for value in values):
            continue
        is_log = min(values) > 0 and max(values) / min(values) >= 10
        lines = _group_by_context(complete, key)
        series = [_build_key_series(record, key, line, is_log) for line in lines[:MAX_LINES]]
        name = f"log10({key})" if is_log else key
        title = f"{record.metric} by {key}"
        description = (
            f"One line for each combination of the other values; the winner's is dark, with 95% "
            f"intervals. {len(lines)} in all."
        )
        axes = Axes(title, description, name, record.metric)
        chart = build_line_chart(f"key-{index}", axes, series)
        yield replace(chart, has_legend=len(series) <= MAX_LEGEND_LINES)


def _group_by_context(
    configurations: Sequence[ConfigurationRecord], key: str
) -> list[list[ConfigurationRecord]]:
    """Return the configurations that agree in all other keys, sorted by the key."""
    contexts: dict[str, list[ConfigurationRecord]] = {}
    for configuration in configurations:
        others = {name: value for name, value in configuration.settings.items() if name != key}
        contexts.setdefault(repr(sorted(others.items())), []).append(configuration)
    return [sorted(line, key=lambda each: each.settings[key]) for line in contexts.values()]


def _build_key_series(
    record: SweepRecord, key: str, line: Sequence[ConfigurationRecord], is_log: bool
) -> Series:
    is_winners = any(configuration.number == record.winner for configuration in line)
    points: list[Point] = []
    for configuration in line:
        assert configuration.value is not None
        x = configuration.settings[key]
        points.append(
            Point(
                math.log10(x) if is_log else x,
                configuration.value,
                configuration.low if is_winners else None,
                configuration.high if is_winners else None,
            )
        )
    name = _describe_context(line[0].settings, key)
    return Series(name, tuple(points), "main" if is_winners else "faint", has_dots=True)


def _describe_context(settings: Mapping[str, Any], key: str) -> str:
    others = {name: value for name, value in settings.items() if name != key}
    return format_value(others) or "all trials"


def _build_curve_chart(record: SweepRecord) -> LineChart | None:
    """Chart the metric at the evaluations of every trial; the winner's is dark."""
    trials = [trial for trial in record.trials if len(trial.curve) > 1]
    trials.sort(key=lambda trial: trial.number == record.winner_trial)  # drawn last
    if not trials:
        return None
    series = [_build_curve(trial, record) for trial in trials[-MAX_LINES:]]
    title = f"{record.metric} on eval_data by percent of the steps"
    description = "One line per trial; the winner's is dark. Lines that end early were stopped."
    axes = Axes(title, description, "percent of the steps", record.metric, (0, 100))
    return replace(build_line_chart("curves", axes, series), has_legend=False)


def _build_curve(trial: TrialRecord, record: SweepRecord) -> Series:
    points = tuple(Point(percent, value) for percent, value in trial.curve)
    style = "main" if trial.number == record.winner_trial else "faint"
    return Series(trial.folder, points, style, has_dots=True)
