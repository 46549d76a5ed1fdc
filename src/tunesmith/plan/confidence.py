"""How sure a value is, and how it stands to the usual advice: where it differs and what obeying
would cost.

In: what is known and decided. Out: the same choices with `confidence` and `advice`. The usual
advice is that of common guides: PEFT before full fine-tuning, rates of 1e-5 to 5e-5, rank 8 for
style and 64 to 256 for reasoning, packs of 4k or 8k, a tenth of the original rate for continued
pretraining, 5 to 10% rehearsal. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from tunesmith.core.types import PlanValue
from tunesmith.plan.memory import count_lora_parameters
from tunesmith.plan.rules import RuleContext

Confidence = Literal["", "measured here", "published", "extrapolated"]
MEASURED_SETTINGS = (
    "max_length",
    "share_prefixes",
    "dtype",
    "weight_layout",
    "gradient_checkpointing",
    "rehearsal_length",
)
MIN_FITTED_HIDDEN_SIZE = 2000  # the rate's formula was fitted from this hidden size on
USUAL_MIN_RATE, USUAL_MAX_RATE = 1e-5, 5e-5
REASONING_TOKENS = 20_000_000  # trained ones, from which reasoning is a matter of capacity


def add_evidence(
    plan_values: Mapping[str, PlanValue], context: RuleContext
) -> dict[str, PlanValue]:
    return {
        key: dataclasses.replace(
            plan_value,
            confidence=rate_confidence(key, plan_value, context),
            common_advice=ADVICE[key](context, plan_value) if key in ADVICE else "",
        )
        for key, plan_value in plan_values.items()
    }


def rate_confidence(key: str, plan_value: PlanValue, context: RuleContext) -> Confidence:
    """Of a rule's value: counted in these rows and on this machine, published, or beyond what was
    published. Nothing is said of what the user or the model's files decided, or of plain
    conventions."""
    if plan_value.decided_by != "rule":
        return ""
    if key == "learning_rate" and _is_extrapolated(context, plan_value):
        return "extrapolated"
    if key in MEASURED_SETTINGS:
        return "measured here"
    return "published" if plan_value.source not in ("", "ours") else ""


def _is_extrapolated(context: RuleContext, plan_value: PlanValue) -> bool:
    if context.stage == "cpt":
        return "not known" in plan_value.reason
    return context.model.hidden_size < MIN_FITTED_HIDDEN_SIZE


def _method(context: RuleContext, plan_value: PlanValue) -> str:
    del context
    usual = "LoRA or QLoRA in production, full fine-tuning for foundation training"
    return (
        f"{usual}: the same"
        if plan_value.value != "full"
        else f"{usual}; full forgets more on code (Biderman 2024)"
    )


def _learning_rate(context: RuleContext, plan_value: PlanValue) -> str:
    rate = plan_value.value
    if context.stage == "cpt":
        return "a tenth of the original rate, against forgetting: the same, a tenth of the peak"
    if context.stage == "preference":
        return "says nothing on preference pairs"
    usual = "1e-5 to 5e-5"
    if USUAL_MIN_RATE <= rate <= USUAL_MAX_RATE:
        return f"{usual}: inside"
    if context["method"] == "full":
        return (
            f"{usual}: holds from about 3B parameters. SmolLM2-135M and 360M were tuned at 1e-3 (batch 128), so that "
            "5e-5 is far below the best rate of so small a model"
        )
    return (
        f"{usual}: holds for full fine-tuning. With LoRA 4e-5 costs .025 nats a token at 8B, .046 at 3B and .059 at 1B "
        "(tinker cookbook's sweep, Tulu 3)"
    )


def _lora_r(context: RuleContext, plan_value: PlanValue) -> str:
    usual = "8 for style, 64 to 256 for complex reasoning"
    if 64 <= plan_value.value <= 256:
        return f"{usual}: inside"
    extra_bytes = 16 * (
        count_lora_parameters(context.model, 64)
        - count_lora_parameters(context.model, plan_value.value)
    )
    is_small = context.data.supervised_tokens < REASONING_TOKENS
    reason = (
        f"{context.data.supervised_tokens:,} trained tokens do not fill it"
        if is_small
        else "these rows may be worth it"
    )
    return (
        f"{usual}. Rank 64 takes {extra_bytes / 1e6:,.0f} MB more; {reason}. From rank 4 to 128 the loss falls by .009 nats at 8B "
        "and .040 at 1B, from a rate of 4e-5 to 3e-4 by .025 to .05 (tinker cookbook's sweep)"
    )


def _pack_length(context: RuleContext, plan_value: PlanValue) -> str:
    del context
    is_usual = plan_value.value in (4096, 8192)
    return "4k or 8k, with masks between the examples: " + (
        "the same" if is_usual else "a document is longer than that"
    )


def _rehearsal_ratio(context: RuleContext, plan_value: PlanValue) -> str:
    del context
    usual = "5 to 10% of the original data"
    if 0.05 <= plan_value.value <= 0.1:
        return f"{usual}: inside"
    if plan_value.value < 0.05:
        return f"{usual}; style moves a model little, and 1% already stops most forgetting (Bethune 2025)"
    return f"{usual}: at 10% the old loss rises .13 nats more than at 25%, for .03 on a new language (Ibrahim 2024)"


def _num_train_epochs(context: RuleContext, plan_value: PlanValue) -> str:
    del context, plan_value
    return "says nothing; 1,000 perfect examples before a million noisy ones"


ADVICE: dict[str, Callable[[RuleContext, PlanValue], str]] = {
    "method": _method,
    "learning_rate": _learning_rate,
    "lora_r": _lora_r,
    "pack_length": _pack_length,
    "num_train_epochs": _num_train_epochs,
    "rehearsal_ratio": _rehearsal_ratio,
}
