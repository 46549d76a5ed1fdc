"""How much general text is rehearsed beside the data, and in what pieces.

In: the recipe and what is decided already. Out: a Choice a key, or none without `rehearsal`; on the
way, the next ratio of an adaptive one. Pure."""

from __future__ import annotations

from tunesmith.core.types import DataReport, PlanValue
from tunesmith.plan.rules import RuleContext, rule_value
from tunesmith.recipe.fields import RehearsalConfig

SOURCE = "Ibrahim 2024, table 2; Bethune 2025"
DECREASE_THRESHOLD = 0.25  # of the margin
MIN_RATIO, MAX_RATIO = (
    0.01,
    0.5,
)  # 1% already holds most of what is known; at a half, as much is rehearsed as learnt
# tokens that a model writes itself at most: a few minutes of a small one on a CPU
MAX_GENERATED_TOKENS = 32_768
# tokens: enough to have a context, few enough that a small ratio takes many texts
MIN_CHUNK_TOKENS = 1024


def decide_rehearsal(
    rehearsal: RehearsalConfig | None, context: RuleContext, report: DataReport | None
) -> dict[str, PlanValue]:
    """`report`: of the rehearsal rows."""
    if rehearsal is None:
        return {}
    is_automatic = rehearsal.ratio in ("auto", "adaptive")
    ratio = (
        decide_ratio(rehearsal, context)
        if is_automatic
        else PlanValue(rehearsal.ratio, "user", "the recipe says so")
    )
    plan_values = {"rehearsal_ratio": ratio, "rehearsal_length": decide_length(context)}
    if rehearsal.ratio == "adaptive":
        reason = f"bits per byte that retention_data may lose: above it the ratio doubles, up to {MAX_RATIO:.0%}; "
        plan_values["rehearsal_margin"] = rule_value(
            context["forgetting_margin"],
            f"{reason}below a quarter it halves, down to {MIN_RATIO:.0%}",
            "ours",
        )
    rehearsal_tokens, data_tokens, relation = _count_tokens(context, ratio.value)
    if rehearsal.is_self_generated:
        reason = f"that the model writes itself before it is trained: as many as are due, at most {MAX_GENERATED_TOKENS:,}"
        plan_values["rehearsal_tokens"] = rule_value(
            max(1, min(MAX_GENERATED_TOKENS, round(rehearsal_tokens))),
            reason,
            "Huang 2024, Xu 2024",
        )
    if report is not None:
        passes = rehearsal_tokens / max(1, report.tokens)
        reason = f"{ratio.reason}; about {rehearsal_tokens:,.0f} tokens {relation} {data_tokens:,.0f} of the data, {passes:.2g} passes over its rows"
        plan_values["rehearsal_ratio"] = PlanValue(
            ratio.value, ratio.decided_by, reason, ratio.source
        )
    return plan_values


def _count_tokens(context: RuleContext, ratio: float) -> tuple[float, float, str]:
    """Tokens of the rehearsal, tokens of the data, and how the two go together."""
    if context.stage == "cpt":
        total_tokens = context.steps * context["batch_tokens"]
        return (
            total_tokens * ratio,
            total_tokens * (1 - ratio),
            "in the place of as many, which leaves",
        )
    data_tokens = (
        context.data.tokens / max(1, context.data.rows) * context["batch_size"] * context.steps
    )
    return data_tokens * ratio / (1 - ratio), data_tokens, "beside"


def decide_ratio(rehearsal: RehearsalConfig, context: RuleContext) -> PlanValue:
    """1% for style, 5% within a language (10% below 500M parameters, which forget more), 25% for a
    new language or code. Ibrahim 2024, 405M, English to German: old loss 3.56, 2.83, 2.57, 2.46,
    2.33 at 0, 1, 5, 10, 25%, new loss 1.11, 1.12, 1.12, 1.13, 1.16. Bethune 2025: 1% already holds
    most of it."""
    if rehearsal.shift == "style":
        return rule_value(0.01, "shift: style moves the model little", SOURCE)
    if rehearsal.shift == "language":
        return rule_value(0.25, "shift: language moves the model far", SOURCE)
    if context.model.parameters < 5e8:
        return rule_value(
            0.10,
            "shift: domain, and a model below 500M parameters forgets more than a large one",
            SOURCE,
        )
    return rule_value(0.05, "shift: domain, within languages that the model knows", SOURCE)


def compute_next_ratio(ratio: float, forgetting: float, margin: float) -> float:
    """The ratio from now on; `lost`: bits per byte above what general text took before training.
    Doubled and halved since what rehearsal holds goes with the logarithm of its share (Ibrahim
    2024, see `share`); the bounds and the thresholds are ours."""
    if forgetting > margin:
        return max(ratio, min(MAX_RATIO, 2 * ratio))
    if forgetting < DECREASE_THRESHOLD * margin:
        return min(ratio, max(MIN_RATIO, ratio / 2))
    return ratio


def decide_length(context: RuleContext) -> PlanValue:
    """Texts have no length of their own: as long as the data's documents, and long enough to have a
    context."""
    value = min(
        context["pack_length"],
        context.model.context_length,
        max(context["max_length"], MIN_CHUNK_TOKENS),
    )
    return rule_value(
        value, "a longer text gives one piece of so many tokens a pass, and another one in the next"
    )
