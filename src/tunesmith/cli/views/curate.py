"""What `data curate` shows: the files beside each other, why rows are not kept, and which of the files trains best.

In: the objects of curate.py and tune/prove.py. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tunesmith.cli.progress import interval

if TYPE_CHECKING:
    from tunesmith.advise.curate import Curated
    from tunesmith.advise.data_ablation import Arm, Proof, Trained

WORDS = {"better": "kept trains better", "worse": "kept trains worse", "no difference shown": "no difference shown"}


def curated_view(curated: Curated) -> RenderableType:
    """What was kept beside what it has to beat, and why rows were not."""
    columns = ("file", "rows", "answer tokens", "perplexity", "difficulty", "agreement", "also kept")
    table = _table("Rows, and medians of their scores", *columns)
    for one in curated.subsets:
        agreement = "-" if one.agreement is None else f"{one.agreement:.2f}"
        scores = (f"{one.answer_tokens:,.0f}", f"{one.perplexity:.2f}", f"{one.difficulty:.3f}", agreement)
        table.add_row(f"{one.name}.jsonl", f"{one.rows:,}", *scores, f"{one.shared:,}")
    reasons = _table("", "not kept", "rows")
    for reason, rows in curated.reasons.items():
        reasons.add_row(escape(reason), f"{rows:,}")
    return Group(table, reasons, escape(curated.path))


def told(found: Iterable[Trained | Proof]) -> Proof:
    """Tells each short training on stderr as it ends; what they prove comes last."""
    from tunesmith.advise.data_ablation import Proof
    from tunesmith.evaluate.results import score

    for one in found:
        if isinstance(one, Proof):
            return one
        name = f"trained on {one.name}, seed {one.seed}" if one.name else "before training"
        sys.stderr.write(f"{name}: held-out loss {score(one.held_out).value:.4f}\n")
    raise AssertionError("a proof comes last")


def proof_view(proof: Proof) -> RenderableType:
    """The table, and in one sentence what it shows."""
    seeds = f", {proof.seeds} seeds" if proof.seeds > 1 else ""
    title = (
        f"Held-out {proof.metric} after {proof.steps} steps of {proof.batch_size} rows{seeds}; {proof.items} held-out "
        f"rows, 95% intervals; {proof.base:.3f} before training"
    )
    table = _table(title, "trained on", "rows", "tokens", "loss", "kept against it, by row", "by seed", "")
    for arm in proof.arms:
        loss = interval(arm.loss, arm.low, arm.high)
        table.add_row(
            arm.name, f"{arm.rows:,}", f"{arm.tokens:,}", loss, *_against(arm, proof.seeds), WORDS.get(arm.verdict)
        )
    return Group(table, escape(conclusion(proof)))


def _against(arm: Arm, seeds: int) -> tuple[str, str]:
    if arm.against is None:
        return "", ""
    change = f"{arm.against.difference:+.3f} [{arm.against.low:+.3f}, {arm.against.high:+.3f}]"
    return change, " ".join(f"{one:+.3f}" for one in arm.by_seed) if seeds > 1 else ""


def conclusion(proof: Proof) -> str:
    """What the kept rows beat, what beats them, and what no difference was shown from."""
    said = {"better": "is beaten by it", "worse": "trains better", "no difference shown": "no difference shown"}
    parts = [f"{arm.name}: {said[arm.verdict]}" for arm in proof.arms if arm.against is not None]
    split = [arm.name for arm in proof.arms if min(arm.by_seed, default=0) < 0 < max(arm.by_seed, default=0)]
    doubt = f"; seeds disagree on {', '.join(split)}" if split else ""
    return f"kept beside {', '.join(parts)}{doubt}"


def _table(title: str, *columns: str) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table
