"""Apply the rules of rubric.py: Requirements -> RuleResults -> Advice.

For each need, an approach is recommended if a rule recommends it and none rules it out. What would
change the advice is determined by applying the rules again with one fact changed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.advise.rules.facts import (
    NEEDS,
    PROMPT_QUALITIES,
    Need,
    Requirements,
    select_facts,
)
from tunesmith.advise.rules.rubric import (
    APPROACHES,
    MAX_PROMPT_BYTES,
    MAX_PROMPT_TOKENS,
    MIN_EXAMPLES,
    MIN_MONTHLY_REQUESTS,
    MIN_PAIRS,
    MIN_PARAPHRASES,
    MIN_TEXT_BYTES,
    RULES,
    TRAINING_APPROACHES,
    Approach,
    RuleResult,
)
from tunesmith.core.atomic import format_bytes

Verdict = Literal["fine-tune", "don't fine-tune"]
ApproachesByNeed = dict[Need, tuple[Approach, ...]]
# what guides usually advise
COMMON_ADVICE: set[tuple[Need, Approach]] = {
    ("facts", "sft"),
    ("domain", "cpt"),
    ("format", "sft"),
    ("skill", "sft"),
    ("latency", "sft"),
    ("tone", "sft"),
}


@dataclass(frozen=True)
class Recommendation:
    """An approach to take, with what to do first and the command that follows, if any."""

    approach: Approach
    needs: tuple[Need, ...]
    reasons: tuple[RuleResult, ...]
    next_step: str
    command: str


@dataclass(frozen=True)
class Counterfactual:
    """If only this fact changed, the recommendation would become `approaches`."""

    condition: str
    approaches: tuple[Approach, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Advice:
    verdict: Verdict
    recommendations: tuple[Recommendation, ...]  # in order; empty: nothing helps yet
    objections: tuple[RuleResult, ...]  # results that ruled something out
    counterfactuals: tuple[Counterfactual, ...]
    requirements: Requirements
    assumed: tuple[str, ...]  # names of facts that matter and are unknown

    @property
    def approaches(self) -> tuple[Approach, ...]:
        return tuple(recommendation.approach for recommendation in self.recommendations)


def advise(requirements: Requirements, recipe: Path | None = None) -> Advice:
    """Return the advice; `recipe` is the file whose rows were counted, for the commands."""
    approaches_by_need, reasons = apply_rules(requirements)
    recommendations: list[Recommendation] = []
    for approach in _list_approaches(approaches_by_need):
        needs: tuple[Need, ...] = tuple(
            need for need in requirements.need if approach in approaches_by_need[need]
        )
        next_step, command = _describe_next_step(approach, requirements, recipe)
        approach_reasons = _select_reasons(reasons, approach, needs)
        recommendations.append(
            Recommendation(approach, needs, approach_reasons, next_step, command)
        )
    facts = select_facts(requirements.need)
    return Advice(
        verdict=choose_verdict(approaches_by_need),
        recommendations=tuple(recommendations),
        objections=tuple(
            reason for reason in reasons if reason.ruled_out and _is_relevant(reason, reasons)
        ),
        counterfactuals=tuple(_find_counterfactuals(requirements)),
        requirements=requirements,
        assumed=tuple(name for name in facts if getattr(requirements, name) is None),
    )


def apply_rules(requirements: Requirements) -> tuple[ApproachesByNeed, tuple[RuleResult, ...]]:
    """Return the approaches for each need, and all results that concern one of the needs."""
    reasons: list[RuleResult] = []
    for rule in RULES:
        reason = rule.apply(requirements)
        if reason is not None and set(reason.needs) & set(requirements.need):
            reasons.append(reason)
    approaches_by_need: ApproachesByNeed = {}
    for need in requirements.need:
        recommended: set[Approach] = set()
        ruled_out: set[Approach] = set()
        for reason in reasons:
            if need in reason.needs:
                recommended.update(reason.recommended)
                ruled_out.update(reason.ruled_out)
        remaining = recommended - ruled_out
        approaches_by_need[need] = tuple(name for name in APPROACHES if name in remaining)
    return approaches_by_need, tuple(reasons)


def _list_approaches(approaches_by_need: ApproachesByNeed) -> tuple[Approach, ...]:
    approaches = set[Approach]().union(*approaches_by_need.values())
    return tuple(name for name in APPROACHES if name in approaches)


def choose_verdict(approaches_by_need: ApproachesByNeed) -> Verdict:
    approaches = _list_approaches(approaches_by_need)
    return "fine-tune" if set(approaches) & set(TRAINING_APPROACHES) else "don't fine-tune"


def _select_reasons(
    reasons: tuple[RuleResult, ...], approach: Approach, needs: tuple[Need, ...]
) -> tuple[RuleResult, ...]:
    """Return the results that recommend an approach, then those that comment on it."""
    relevant = [reason for reason in reasons if set(reason.needs) & set(needs)]
    recommending = [reason for reason in relevant if approach in reason.recommended]
    commenting = [reason for reason in relevant if approach in reason.concerns]
    return (*recommending, *commenting)


def _is_relevant(objection: RuleResult, reasons: tuple[RuleResult, ...]) -> bool:
    """Return whether it rules out what another rule recommends, or what guides usually advise."""
    proposed = set(COMMON_ADVICE)
    for reason in reasons:
        for need in reason.needs:
            proposed.update((need, approach) for approach in reason.recommended)
    for need in objection.needs:
        if any((need, approach) in proposed for approach in objection.ruled_out):
            return True
    return False


# ---------------------------------------------------------------- next step

NEXT_STEPS: dict[Approach, tuple[str, str]] = {
    "prompt": (
        "write 100 questions with correct answers as `eval_data`, to measure prompts and "
        "everything else",
        "advise --measure {recipe}",
    ),
    "constrained decoding": (
        "send the schema with each request (`response_format` in llama.cpp's server and vLLM); "
        "its effect is measured along with prompts and training",
        "advise --measure {recipe} --schema schema.json",
    ),
    "retrieval": (
        "put the documents into a folder; the model's answers from them are measured",
        "advise --measure {recipe} --documents FOLDER",
    ),
    "another base": (
        "measure another base model on the same items",
        "advise --measure {recipe} --base ORG/NAME",
    ),
    "cpt": ("put the texts into a folder, and hold some out", "plan {recipe} --stage cpt"),
    "sft": ("put the rows into a file, and hold some out", "data check {recipe}"),
    "preference": (
        "put the pairs into a file, and hold some out",
        "plan {recipe} --stage preference",
    ),
}


def _describe_next_step(
    approach: Approach, requirements: Requirements, recipe: Path | None
) -> tuple[str, str]:
    """Return what to do, and the command after it."""
    if approach == "prompt" and requirements.prompt in ("close", "good"):
        return "keep the prompt, and the questions with correct answers that you tried it on", ""
    next_step, arguments = NEXT_STEPS[approach]
    recipe_path = shlex.quote(str(recipe or "recipe.yaml"))
    command = f"tunesmith {arguments.format(recipe=recipe_path)}"
    if recipe is None and approach != "preference":
        command = f"tunesmith init {recipe_path} && {command}"
    return next_step, command


# ---------------------------------------------------------------- what would change it

# fact, value, the needs for which crossing it may change the advice
THRESHOLDS: tuple[tuple[str, int, tuple[Need, ...]], ...] = (
    ("raw_text", MAX_PROMPT_BYTES + 1, ("facts",)),
    ("raw_text", MIN_TEXT_BYTES, ("domain", "translation")),
    ("context", MAX_PROMPT_TOKENS + 1, ("long-context",)),
    ("paraphrases", MIN_PARAPHRASES, ("facts",)),
    ("examples", MIN_EXAMPLES, NEEDS),
    ("pairs", MIN_PAIRS, ("tone", "skill", "safety")),
    ("requests_month", MIN_MONTHLY_REQUESTS, ("latency",)),
)
# fact -> value, label
ALTERNATIVES: dict[str, dict[Any, str]] = {
    "facts_change": {"never": "never", "weekly": "weekly"},
    "prompt": {quality: quality for quality in PROMPT_QUALITIES},
    "private": {True: "yes", False: "no"},
    "base_language": {False: "no"},
    "base_at_chance": {True: "yes"},
}


def _find_counterfactuals(requirements: Requirements) -> Iterator[Counterfactual]:
    """Change one fact at a time; values of a fact with the same effect are one counterfactual."""
    current, _ = apply_rules(requirements)
    labels_by_change: dict[tuple[str, tuple[Approach, ...], Verdict], list[str]] = {}
    for name, value, label in _iter_alternatives(requirements):
        changed = dataclasses.replace(requirements, **{name: value})
        approaches_by_need, _ = apply_rules(changed)
        if approaches_by_need != current:
            approaches = _list_approaches(approaches_by_need)
            change = (name, approaches, choose_verdict(approaches_by_need))
            labels_by_change.setdefault(change, []).append(label)
    for (name, approaches, verdict), labels in labels_by_change.items():
        condition = f"{name.replace('_', ' ')}: {' or '.join(labels)}"
        yield Counterfactual(condition, approaches, verdict)


def _iter_alternatives(requirements: Requirements) -> Iterator[tuple[str, Any, str]]:
    """Yield a fact, another value for it, and that value in words."""
    for name in select_facts(requirements.need):
        for value, label in ALTERNATIVES.get(name, {}).items():
            yield name, value, label
    for name, threshold, needs in THRESHOLDS:
        if not set(needs) & set(requirements.need):
            continue
        current = getattr(requirements, name)
        if current is None:
            # unknown numbers count as 0, but the requests as enough
            current = threshold if name == "requests_month" else 0
        threshold_text = format_bytes(threshold) if name == "raw_text" else f"{threshold:,}"
        if current >= threshold:
            yield name, threshold - 1, f"under {threshold_text}"
        else:
            yield name, threshold, f"{threshold_text} or more"
