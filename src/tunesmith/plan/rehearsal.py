"""How much general text is rehearsed beside the data, and in what pieces.

In: the recipe and what is decided already. Out: a Choice a key, or none without `rehearsal`; on the way, the next ratio
of an adaptive one. Pure.
"""

from __future__ import annotations

from tunesmith.core.types import Choice, DataReport
from tunesmith.plan.rules import Known, rule
from tunesmith.recipe.fields import Rehearsal

SOURCE = "Ibrahim 2024, table 2; Bethune 2025"
FAR_INSIDE = 0.25  # of the margin
LEAST, MOST = 0.01, 0.5  # 1% already holds most of what is known; at a half, as much is rehearsed as learnt
WRITTEN = 32_768  # tokens that a model writes itself at most: a few minutes of a small one on a CPU
PIECE = 1024  # tokens: enough to have a context, few enough that a small ratio takes many texts


def rehearsal_choices(wish: Rehearsal | None, known: Known, report: DataReport | None) -> dict[str, Choice]:
    """`report`: of the rehearsal rows."""
    if wish is None:
        return {}
    by_rule = wish.ratio in ("auto", "adaptive")
    ratio = share(wish, known) if by_rule else Choice(wish.ratio, "you", "the recipe says so")
    choices = {"rehearsal_ratio": ratio, "rehearsal_length": length(known)}
    if wish.ratio == "adaptive":
        why = f"bits per byte that retention_data may lose: above it the ratio doubles, up to {MOST:.0%}; "
        choices["rehearsal_margin"] = rule(
            known["forgetting_margin"], f"{why}below a quarter it halves, down to {LEAST:.0%}", "ours"
        )
    due, data, where = _tokens(known, ratio.value)
    if wish.own:
        why = f"that the model writes itself before it is trained: as many as are due, at most {WRITTEN:,}"
        choices["rehearsal_tokens"] = rule(max(1, min(WRITTEN, round(due))), why, "Huang 2024, Xu 2024")
    if report is not None:
        passes = due / max(1, report.tokens)
        why = f"{ratio.why}; about {due:,.0f} tokens {where} {data:,.0f} of the data, {passes:.2g} passes over its rows"
        choices["rehearsal_ratio"] = Choice(ratio.value, ratio.by, why, ratio.source)
    return choices


def _tokens(known: Known, ratio: float) -> tuple[float, float, str]:
    """Tokens of the rehearsal, tokens of the data, and how the two go together."""
    if known.stage == "cpt":
        everything = known.steps * known["batch_tokens"]
        return everything * ratio, everything * (1 - ratio), "in the place of as many, which leaves"
    data = known.data.tokens / max(1, known.data.rows) * known["batch_size"] * known.steps
    return data * ratio / (1 - ratio), data, "beside"


def share(wish: Rehearsal, known: Known) -> Choice:
    """1% for style, 5% within a language (10% below 500M parameters, which forget more), 25% for a new language or
    code. Ibrahim 2024, 405M, English to German: old loss 3.56, 2.83, 2.57, 2.46, 2.33 at 0, 1, 5, 10, 25%, new loss
    1.11, 1.12, 1.12, 1.13, 1.16. Bethune 2025: 1% already holds most of it."""
    if wish.shift == "style":
        return rule(0.01, "shift: style moves the model little", SOURCE)
    if wish.shift == "language":
        return rule(0.25, "shift: language moves the model far", SOURCE)
    if known.model.parameters < 5e8:
        return rule(0.10, "shift: domain, and a model below 500M parameters forgets more than a large one", SOURCE)
    return rule(0.05, "shift: domain, within languages that the model knows", SOURCE)


def next_ratio(ratio: float, lost: float, margin: float) -> float:
    """The ratio from now on; `lost`: bits per byte above what general text took before training. Doubled and halved
    since what rehearsal holds goes with the logarithm of its share (Ibrahim 2024, see `share`); the bounds and the
    thresholds are ours."""
    if lost > margin:
        return max(ratio, min(MOST, 2 * ratio))
    if lost < FAR_INSIDE * margin:
        return min(ratio, max(LEAST, ratio / 2))
    return ratio


def length(known: Known) -> Choice:
    """Texts have no length of their own: as long as the data's documents, and long enough to have a context."""
    value = min(known["pack_length"], known.model.context_length, max(known["max_length"], PIECE))
    return rule(value, "a longer text gives one piece of so many tokens a pass, and another one in the next")
