"""The view of `serve --watch`: a line of the whole server, then models, then routes and canaries.

In: a ServerActivity. Out: things that `rich` can print, within 80 columns. Names come from a
server, so they are escaped. Left out: reading it (serve/watch.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from tunesmith.cli.output import escape_markup
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_bytes
from tunesmith.core.types import Json

if TYPE_CHECKING:
    from tunesmith.serve.watch import ModelActivity, ServerActivity

UNKNOWN = "-"
MAX_NAME_CHARS = 24
STATE_STYLES = {"ready": "bold green", "draining": "bold yellow"}
STATUS_STYLES = {"running": "yellow", "promoted": "green", "rolled_back": "bold red"}
NUMBERS = ("requests", "errors", "tok/s", "prompt/s", "1st token")


def render_activity(url: str, activity: ServerActivity, *, max_models: int = 20) -> RenderableType:
    """Show a server. Models beyond `max_models` are a number; the busiest ones are shown."""
    parts: list[RenderableType] = [_format_head(url, activity), ""]
    by_rate = sorted(activity.models, key=lambda model: -(model.answer_rate or 0))
    table = make_table("", "model", *NUMBERS, "memory", numbers=NUMBERS)
    table.title = None
    for model in by_rate[:max_models]:
        table.add_row(*_format_model(model))
    parts.append(table)
    if len(by_rate) > max_models:
        parts.append(f"[dim]and {len(by_rate) - max_models} more models[/]")
    if activity.routes is None:
        parts += ["", "[dim]routes: shown to a key with the scope admin[/]"]
    for route in activity.routes or ():
        parts += ["", _render_route(route, activity)]
    return Group(*parts)


def _format_head(url: str, activity: ServerActivity) -> str:
    style = STATE_STYLES.get(activity.state, "bold red")
    step = UNKNOWN if activity.step_seconds is None else f"{1000 * activity.step_seconds:.0f} ms"
    rows = UNKNOWN if activity.step_rows is None else f"{activity.step_rows:.1f}"
    return (
        f"{escape_markup(url)}  [{style}]{escape_markup(activity.state)}[/]\n"
        f"{activity.running} running  {activity.waiting} waiting  "
        f"[bold]{_format_rate(activity.answer_rate)} tok/s[/]  step {step} of {rows} rows  "
        f"adapters {format_bytes(activity.adapter_bytes)}"
    )


def _format_model(model: ModelActivity) -> tuple[str, ...]:
    first = model.first_token_seconds
    return (
        escape_markup(_cut_name(model.name)),
        f"{model.requests:,}",
        f"[red]{model.errors:,}[/]" if model.errors else "0",
        _format_rate(model.answer_rate),
        _format_rate(model.prompt_rate),
        UNKNOWN if first is None else f"{first:.2f} s",
        "yes" if model.is_resident else "no",
    )


def _format_rate(rate: float | None) -> str:
    return UNKNOWN if rate is None else f"{rate:,.1f}"


def _cut_name(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…"


def _render_route(route: Json, activity: ServerActivity) -> RenderableType:
    """Show the arms of a route, and what its canary has counted."""
    name = str(route["id"])
    numbers = ("share", "answers", "bad")
    table = make_table(f"route {escape_markup(_cut_name(name))}", "arm", *numbers, numbers=numbers)
    for arm, share in route["arms"].items():
        labels = {"route": name, "model": arm}
        answers = activity.metrics.get("route_answers_total", **labels)
        bad = activity.metrics.get("route_checks_total", **labels, result="bad")
        table.add_row(
            escape_markup(_cut_name(arm)), f"{share:g}%", f"{answers:,.0f}", f"{bad:,.0f}"
        )
    parts: list[RenderableType] = [table]
    if route["shadow"] is not None:
        parts.append(_format_shadow(name, route["shadow"], activity))
    if route["canary"] is not None:
        parts.append(_format_canary(route["canary"]))
        parts.append(_render_checks(route["canary"]["checks"]))
    return Group(*parts)


def _format_shadow(route: str, shadow: Json, activity: ServerActivity) -> str:
    counts: list[str] = []
    for result in ("same", "different", "dropped", "failed"):
        count = activity.metrics.get("shadow_answers_total", route=route, result=result)
        counts.append(f"{count:,.0f} {result}")
    model = escape_markup(_cut_name(shadow["model"]))
    return f"shadow {model}, {shadow['share']:g}%: {', '.join(counts)}"


def _format_canary(canary: Json) -> str:
    model = escape_markup(canary["model"].partition("#")[0])
    status = canary["status"]
    text = f"canary {model}: [{STATUS_STYLES[status]}]{status.replace('_', ' ')}[/]"
    if status == "running":
        step = f"step {canary['step'] + 1} of {len(canary['steps']) - 1}"
        text += f", {step}, {canary['answers']:,} of {canary['at_least']:,} answers"
    return f"{text}\n[dim]{escape_markup(canary['reason'])}[/]" if canary["reason"] else text


def _render_checks(checks: Json) -> Table:
    """Show how often each side was bad, and the interval of the difference in points."""
    numbers = ("canary", "stable", "pairs", "harm", "margin")
    table = make_table("", "check", *numbers, numbers=numbers)
    table.title = None
    for check, counts in checks.items():
        margin = 100 * counts["margin"]
        harm = UNKNOWN
        if counts["harm"] is not None:
            low, high = (100 * end for end in counts["harm"])
            style = "red" if low > margin else "green" if high <= margin else "default"
            harm = f"[{style}]{low:+.1f} to {high:+.1f}[/]"
        sides = [f"{counts[side][0]:,}/{counts[side][1]:,}" for side in numbers[:3]]
        table.add_row(escape_markup(check), *sides, harm, f"{margin:g}")
    return table
