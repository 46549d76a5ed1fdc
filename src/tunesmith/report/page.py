"""Write the page of a run: one file that loads nothing and sends nothing.

    write_report(run) -> RUN/report.html        render_page(load_report_data(run)) -> HTML

Style and script are inside, allowed by their hashes in the page's Content-Security-Policy. A new
section is a function that builds its view, a template with the name of the section, and a line in
SECTIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.formatting import hide_folders
from tunesmith.core.run_dir import require_run
from tunesmith.core.types import __version__
from tunesmith.report.details import build_cost, build_data, build_provenance, build_reproduction
from tunesmith.report.error_tables import build_errors
from tunesmith.report.html import hash_source, render_template
from tunesmith.report.results import build_results, build_scales
from tunesmith.report.run_data import ReportData, load_report_data
from tunesmith.report.samples import build_samples
from tunesmith.report.summary import build_summary
from tunesmith.report.training_curves import build_curves

REPORT_FILE = "report.html"
REPORT_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A section of the page; templates/ID.html.jinja draws `view`."""

    id: str
    title: str
    view: object


SECTIONS: dict[str, tuple[str, Callable[[ReportData], object | None]]] = {
    "errors": ("What is still wrong", build_errors),
    "results": ("Before and after", build_results),
    "curves": ("Training curves", build_curves),
    "scales": ("Adapter-scale trade-off", build_scales),
    "samples": ("Answers", build_samples),
    "data": ("Data", build_data),
    "plan": ("Plan", lambda run: run.stages),
    "cost": ("Memory and speed", build_cost),
    "reproduce": ("Reproduce", build_reproduction),
    "provenance": ("Provenance", build_provenance),
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page atomically and return its path.

    Raises InputError for a folder that is no run or is damaged, and for a missing output folder.
    """
    require_run(run)
    out_path = out or run / REPORT_FILE
    if not out_path.absolute().parent.is_dir():
        raise InputError(
            "the folder does not exist",
            where=str(out_path.parent),
            fix="create it, or choose another --out",
        )
    write_file(out_path, render_page(load_report_data(run)).encode())
    return out_path


def render_page(run: ReportData) -> str:
    """Return the page. Pages are shared: of paths that name the user's folders the last part
    stays."""
    sections: list[Section] = []
    for section_id, (title, build_view) in SECTIONS.items():
        view = build_view(run)
        if view is not None:
            sections.append(Section(section_id, title, view))
    style = (REPORT_DIR / "page.css").read_text(encoding="utf-8")
    script = (REPORT_DIR / "page.js").read_text(encoding="utf-8")
    page = render_template(
        "page.html.jinja",
        run=run,
        summary=build_summary(run),
        sections=sections,
        errors=build_errors(run),
        facts=_list_facts(run),
        style=Markup(style),
        style_hash=hash_source(style),
        script=Markup(script),
        script_hash=hash_source(script),
        version=__version__,
    )
    paths = [run.path]
    for stage in run.stages:
        paths += map(Path, stage.plan.list_paths())
    return hide_folders(page, paths, lambda path: str(escape(path)))


def _list_facts(run: ReportData) -> list[str]:
    config = run.stages[-1].plan.config
    methods = [f"{stage.plan.config.stage}, {stage.plan.config.method}" for stage in run.stages]
    model = run.stages[-1].plan.model.name
    return [model, " → ".join(methods), f"{run.steps_planned:,} steps", str(config.now)[:10]]
