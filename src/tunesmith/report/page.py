"""The whole page, in one file that loads nothing: style and script are in it, allowed by their hashes alone.

page(read_story(run)) -> HTML; write_report(run) -> RUN/report.html
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import require_run
from tunesmith.core.types import __version__
from tunesmith.report.details import again_section, cost_section, data_section, plan_section, provenance_section
from tunesmith.report.html import Html, plain, quoted, tag
from tunesmith.report.results import results_section, scales_section
from tunesmith.report.run_data import Story, read_story
from tunesmith.report.samples import samples_section
from tunesmith.report.summary import verdict_of, verdict_section
from tunesmith.report.training_curves import curves_section

REPORT = "report.html"
HERE = Path(__file__).parent
SECTIONS = {
    "results": ("Before and after", results_section),
    "curves": ("While training", curves_section),
    "scales": ("Gain and forgetting", scales_section),
    "samples": ("Answers", samples_section),
    "data": ("Data", data_section),
    "plan": ("Plan", plan_section),
    "cost": ("Memory and speed", cost_section),
    "again": ("Reproduce", again_section),
    "provenance": ("Provenance", provenance_section),
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """The page of a run folder, whole or not at all. Raises InputError for what is no run folder, or a damaged one."""
    require_run(run)
    place = out or run / REPORT
    if not place.absolute().parent.is_dir():
        raise InputError("there is no such folder", where=str(place.parent), fix="make it, or choose another --out")
    write_file(place, page(read_story(run)).encode())
    return place


def page(story: Story) -> str:
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    found = {name: made for name, (_, make) in SECTIONS.items() if (made := make(story)) is not None}
    links = [tag("a", SECTIONS[name][0], href=f"#{name}") for name in found]
    body = tag(
        "body",
        tag("a", "To the verdict", href="#verdict", class_="skip"),
        _header(story),
        tag("nav", links, aria_label="Sections"),
        tag("main", verdict_section(story), *found.values()),
        tag("footer", f"tunesmith {__version__}. Every number was measured in this run, or is marked as predicted."),
        Html(f"<script>{script}</script>"),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{plain(story.path.absolute().name)}: {verdict_of(story).headline}"),
        Html(f"<style>{style}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, sent or run but what stands here."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _header(story: Story) -> Html:
    plan = story.parts[-1].plan
    method = " → ".join(f"{part.plan['stage']}, {part.plan['method']}" for part in story.parts)
    when = str(plan["now"])[:10] if "now" in plan.choices else ""
    facts = [quoted(plan.model.name), method, f"{story.steps_planned:,} steps", when]
    return tag(
        "header",
        tag("p", tag("b", "tunesmith"), " report", class_="brand"),
        tag("p", quoted(story.path.absolute().name), class_="run"),
        tag("p", [tag("span", fact) for fact in facts if fact], class_="facts"),
    )
