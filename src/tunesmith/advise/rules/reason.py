"""What a rule of the rubric says, and the limits that rules go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.advise.rules.questionnaire import Need

Answer = Literal["prompt", "constrained decoding", "retrieval", "cpt", "sft", "preference"]
ANSWERS: tuple[Answer, ...] = ("prompt", "constrained decoding", "retrieval", "cpt", "sft", "preference")
TRAINING: tuple[Answer, ...] = ("cpt", "sft", "preference")
Confidence = Literal["published", "extrapolated", "ours"]

BYTES_A_TOKEN = 4  # English; fewer in other languages and in code
LEAST_EXAMPLES = 50
LEAST_PAIRS = 500
LEAST_TEXT = 1_300_000 * BYTES_A_TOKEN  # bytes
ENOUGH_TEXT = 1_000_000_000 * BYTES_A_TOKEN
FITS_A_PROMPT = 32_000 * BYTES_A_TOKEN
LEAST_PARAPHRASES = 10
LEAST_REQUESTS = 1_000  # a month
GOLDEN = 1_000


@dataclass(frozen=True)
class Reason:
    """`helps` and `rules_out` hold for `needs` alone; of `concerns` it says something worth knowing. A `source` that is
    unverified is cited from memory; its rule's docstring has its title."""

    rule: str
    needs: tuple[Need, ...]
    why: str
    source: str
    confidence: Confidence
    helps: tuple[Answer, ...] = ()
    rules_out: tuple[Answer, ...] = ()
    concerns: tuple[Answer, ...] = ()
    usual: str = ""
