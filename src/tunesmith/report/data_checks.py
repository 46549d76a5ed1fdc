"""Which checks of the data ran before training, and which did not.

In: a plan's DataReports. Out: CheckView for each group of checks. A run checks what it reads
anyway; it reads all texts, as `tunesmith data check` does, if that takes little of its time. Left
out: the checks (data/checks/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.types import DataReport, Finding

CheckState = Literal["found", "clean", "not run", "not applicable"]
OVERLAP_CHECKS = ("leaks", "near_leaks", "ngram_overlap")
HELD_OUT = ("eval_data", "test_data")


@dataclass(frozen=True)
class CheckGroup:
    title: str
    checks: tuple[str, ...]  # as findings name them
    reads_all: bool = False  # runs only where all texts are read


CHECK_GROUPS = (
    CheckGroup("Held-out rows that are also training rows", ("leaks",)),
    CheckGroup("Held-out rows that nearly repeat training rows", ("near_leaks",), True),
    CheckGroup("Passages that held-out rows share with training rows", ("ngram_overlap",), True),
    CheckGroup("Rows that cannot be used", ("rejected", "unread_files", "empty_prompts")),
    CheckGroup("Rows lost or cut by length", ("losses", "long_answers", "sampled")),
    CheckGroup("Rendering with the chat template", ("render", "system_turns", "dense")),
    CheckGroup("Answers that break the schema", ("answers",)),
    CheckGroup("Constraints of never", ("never",)),
    CheckGroup("Preference rows and labels", ("chosen_only", "label_balance")),
    CheckGroup("Keys of rows without effect", ("unused",)),
    CheckGroup("Equal rows", ("duplicates",)),
    CheckGroup("Nearly equal rows", ("near_duplicates",), True),
    CheckGroup("Prompts with several answers", ("conflicts",), True),
    CheckGroup("Keys and passwords", ("secrets",), True),
    CheckGroup("Personal data", ("personal",), True),
    CheckGroup("Languages", ("languages",), True),
    CheckGroup("Cut answers", ("cut_off", "unfinished", "cut_words", "broken_json"), True),
    CheckGroup("Empty answers, refusals and loops", (
        "empty_answers", "refusals", "apologies", "disclaimers", "loops", "echoes_prompt",
    ), True),
    CheckGroup("Markers, placeholders, invisible characters, order of tool results", (
        "chat_markers", "placeholders", "invisible_chars", "tool_order",
    ), True),
    CheckGroup("Balance of labels and fields", ("classes", "one_label", "lopsided"), True),
    CheckGroup("Wrong or swapped answers", ("mislabelled", "swapped", "label_in_prompt"), True),
    CheckGroup("Lengths of answers", ("lengths", "outliers", "length_bias"), True),
)  # fmt: skip


@dataclass(frozen=True)
class CheckView:
    title: str
    state: CheckState
    result: str


def list_checks(reports: Mapping[str, DataReport]) -> list[CheckView]:
    """Return what each group of checks found in the rows of all roles."""
    findings: list[tuple[str, Finding]] = []
    for role, report in reports.items():
        findings += [(role, finding) for finding in report.findings]
    read_all = any(report.is_fully_checked for report in reports.values())
    is_compared = "data" in reports and any(role in reports for role in HELD_OUT)
    views: list[CheckView] = []
    for group in CHECK_GROUPS:
        matches = [(role, finding) for role, finding in findings if finding.check in group.checks]
        if group.checks[0] in OVERLAP_CHECKS and not is_compared:
            reason = "no held-out rows to compare"
            views.append(CheckView(group.title, "not applicable", reason))
        elif group.reads_all and not read_all:
            views.append(CheckView(group.title, "not run", "not run"))
        else:
            views.append(_describe_group(group, matches))
    return views


def list_overlaps(reports: Mapping[str, DataReport]) -> list[str]:
    """Return what held-out rows share with training rows, as far as it is known."""
    lines: list[str] = []
    for role, report in reports.items():
        for finding in report.findings:
            if finding.check in OVERLAP_CHECKS:
                lines.append(f"{role}: {finding.message}")
    return lines


def _describe_group(group: CheckGroup, matches: list[tuple[str, Finding]]) -> CheckView:
    """Say how many rows of each role a group found; a check without its extra did not run."""
    skipped = [finding for _, finding in matches if "not checked" in finding.message]
    if skipped and len(skipped) == len(matches):
        return CheckView(group.title, "not run", f"not run: {skipped[0].message}")
    if not matches:
        return CheckView(group.title, "clean", "nothing found")
    counts: dict[str, int] = {}
    for role, finding in matches:
        counts[role] = counts.get(role, 0) + finding.count
    parts = [f"{count:,} in {role}" if count else role for role, count in counts.items()]
    return CheckView(group.title, "found", f"found: {', '.join(parts)}")
