"""What `data curate` shows: the files beside each other, why rows are not kept, and which of the
files trains best.

In: the objects of curate.py and tune/prove.py. Out: things that `rich` can print. Programs read the
JSON instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tunesmith.cli.progress import format_interval

if TYPE_CHECKING:
    from tunesmith.advise.curate import CurationResult
    from tunesmith.advise.data_ablation import AblationResult, SubsetArm, SubsetRun

VERDICT_TEXTS = {
    "better": "kept trains better",
    "worse": "kept trains worse",
    "no difference shown": "no difference shown",
}


def render_curation(curation: CurationResult) -> RenderableType:
    """What was kept beside what it has to beat, and why rows were not."""
    columns = (
        "file",
        "rows",
        "answer tokens",
        "perplexity",
        "difficulty",
        "agreement",
        "also kept",
    )
    table = _make_table("Rows, and medians of their scores", *columns)
    for subset in curation.subsets:
        agreement = "-" if subset.agreement is None else f"{subset.agreement:.2f}"
        scores = (
            f"{subset.answer_tokens:,.0f}",
            f"{subset.perplexity:.2f}",
            f"{subset.difficulty:.3f}",
            agreement,
        )
        table.add_row(
            f"{subset.name}.jsonl", f"{subset.rows:,}", *scores, f"{subset.shared_rows:,}"
        )
    reasons = _make_table("", "not kept", "rows")
    for reason, rows in curation.reasons.items():
        reasons.add_row(escape(reason), f"{rows:,}")
    return Group(table, reasons, escape(curation.path))


def report_subset_runs(results: Iterable[SubsetRun | AblationResult]) -> AblationResult:
    """Tells each short training on stderr as it ends; what they prove comes last."""
    from tunesmith.advise.data_ablation import AblationResult
    from tunesmith.evaluate.results import compute_score

    for result in results:
        if isinstance(result, AblationResult):
            return result
        name = f"trained on {result.name}, seed {result.seed}" if result.name else "before training"
        sys.stderr.write(f"{name}: held-out loss {compute_score(result.held_out).value:.4f}\n")
    raise AssertionError("a proof comes last")


def render_ablation(ablation: AblationResult) -> RenderableType:
    """The table, and in one sentence what it shows."""
    seeds = f", {ablation.seeds} seeds" if ablation.seeds > 1 else ""
    title = (
        f"Held-out {ablation.metric} after {ablation.steps} steps of {ablation.batch_size} rows{seeds}; {ablation.items} held-out "
        f"rows, 95% intervals; {ablation.base_loss:.3f} before training"
    )
    table = _make_table(
        title, "trained on", "rows", "tokens", "loss", "kept against it, by row", "by seed", ""
    )
    for arm in ablation.arms:
        loss = format_interval(arm.loss, arm.low, arm.high)
        table.add_row(
            arm.name,
            f"{arm.rows:,}",
            f"{arm.tokens:,}",
            loss,
            *_format_difference(arm, ablation.seeds),
            VERDICT_TEXTS.get(arm.verdict),
        )
    return Group(table, escape(format_conclusion(ablation)))


def _format_difference(arm: SubsetArm, seeds: int) -> tuple[str, str]:
    if arm.comparison is None:
        return "", ""
    change = (
        f"{arm.comparison.difference:+.3f} [{arm.comparison.low:+.3f}, {arm.comparison.high:+.3f}]"
    )
    return change, " ".join(
        f"{difference:+.3f}" for difference in arm.seed_differences
    ) if seeds > 1 else ""


def format_conclusion(ablation: AblationResult) -> str:
    """What the kept rows beat, what beats them, and what no difference was shown from."""
    verdict_texts = {
        "better": "is beaten by it",
        "worse": "trains better",
        "no difference shown": "no difference shown",
    }
    parts = [
        f"{arm.name}: {verdict_texts[arm.verdict]}"
        for arm in ablation.arms
        if arm.comparison is not None
    ]
    disputed = [
        arm.name
        for arm in ablation.arms
        if min(arm.seed_differences, default=0) < 0 < max(arm.seed_differences, default=0)
    ]
    caveat = f"; seeds disagree on {', '.join(disputed)}" if disputed else ""
    return f"kept beside {', '.join(parts)}{caveat}"


def _make_table(title: str, *columns: str) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table
