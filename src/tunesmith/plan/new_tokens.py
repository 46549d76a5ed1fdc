"""Settings of the tokens that a recipe adds: their ids, and which of their rows are trained.

In: the new tokens and the shape of the model. Out: a PlanValue per setting; none without new
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import ModelSpec, NewToken, PlanValue
from tunesmith.plan.rules import RuleContext, make_rule_value

SOURCE = (
    "Koto 2021, IndoBERTweet; Hewitt 2021, Initializing New Word Embeddings for Pretrained "
    "Language Models; unverified"
)
MAX_SHOWN = 5  # tokens named in a reason
# model types whose embedding is not called embed_tokens
OTHER_EMBEDDINGS = {"gpt2", "gpt_neox", "nemotron_h"}
NEW_ROWS_FACTOR = 10.0  # learning rate of new rows relative to the adapter's, at most
MAX_NEW_ROWS_RATE = 0.01


def decide_new_tokens(tokens: Sequence[NewToken], model: ModelSpec) -> dict[str, PlanValue]:
    """Return `add_tokens`: text -> token id."""
    if not tokens:
        return {}
    ids = {token.text: token.id for token in tokens}
    extra_rows = 1 + max(ids.values()) - model.vocab_size
    embedding = "the embedding has spare rows for them"
    if extra_rows > 0:
        embedding = f"the embedding grows by {extra_rows:,} {'row' if extra_rows == 1 else 'rows'}"
    counts = ", ".join(f"{len(token.subword_ids)} for {token.text}" for token in tokens[:MAX_SHOWN])
    reason = f"each starts as the mean of its former subword tokens ({counts}); {embedding}"
    return {"add_tokens": PlanValue(ids, "user", reason, SOURCE)}


def decide_new_rows(tokens: PlanValue | None, context: RuleContext) -> dict[str, PlanValue]:
    """Return the settings of the new rows of embedding and head, which are trained along with an
    adapter. Full fine-tuning trains all rows anyway."""
    if tokens is None or context["method"] == "full":
        return {}
    model = context.model
    if model.model_type in OTHER_EMBEDDINGS:
        message = f"new tokens are not supported for {model.model_type}"
        raise InputError(message, where="add_tokens", fix="leave add_tokens out")
    modules = ("embed_tokens",) if model.tie_word_embeddings else ("embed_tokens", "lm_head")
    num_values = len(tokens.value) * len(modules) * model.hidden_size
    tied = " (tied to the head)" if model.tie_word_embeddings else ""
    reason = (
        f"the new rows of {' and '.join(modules)}{tied} are trained and saved with the adapter, "
        f"{num_values:,} values; all other rows stay identical"
    )
    return {
        "new_rows_modules": make_rule_value(modules, reason, "PEFT: trainable_token_indices"),
        "new_rows_lr_factor": decide_rate_factor(context),
    }


def decide_rate_factor(context: RuleContext) -> PlanValue:
    """Return the learning rate of new rows relative to the adapter's.

    An Adam step changes a value by about the learning rate, so rows that start untrained need the
    rates of pretraining, 1e-3 to 1e-2."""
    factor = max(1.0, min(NEW_ROWS_FACTOR, MAX_NEW_ROWS_RATE / context["learning_rate"]))
    rate = factor * context["learning_rate"]
    reason = f"new rows learn at {rate:.2g}, since they start untrained"
    return make_rule_value(round(factor, 3), reason, "measured: docs/results/methods.md")


def count_trained_rows(plan_values: Mapping[str, PlanValue]) -> int:
    """Return how many rows of embedding and head are trained along with an adapter."""
    if "new_rows_modules" not in plan_values:
        return 0
    return len(plan_values["add_tokens"].value) * len(plan_values["new_rows_modules"].value)
