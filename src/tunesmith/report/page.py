"""The whole page, in one file that loads nothing: style and script are in it, allowed by their
hashes alone.

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
from tunesmith.report.details import (
    render_cost,
    render_data,
    render_plan,
    render_provenance,
    render_reproduction,
)
from tunesmith.report.html import Html, escape_plain, make_tag, quote_text
from tunesmith.report.results import render_results, render_scales
from tunesmith.report.run_data import ReportData, load_report_data
from tunesmith.report.samples import render_samples
from tunesmith.report.summary import build_summary, render_summary
from tunesmith.report.training_curves import render_curves

REPORT_FILE = "report.html"
REPORT_DIR = Path(__file__).parent
SECTIONS = {
    "results": ("Before and after", render_results),
    "curves": ("While training", render_curves),
    "scales": ("Gain and forgetting", render_scales),
    "samples": ("Answers", render_samples),
    "data": ("Data", render_data),
    "plan": ("Plan", render_plan),
    "cost": ("Memory and speed", render_cost),
    "again": ("Reproduce", render_reproduction),
    "provenance": ("Provenance", render_provenance),
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """The page of a run folder, whole or not at all. Raises InputError for what is no run folder,
    or a damaged one."""
    require_run(run)
    out_path = out or run / REPORT_FILE
    if not out_path.absolute().parent.is_dir():
        raise InputError(
            "there is no such folder",
            where=str(out_path.parent),
            fix="make it, or choose another --out",
        )
    write_file(out_path, render_page(load_report_data(run)).encode())
    return out_path


def render_page(story: ReportData) -> str:
    style, script = (
        (REPORT_DIR / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    sections = {
        name: section
        for name, (_, render) in SECTIONS.items()
        if (section := render(story)) is not None
    }
    links = [make_tag("a", SECTIONS[name][0], href=f"#{name}") for name in sections]
    body = make_tag(
        "body",
        make_tag("a", "To the verdict", href="#verdict", class_="skip"),
        _render_header(story),
        make_tag("nav", links, aria_label="Sections"),
        make_tag("main", render_summary(story), *sections.values()),
        make_tag(
            "footer",
            f"tunesmith {__version__}. Every number was measured in this run, or is marked as predicted.",
        ),
        Html(f"<script>{script}</script>"),
    )
    head = make_tag(
        "head",
        make_tag("meta", charset="utf-8"),
        make_tag(
            "meta", http_equiv="Content-Security-Policy", content=_build_policy(style, script)
        ),
        make_tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        make_tag("meta", name_="color-scheme", content="light dark"),
        make_tag(
            "title", f"{escape_plain(story.path.absolute().name)}: {build_summary(story).headline}"
        ),
        Html(f"<style>{style}</style>"),
    )
    return f"<!doctype html>\n{make_tag('html', head, body, lang='en')}\n"


def _build_policy(style: str, script: str) -> str:
    """Nothing may be loaded, sent or run but what stands here."""
    return (
        f"default-src 'none'; style-src '{_hash_text(style)}'; script-src '{_hash_text(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash_text(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _render_header(story: ReportData) -> Html:
    plan = story.stages[-1].plan
    method = " → ".join(f"{part.plan['stage']}, {part.plan['method']}" for part in story.stages)
    when = str(plan["now"])[:10] if "now" in plan.choices else ""
    facts = [quote_text(plan.model.name), method, f"{story.steps_planned:,} steps", when]
    return make_tag(
        "header",
        make_tag("p", make_tag("b", "tunesmith"), " report", class_="brand"),
        make_tag("p", quote_text(story.path.absolute().name), class_="run"),
        make_tag("p", [make_tag("span", fact) for fact in facts if fact], class_="facts"),
    )
