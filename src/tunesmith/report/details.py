"""What stands behind a run: its data, its plan, its cost beside the prediction, how to do it again, and its provenance.

In: a Story. Out: sections. Several stages stand one after the other.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tunesmith.core.atomic import MANIFEST, size
from tunesmith.core.formatting import duration, some_rows, value_text
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import RECIPE
from tunesmith.core.types import DataReport, Json, Plan
from tunesmith.report.html import Content, Html, details, join, plain, quoted, section, table, tag
from tunesmith.report.run_data import Part, Story
from tunesmith.report.summary import weights_of

BY_WORDS = {"you": "you", "rule": "a rule", "checkpoint": "the model"}


def _each(story: Story, of_part: Any) -> list[Content]:
    """Of every stage, under its name where there are several."""
    return [[tag("h3", "Stage ", quoted(part.name)) if part.name else None, of_part(part)] for part in story.parts]


# ---------------------------------------------------------------- data


def data_section(story: Story) -> Html:
    return section("data", "Data", _each(story, _data))


def _data(part: Part) -> Html:
    head = ["Role", "Format", "Rows", "Documents", "Tokens", "Trained", "Left out", "Cut", "Median", "Longest"]
    reports = part.plan.data
    counts = table(head, [_counts(*one) for one in reports.items()], numbers=range(2, 10), label="Rows of each role")
    found = [(role, one) for role, report in reports.items() for one in report.findings]
    findings = [
        tag(
            "li",
            *(tag("b", one.level, class_=f"level {one.level}"), f" {role}, ", quoted(one.check), ": "),
            quoted(one.message),
            tag("span", " ", quoted(some_rows(one)), class_="soft") if one.rows else None,
            tag("div", quoted(one.fix), class_="soft") if one.fix else None,
        )
        for role, one in found
    ]
    told = tag("ul", findings, class_="findings") if found else tag("p", "The check of the rows found nothing to say.")
    return join(counts, told, _reasons(reports), _tasks(reports))


def _counts(role: str, report: DataReport) -> list[Content]:
    lengths, left = report.length_percentiles, sum(report.dropped.values()) + sum(report.rejected.values())
    numbers = (report.rows, report.documents, report.tokens, report.supervised_tokens, left, report.truncated)
    more = (lengths.get("p50", 0), lengths.get("max", 0))
    where = tag("span", quoted(report.path.rpartition("/")[2]), class_="under")
    return [[role, where], quoted(report.format), *(f"{number:,}" for number in numbers + more)]


def _reasons(reports: Mapping[str, DataReport]) -> Html | None:
    rows = [
        [role, word, quoted(reason), f"{count:,}"]
        for role, report in reports.items()
        for word, counts in (
            ("no document", report.dropped),
            ("not used", report.rejected),
            ("breaks a constraint, left out", report.left_out),
            ("breaks a constraint, trained away from", report.banned),
        )
        for reason, count in counts.items()
    ]
    head = ["Role", "Rows that are", "Why", "Rows"]
    return (
        details("Rows that are not trained as they are", table(head, rows, numbers=(3,), label="Why")) if rows else None
    )


def _tasks(reports: Mapping[str, DataReport]) -> Html | None:
    rows = [
        [quoted(task), role, f"{count:,}", f"{report.task_tokens.get(task, 0):,}"]
        for role, report in reports.items()
        for task, count in report.task_rows.items()
    ]
    head = ["Task", "Role", "Rows", "Tokens"]
    return details("Tasks", table(head, rows, numbers=(2, 3), label="Rows of each task")) if rows else None


# ---------------------------------------------------------------- plan


def plan_section(story: Story) -> Html:
    note = tag("p", "Every value that the run obeyed, who decided it, and why.", class_="note")
    return section("plan", "Plan", note, _each(story, lambda part: _plan(part.plan)))


def _plan(plan: Plan) -> Html:
    rows = [
        [
            quoted(key),
            quoted(value_text(choice.value), "code"),
            tag("span", BY_WORDS[choice.by], class_=f"by {choice.by}"),
            [
                quoted(choice.why),
                tag("div", "usual advice: ", quoted(choice.advice), class_="soft") if choice.advice else None,
            ],
            [quoted(choice.source), tag("div", choice.confidence, class_="soft") if choice.confidence else None],
        ]
        for key, choice in plan.choices.items()
    ]
    return table(["Key", "Value", "By", "Why", "Source"], rows, label="The plan")


# ---------------------------------------------------------------- cost


def cost_section(story: Story) -> Html | None:
    """Memory and speed beside what was predicted before the run."""
    rows = [row for part in story.parts for row in _cost(part)]
    if not rows:
        return None
    head = ["What", "Predicted", "Measured", "Measured / predicted"]
    parts = _each(story, _memory)
    return section("cost", "Memory and speed", table(head, rows, numbers=(1, 2, 3), label="Memory and speed"), parts)


def _cost(part: Part) -> list[list[Content]]:
    steps, plan = part.of_type("step"), part.plan
    if not steps:
        return []
    name: list[Content] = [" of ", quoted(part.name)] if part.name else []
    seconds, tokens = sum(one["seconds"] for one in steps), sum(one["tokens"] for one in steps)
    peak, foreseen = max(one["peak_bytes"] for one in steps), plan.memory_bytes.get("peak")
    rows: list[list[Content]] = [
        [
            ["Memory at the peak", *name],
            size(foreseen) if foreseen else "-",
            size(peak),
            f"{peak / foreseen:.2f}" if foreseen else "-",
        ]
    ]
    whole = len(steps) >= plan.steps and plan.seconds
    middle = (min(plan.seconds) + max(plan.seconds)) / 2 if whole else 0
    rows.append(
        [
            ["Time of training", *name],
            " to ".join(map(duration, plan.seconds)) or "-",
            duration(seconds),
            f"{seconds / middle:.2f}" if middle else "-",
        ]
    )
    rows.append([["Tokens a second", *name], "-", f"{tokens / max(seconds, 1e-9):,.0f}", "-"])
    return rows


def _memory(part: Part) -> Html | None:
    found = {**part.plan.phase_bytes, **{k: v for k, v in part.plan.memory_bytes.items() if k != "peak"}}
    rows = [[quoted(name), size(held)] for name, held in found.items() if held]
    inner = table(["Part", "Predicted"], rows, numbers=(1,), label="Predicted memory")
    why = tag("p", "Time: ", quoted(part.plan.seconds_from), class_="note") if part.plan.seconds_from else None
    return details("What the prediction is made of", inner, why) if rows else None


# ---------------------------------------------------------------- again


def again_section(story: Story) -> Html:
    """A stage goes on with the adapter of the one before."""
    lines: list[str] = []
    for number, part in enumerate(story.parts):
        if part.recipe:
            place = f"runs/again/{part.name}".rstrip("/")
            start = f" --adapter-from runs/again/{story.parts[number - 1].name}" if number else ""
            lines.append(f"tunesmith train {shlex.quote(str(part.path / RECIPE))}{start} --output-dir {place}")
    if story.record is not None:
        lines.append(f"tunesmith eval {shlex.quote(str(story.path))}")
    exact = (
        "From the same files and libraries, with as many threads of the same processor, the weights come out the same "
        "to the bit. Other processors and threads round differently, and nothing else changes."
    )
    recipes = _each(story, lambda part: details("recipe.yaml", quoted(part.recipe, "pre")) if part.recipe else None)
    commands = tag("pre", "\n".join(plain(line) for line in lines))
    return section("again", "How to reproduce", commands, tag("p", exact, class_="note"), recipes)


# ---------------------------------------------------------------- provenance


def provenance_section(story: Story) -> Html:
    parts = _each(story, _provenance)
    return section("provenance", "Provenance", parts, _proof(story))


def _provenance(part: Part) -> Html:
    machine = part.plan.machine
    rows: list[tuple[str, Content]] = [("run folder", str(part.path)), ("model", _model(part.plan))]
    rows += [(name, value) for name, value in _hashes(part.identity)]
    if part.record is not None and (weights := weights_of(part.record)) is not None:
        files = read_json(weights.parent / MANIFEST).get("files", {}) if (weights.parent / MANIFEST).is_file() else {}
        rows += [(f"{weights.parent.name}/{name}", entry["sha256"]) for name, entry in files.items()]
    rows.append(
        ("machine", f"{machine.device} {machine.device_name}, {machine.cores} cores, {size(machine.memory_bytes)}")
    )
    rows += [(name, version) for name, version in machine.versions.items()]
    rows += [(name, value_text(part.plan[name])) for name in ("seed", "now") if name in part.plan.choices]
    cells = [[quoted(name), tag("code", value, dir="auto")] for name, value in rows]
    return table(["What", "Which"], cells, label="Provenance")


def _model(plan: Plan) -> str:
    return f"{plan.model.name} ({plan.model.parameters / 1e6:,.1f}M parameters)" + (
        f": {plan.model.origin}" if plan.model.origin else ""
    )


def _hashes(identity: Json) -> list[tuple[str, str]]:
    """sha256 of what the run stands on."""
    found = [(f"base {name}", value) for name, value in identity.get("base_sha256", {}).items()]
    found += [(name, identity[name]) for name in ("tokenizer", "renderer") if name in identity]
    found += [(f"chat template {name}", value) for name, value in identity.get("templates", {}).items()]
    return found + [(f"rows of {role}", value) for role, value in identity.get("data", {}).items()]


def _proof(story: Story) -> Html | None:
    proof = story.record.proof if story.record else ()
    rows = [[quoted(one.kind), tag("b", one.level, class_=f"level {one.level}"), quoted(one.evidence)] for one in proof]
    return (
        details("Proven before training", table(["Check", "Level", "Evidence"], rows, label="Proof")) if rows else None
    )
