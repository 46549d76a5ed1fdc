"""Views of `data curate`: the subsets, why rows were not selected, and the ablation runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table

if TYPE_CHECKING:
    from tunesmith.advise.curate import CurationResult
    from tunesmith.advise.data_ablation import AblationResult, SubsetArm, SubsetRun

# The comparison is of the selected rows against an arm.
VERDICT_TEXTS = {
    "better": "selection trains better",
    "worse": "selection trains worse",
}
CONCLUSION_TEXTS = {
    "better": "worse than the selection",
    "worse": "better than the selection",
}


def render_curation(curation: CurationResult) -> RenderableType:
    """Show the selected subset with the baselines it has to beat, and why rows were rejected."""
    numbers = ("rows", "answer tokens", "perplexity", "difficulty", "agreement", "shared rows")
    table = make_table("Subsets, with median scores", "file", *numbers, numbers=numbers)
    for subset in curation.subsets:
        table.add_row(
            f"{subset.name}.jsonl",
            f"{subset.rows:,}",
            f"{subset.answer_tokens:,.0f}",
            f"{subset.perplexity:.2f}",
            f"{subset.difficulty:.3f}",
            "-" if subset.agreement is None else f"{subset.agreement:.2f}",
            f"{subset.shared_rows:,}",
        )
    reasons = make_table("", "not selected", "rows", numbers=("rows",))
    for reason, rows in curation.reasons.items():
        reasons.add_row(escape_markup(reason), f"{rows:,}")
    return Group(table, reasons, escape_markup(curation.path))


def report_subset_runs(results: Iterable[SubsetRun | AblationResult]) -> AblationResult:
    """Print each short run on stderr as it ends; return the result, which comes last."""
    from tunesmith.advise.data_ablation import AblationResult
    from tunesmith.evaluate.results import compute_score

    for result in results:
        if isinstance(result, AblationResult):
            return result
        name = f"trained on {result.name}, seed {result.seed}" if result.name else "before training"
        write_stderr(f"{name}: held-out loss {compute_score(result.held_out).value:.4f}\n")
    raise AssertionError("the ablation result comes last")


def render_ablation(ablation: AblationResult) -> RenderableType:
    """Show the held-out loss per subset, and the conclusion in one sentence."""
    seeds = f", {ablation.seeds} seeds" if ablation.seeds > 1 else ""
    title = (
        f"Held-out {ablation.metric} after {ablation.steps} steps of {ablation.batch_size} rows"
        f"{seeds}; {ablation.items} held-out rows (95% CI); {ablation.base_loss:.3f} untrained"
    )
    numbers = ("rows", "tokens", "loss", "selection minus it, by row", "by seed")
    table = make_table(title, "trained on", *numbers, "", numbers=numbers)
    for arm in ablation.arms:
        table.add_row(
            arm.name,
            f"{arm.rows:,}",
            f"{arm.tokens:,}",
            format_interval(arm.loss, arm.low, arm.high),
            _format_difference(arm),
            _format_seed_differences(arm) if ablation.seeds > 1 else "",
            VERDICT_TEXTS.get(arm.verdict, arm.verdict),
        )
    return Group(table, escape_markup(format_conclusion(ablation)))


def _format_difference(arm: SubsetArm) -> str:
    comparison = arm.comparison
    if comparison is None:
        return ""
    return f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"


def _format_seed_differences(arm: SubsetArm) -> str:
    return " ".join(f"{difference:+.3f}" for difference in arm.seed_differences)


def format_conclusion(ablation: AblationResult) -> str:
    """Say which subsets the selection beats, which beat it, and where the seeds disagree."""
    parts: list[str] = []
    disputed: list[str] = []
    for arm in ablation.arms:
        if arm.comparison is not None:
            parts.append(f"{arm.name}: {CONCLUSION_TEXTS.get(arm.verdict, arm.verdict)}")
        differences = arm.seed_differences
        if min(differences, default=0) < 0 < max(differences, default=0):
            disputed.append(arm.name)
    caveat = f"; seeds disagree on {', '.join(disputed)}" if disputed else ""
    return f"{', '.join(parts)}{caveat}"
