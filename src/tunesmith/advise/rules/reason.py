"""What a rule of the rubric says, and the limits that rules go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.advise.rules.questionnaire import Need

Approach = Literal["prompt", "constrained decoding", "retrieval", "cpt", "sft", "preference"]
APPROACHES: tuple[Approach, ...] = (
    "prompt",
    "constrained decoding",
    "retrieval",
    "cpt",
    "sft",
    "preference",
)
TRAINING_APPROACHES: tuple[Approach, ...] = ("cpt", "sft", "preference")
RuleConfidence = Literal["published", "extrapolated", "ours"]

BYTES_PER_TOKEN = 4  # English; fewer in other languages and in code
MIN_EXAMPLES = 50
MIN_PAIRS = 500
MIN_TEXT_BYTES = 1_300_000 * BYTES_PER_TOKEN  # bytes
AMPLE_TEXT_BYTES = 1_000_000_000 * BYTES_PER_TOKEN
MAX_PROMPT_BYTES = 32_000 * BYTES_PER_TOKEN
MIN_PARAPHRASES = 10
MIN_MONTHLY_REQUESTS = 1_000  # a month
PLATEAU_EXAMPLES = 1_000


@dataclass(frozen=True)
class RuleResult:
    """`helps` and `rules_out` hold for `needs` alone; of `concerns` it says something worth
    knowing. A `source` that is unverified is cited from memory; its rule's docstring has its
    title."""

    rule: str
    needs: tuple[Need, ...]
    explanation: str
    source: str
    confidence: RuleConfidence
    recommended: tuple[Approach, ...] = ()
    ruled_out: tuple[Approach, ...] = ()
    concerns: tuple[Approach, ...] = ()
    common_advice: str = ""
