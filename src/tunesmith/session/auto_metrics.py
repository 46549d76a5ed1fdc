"""What `metrics: auto` means, by the answers of the rows: docs/reference/metrics.md has the table.

Few texts are ever equal to the expected one, and a metric that stays at 0 shows no gain."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from itertools import islice
from statistics import median_low

from tunesmith.core.types import PlanValue
from tunesmith.data.answer_values import refuse_constant
from tunesmith.data.labels import iter_answers
from tunesmith.plan.rules import EXACT_MATCH, make_rule_value
from tunesmith.session.inputs import RunInputs

OF_LABELS = ("accuracy", "macro_f1", "multiple_choice")
OF_SCHEMA = ("field_f1", "schema_valid", "json_valid")
MAX_ROWS = 2_000  # training rows that are read, drawn at random
MIN_JSON_SHARE = 0.9  # of the training answers, and all held-out ones
MAX_WORDS = 3  # of the median answer that is compared as one value
# two characters of a script without spaces count as a word: Thai, Lao, kana, Chinese
WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]{1,2}|\w[\w.,'-]*")


def choose_metrics(inputs: RunInputs, labels: Collection[str]) -> PlanValue:
    """Return the metrics, of which the first decides the verdict; no answer is read in vain."""
    recipe = inputs.recipe
    if recipe.metrics != "auto" or recipe.stage != "sft":
        return EXACT_MATCH
    if labels and recipe.response_schema is None:
        return make_rule_value(OF_LABELS, f"the answers are {len(labels)} labels")
    names, reason = _choose_by_answers(inputs)
    if any(name.endswith("exact_match") for name in recipe.gates):
        names = tuple(dict.fromkeys((*names, "exact_match")))
    return make_rule_value(names, reason)


def _choose_by_answers(inputs: RunInputs) -> tuple[tuple[str, ...], str]:
    if inputs.recipe.response_schema is not None:
        return OF_SCHEMA, "response_schema: an answer is right if every field is"
    trained = [text for _, text in islice(iter_answers(inputs.datasets["data"]), MAX_ROWS) if text]
    held_out = inputs.datasets.keys() & {"eval_data", "test_data"}
    tests = [text for role in held_out for _, text in iter_answers(inputs.datasets[role]) if text]
    share = sum(map(_is_json, trained)) / max(1, len(trained))
    if share >= MIN_JSON_SHARE and all(map(_is_json, tests)):
        reason = f"{share:.0%} of the answers are JSON: one is right if every field is"
        return ("field_f1", "json_valid"), reason
    words = median_low([len(WORD.findall(text)) for text in trained] or [0])
    if words > MAX_WORDS:
        return ("chrf",), f"texts, half of them of {words} words or more, are rarely equal"
    return EXACT_MATCH.value, EXACT_MATCH.reason


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=refuse_constant), (dict, list))
    except (ValueError, RecursionError):
        return False
