"""How sure a value is, and how it stands to the usual advice: where it differs and what obeying would cost.

In: what is known and decided. Out: the same choices with `confidence` and `advice`. The usual advice is that of common
guides: PEFT before full fine-tuning, rates of 1e-5 to 5e-5, rank 8 for style and 64 to 256 for reasoning, packs of 4k
or 8k, a tenth of the original rate for continued pretraining, 5 to 10% rehearsal. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from tunesmith.core.types import Choice
from tunesmith.plan.memory import lora_parameters
from tunesmith.plan.rules import Known

Confidence = Literal["", "measured here", "published", "extrapolated"]
COUNTED = ("max_length", "share_prefixes", "dtype", "weight_layout", "activations", "rehearsal_length")
FITTED_WIDTH = 2000  # the rate's formula was fitted from this hidden size on
LOW, HIGH = 1e-5, 5e-5
TOKENS_OF_SKILL = 20_000_000  # trained ones, from which reasoning is a matter of capacity


def with_evidence(choices: Mapping[str, Choice], known: Known) -> dict[str, Choice]:
    return {
        key: dataclasses.replace(
            choice,
            confidence=confidence(key, choice, known),
            advice=ADVICE[key](known, choice) if key in ADVICE else "",
        )
        for key, choice in choices.items()
    }


def confidence(key: str, choice: Choice, known: Known) -> Confidence:
    """Of a rule's value: counted in these rows and on this machine, published, or beyond what was published. Nothing is
    said of what the user or the model's files decided, or of plain conventions."""
    if choice.by != "rule":
        return ""
    if key == "learning_rate" and _beyond(known, choice):
        return "extrapolated"
    if key in COUNTED:
        return "measured here"
    return "published" if choice.source not in ("", "ours") else ""


def _beyond(known: Known, choice: Choice) -> bool:
    if known.stage == "cpt":
        return "not known" in choice.why
    return known.model.hidden_size < FITTED_WIDTH


def _method(known: Known, choice: Choice) -> str:
    del known
    said = "LoRA or QLoRA in production, full fine-tuning for foundation training"
    return f"{said}: the same" if choice.value != "full" else f"{said}; full forgets more on code (Biderman 2024)"


def _learning_rate(known: Known, choice: Choice) -> str:
    rate = choice.value
    if known.stage == "cpt":
        return "a tenth of the original rate, against forgetting: the same, a tenth of the peak"
    if known.stage == "preference":
        return "says nothing on preference pairs"
    said = "1e-5 to 5e-5"
    if LOW <= rate <= HIGH:
        return f"{said}: inside"
    if known["method"] == "full":
        return (
            f"{said}: holds from about 3B parameters. SmolLM2-135M and 360M were tuned at 1e-3 (batch 128), so that "
            "5e-5 is far below the best rate of so small a model"
        )
    return (
        f"{said}: holds for full fine-tuning. With LoRA 4e-5 costs .025 nats a token at 8B, .046 at 3B and .059 at 1B "
        "(tinker cookbook's sweep, Tulu 3)"
    )


def _lora_r(known: Known, choice: Choice) -> str:
    said = "8 for style, 64 to 256 for complex reasoning"
    if 64 <= choice.value <= 256:
        return f"{said}: inside"
    more = 16 * (lora_parameters(known.model, 64) - lora_parameters(known.model, choice.value))
    few = known.data.supervised_tokens < TOKENS_OF_SKILL
    why = f"{known.data.supervised_tokens:,} trained tokens do not fill it" if few else "these rows may be worth it"
    return (
        f"{said}. Rank 64 takes {more / 1e6:,.0f} MB more; {why}. From rank 4 to 128 the loss falls by .009 nats at 8B "
        "and .040 at 1B, from a rate of 4e-5 to 3e-4 by .025 to .05 (tinker cookbook's sweep)"
    )


def _pack_length(known: Known, choice: Choice) -> str:
    del known
    inside = choice.value in (4096, 8192)
    return "4k or 8k, with masks between the examples: " + ("the same" if inside else "a document is longer than that")


def _rehearsal(known: Known, choice: Choice) -> str:
    del known
    said = "5 to 10% of the original data"
    if 0.05 <= choice.value <= 0.1:
        return f"{said}: inside"
    if choice.value < 0.05:
        return f"{said}; style moves a model little, and 1% already stops most forgetting (Bethune 2025)"
    return f"{said}: at 10% the old loss rises .13 nats more than at 25%, for .03 on a new language (Ibrahim 2024)"


def _epochs(known: Known, choice: Choice) -> str:
    del known, choice
    return "says nothing; 1,000 perfect examples before a million noisy ones"


ADVICE: dict[str, Callable[[Known, Choice], str]] = {
    "method": _method,
    "learning_rate": _learning_rate,
    "lora_r": _lora_r,
    "pack_length": _pack_length,
    "num_train_epochs": _epochs,
    "rehearsal_ratio": _rehearsal,
}
