"""What the plan says of tokens that a recipe adds: their numbers, how they start, what is trained
and saved of them.

In: the new tokens and the model's shape. Out: a Choice a key, or none without new tokens. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.core.types import ModelSpec, NewToken, PlanValue
from tunesmith.plan.rules import RuleContext, rule_value

SOURCE = "Koto 2021, IndoBERTweet; Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models; unverified"
MAX_SHOWN = 5
NEW_ROWS_FACTOR, MAX_NEW_ROWS_RATE = 10.0, 0.01


def decide_new_tokens(tokens: Sequence[NewToken], model: ModelSpec) -> dict[str, PlanValue]:
    """Text -> number of each."""
    if not tokens:
        return {}
    extra_rows = 1 + max(token.id for token in tokens) - model.vocab_size
    embedding_note = (
        f"the embedding grows by {extra_rows:,} rows"
        if extra_rows > 0
        else "the embedding has spare rows for them"
    )
    pieces = ", ".join(f"{len(token.subword_ids)} for {token.text}" for token in tokens[:MAX_SHOWN])
    reason = f"one token each, starting as the mean of the pieces that it was until now ({pieces}); {embedding_note}"
    return {
        "add_tokens": PlanValue({token.text: token.id for token in tokens}, "user", reason, SOURCE)
    }


def decide_new_rows(tokens: PlanValue | None, context: RuleContext) -> dict[str, PlanValue]:
    """Beside an adapter: the new rows of the embedding and of the head, nothing else of either. All
    weights are trained anyway with method: full."""
    if tokens is None or context["method"] == "full":
        return {}
    model = context.model
    modules = ("embed_tokens",) if model.tie_word_embeddings else ("embed_tokens", "lm_head")
    num_values = len(tokens.value) * len(modules) * model.hidden_size
    reason = (
        f"of {' and '.join(modules)}{' (the head is tied to it)' * model.tie_word_embeddings} the rows of the new tokens are "
        f"trained and saved with the adapter, {num_values:,} values; all other rows stay as they are, to the bit"
    )
    return {
        "modules_to_save": rule_value(modules, reason, "PEFT: trainable_token_indices"),
        "new_rows_lr_factor": decide_rate_factor(context),
    }


def decide_rate_factor(context: RuleContext) -> PlanValue:
    """Adam moves a value by about the rate in a step, however large it is: what starts from nothing
    needs the rates of a pretraining, 1e-3 to 1e-2."""
    factor = max(1.0, min(NEW_ROWS_FACTOR, MAX_NEW_ROWS_RATE / context["learning_rate"]))
    reason = f"new rows learn at {factor * context['learning_rate']:.2g}: they start from nothing, the adapter beside a model"
    return rule_value(round(factor, 3), reason, "measured: docs/results/methods.md")


def count_trained_rows(plan_values: Mapping[str, PlanValue]) -> int:
    """Rows of any matrix that are trained beside an adapter."""
    if "modules_to_save" not in plan_values:
        return 0
    return len(plan_values["add_tokens"].value) * len(plan_values["modules_to_save"].value)
