"""Warnings on values that are far from any usual one, each with what the rule gives.

They are never refusals. Left out: settings that contradict each other (build.py)."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.plan.rules import RULES, RuleContext
from tunesmith.plan.rules_cpt import CPT_RULES

MAX_RATE_FACTOR = 10  # of the rate of the rule; 1e-3 is twice that of SmolLM2-135M
MAX_REPEATS = 50  # of a row
MAX_DECAY = 0.3
MAX_DROPOUT = 0.5


def list_unusual(context: RuleContext) -> Iterator[str]:
    """Yield a warning for each value of the user that is out of any usual range."""
    rules = CPT_RULES if context.stage == "cpt" else RULES
    value = context.settings
    rank = context.settings.get("lora_r")
    hidden_size = context.model.hidden_size
    rows = max(1, context.data.rows)
    repeats = context.steps * value["batch_size"].value / rows if "batch_size" in value else 0
    # key, whether it is unusual, why
    unusual = (
        (
            "learning_rate",
            context["learning_rate"] >= MAX_RATE_FACTOR * rules["learning_rate"](context).value,
            f"{MAX_RATE_FACTOR} times the rule or more: the loss may diverge",
        ),
        (
            "lora_r",
            rank is not None and rank.value > hidden_size,
            f"above the hidden size of {hidden_size}: such a matrix has no higher rank",
        ),
        ("num_train_epochs", repeats >= MAX_REPEATS, f"each row is repeated {repeats:.0f} times"),
        ("warmup_ratio", context["warmup_ratio"] > 0.5, "most of the run is warm-up"),
        ("weight_decay", context["weight_decay"] > MAX_DECAY, "usual are 0 to 0.1"),
        (
            "lora_dropout",
            "lora_dropout" in value and context["lora_dropout"] > MAX_DROPOUT,
            "usual are 0 to 0.1",
        ),
    )
    for key, is_unusual, why in unusual:
        if is_unusual and value[key].decided_by == "user":
            by_rule = rules[key](context).value
            yield f"{key} {context[key]:g}: {why}; the rule gives {by_rule:g}"
