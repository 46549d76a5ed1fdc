"""The rules of rubric.py put together.

    Situation -> reasons -> Advice

For each need, an answer is advised if a rule speaks for it and none rules it out; that is all. What
would change the advice is found by asking again with one fact changed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.advise.rules.questionnaire import (
    NEEDS,
    PROMPT_QUALITIES,
    Need,
    Requirements,
    select_questions,
)
from tunesmith.advise.rules.reason import (
    APPROACHES,
    MAX_PROMPT_BYTES,
    MIN_EXAMPLES,
    MIN_MONTHLY_REQUESTS,
    MIN_PAIRS,
    MIN_PARAPHRASES,
    MIN_TEXT_BYTES,
    TRAINING_APPROACHES,
    Approach,
    RuleResult,
)
from tunesmith.advise.rules.rubric import RULES
from tunesmith.core.atomic import format_bytes


@dataclass(frozen=True)
class Recommendation:
    """An answer to take, in its turn. `next`: what to do first, `command` after it, where there is
    one."""

    approach: Approach
    needs: tuple[Need, ...]
    reasons: tuple[RuleResult, ...]
    next_step: str
    command: str


@dataclass(frozen=True)
class Counterfactual:
    """With this fact alone another one, the advice would be `answers`."""

    condition: str
    approaches: tuple[Approach, ...]
    verdict: str


@dataclass(frozen=True)
class Advice:
    verdict: Literal["fine-tune", "don't fine-tune"]
    recommendations: tuple[
        Recommendation, ...
    ]  # in the order to take them; empty: nothing helps yet
    objections: tuple[RuleResult, ...]  # what ruled something out
    counterfactuals: tuple[Counterfactual, ...]
    requirements: Requirements
    assumed: tuple[str, ...]  # facts that matter and count as not there

    @property
    def approaches(self) -> tuple[Approach, ...]:
        return tuple(recommendation.approach for recommendation in self.recommendations)


def advise(requirements: Requirements, recipe: Path | None = None) -> Advice:
    """`recipe`: the one whose rows were counted, for the commands."""
    approaches_by_need, reasons = apply_rules(requirements)
    recommendations = [
        Recommendation(
            approach,
            needs,
            _select_reasons(reasons, approach, needs),
            *_describe_next_step(approach, requirements, recipe),
        )
        for approach in APPROACHES
        if (needs := _find_served_needs(approach, approaches_by_need))
    ]
    assumed = [
        name for name in select_questions(requirements.need) if getattr(requirements, name) is None
    ]
    return Advice(
        choose_verdict(approaches_by_need),
        tuple(recommendations),
        tuple(reason for reason in reasons if reason.ruled_out and _is_relevant(reason, reasons)),
        tuple(_find_counterfactuals(requirements)),
        requirements,
        tuple(assumed),
    )


def apply_rules(
    requirements: Requirements,
) -> tuple[dict[Need, tuple[Approach, ...]], tuple[RuleResult, ...]]:
    """The answers to each need, and all reasons that bear on one of the needs."""
    rule_results = (rule(requirements) for rule in RULES)
    reasons = tuple(
        reason
        for reason in rule_results
        if reason is not None and set(reason.needs) & set(requirements.need)
    )
    return {
        need: _select_approaches([reason for reason in reasons if need in reason.needs])
        for need in requirements.need
    }, reasons


def _select_approaches(reasons: list[RuleResult]) -> tuple[Approach, ...]:
    recommended = {approach for reason in reasons for approach in reason.recommended}
    ruled_out = {approach for reason in reasons for approach in reason.ruled_out}
    return tuple(approach for approach in APPROACHES if approach in recommended - ruled_out)


def choose_verdict(
    approaches_by_need: dict[Need, tuple[Approach, ...]],
) -> Literal["fine-tune", "don't fine-tune"]:
    return (
        "fine-tune"
        if any(
            approach in TRAINING_APPROACHES
            for approaches in approaches_by_need.values()
            for approach in approaches
        )
        else "don't fine-tune"
    )


def _find_served_needs(
    approach: Approach, approaches_by_need: dict[Need, tuple[Approach, ...]]
) -> tuple[Need, ...]:
    return tuple(need for need, approaches in approaches_by_need.items() if approach in approaches)


def _select_reasons(
    reasons: tuple[RuleResult, ...], approach: Approach, needs: tuple[Need, ...]
) -> tuple[RuleResult, ...]:
    """The reasons for an answer, then what is worth knowing of it."""
    relevant = [reason for reason in reasons if set(reason.needs) & set(needs)]
    return (
        *(reason for reason in relevant if approach in reason.recommended),
        *(reason for reason in relevant if approach in reason.concerns),
    )


def _is_relevant(objection: RuleResult, reasons: tuple[RuleResult, ...]) -> bool:
    """Whether it says no to what another rule speaks for, or to what guides usually advise."""
    recommended = {
        (need, approach)
        for reason in reasons
        for need in reason.needs
        for approach in reason.recommended
    }
    common_advice = {
        ("facts", "sft"),
        ("domain", "cpt"),
        ("format", "sft"),
        ("skill", "sft"),
        ("latency", "sft"),
        ("tone", "sft"),
    }
    return any(
        (need, approach) in recommended | common_advice
        for need in objection.needs
        for approach in objection.ruled_out
    )


# ---------------------------------------------------------------- what next


def _describe_next_step(
    approach: Approach, requirements: Requirements, recipe: Path | None
) -> tuple[str, str]:
    recipe_path = shlex.quote(str(recipe or "recipe.yaml"))
    init_command = "" if recipe else f"tunesmith init {recipe_path} && "
    if approach == "prompt" and requirements.prompt in ("close", "good"):
        return (
            "keep the prompt, and the questions that it was tried on with their right answers",
            "",
        )
    if approach == "prompt":
        next_step = "write down 100 questions with right answers as `eval_data`: prompts are tried on them, and what else helps"
        return next_step, f"{init_command}tunesmith advise --measure {recipe_path}"
    return {
        "constrained decoding": (
            "send the schema with the request: `response_format` of llama.cpp's server or vLLM; what it brings is "
            "measured beside prompts and trainings",
            f"{init_command}tunesmith advise --measure {recipe_path} --schema schema.json",
        ),
        "retrieval": (
            "put the documents into a folder: how often the right passage is found, and what the model makes of it, is "
            "measured",
            f"{init_command}tunesmith advise --measure {recipe_path} --documents FOLDER",
        ),
        "cpt": (
            "put the texts into a folder, and hold some out",
            f"{init_command}tunesmith plan {recipe_path} --stage cpt",
        ),
        "sft": (
            "put the rows into a file, and hold some out",
            f"{init_command}tunesmith data check {recipe_path}",
        ),
        "preference": (
            "put the pairs into a file, and hold some out",
            f"tunesmith plan {recipe_path} --stage preference",
        ),
    }[approach]


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------- what would change it

THRESHOLDS: tuple[tuple[str, int, tuple[Need, ...]], ...] = (
    ("raw_text", MAX_PROMPT_BYTES + 1, ("facts",)),
    ("raw_text", MIN_TEXT_BYTES, ("domain",)),
    ("paraphrases", MIN_PARAPHRASES, ("facts",)),
    ("examples", MIN_EXAMPLES, NEEDS),
    ("pairs", MIN_PAIRS, ("tone", "skill")),
    ("requests_month", MIN_MONTHLY_REQUESTS, ("latency",)),
)
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "facts_change": ("never", "weekly"),
    "prompt": PROMPT_QUALITIES,
    "private": (True, False),
}


def _find_counterfactuals(requirements: Requirements) -> Iterator[Counterfactual]:
    """One fact at a time, the others as they are; values of a fact that come to the same are one
    change."""
    current = apply_rules(requirements)[0]
    values_by_change: dict[tuple[str, tuple[Approach, ...], str], list[str]] = {}
    for name, value, label in _iter_alternatives(requirements):
        approaches_by_need = apply_rules(dataclasses.replace(requirements, **{name: value}))[0]
        approaches: tuple[Approach, ...] = tuple(
            approach
            for approach in APPROACHES
            if any(approach in chosen for chosen in approaches_by_need.values())
        )
        if approaches_by_need != current:
            values_by_change.setdefault(
                (name, approaches, choose_verdict(approaches_by_need)), []
            ).append(label)
    for (name, approaches, verdict), label in values_by_change.items():
        yield Counterfactual(f"{name.replace('_', ' ')}: {' or '.join(label)}", approaches, verdict)


def _iter_alternatives(requirements: Requirements) -> Iterator[tuple[str, Any, str]]:
    """A fact, another value of it, and that value in words."""
    for name in select_questions(requirements.need):
        for value in ALTERNATIVES.get(name, ()):
            yield name, value, _format_value(value)
    for name, threshold, needs in THRESHOLDS:
        if not set(needs) & set(requirements.need):
            continue
        current = getattr(requirements, name)
        threshold_text = format_bytes(threshold) if name == "raw_text" else f"{threshold:,}"
        if (
            threshold if current is None and name == "requests_month" else current or 0
        ) >= threshold:
            yield name, threshold - 1, f"under {threshold_text}"
        else:
            yield name, threshold, f"{threshold_text} or more"
