"""The rules of rubric.py put together.

    Situation -> reasons -> Advice

For each need, an answer is advised if a rule speaks for it and none rules it out; that is all. What would change the
advice is found by asking again with one fact changed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.advise.rules.questionnaire import NEEDS, PROMPTED, Need, Situation, questions_for
from tunesmith.advise.rules.reason import (
    ANSWERS,
    FITS_A_PROMPT,
    LEAST_EXAMPLES,
    LEAST_PAIRS,
    LEAST_PARAPHRASES,
    LEAST_REQUESTS,
    LEAST_TEXT,
    TRAINING,
    Answer,
    Reason,
)
from tunesmith.advise.rules.rubric import RULES
from tunesmith.core.atomic import size


@dataclass(frozen=True)
class Step:
    """An answer to take, in its turn. `next`: what to do first, `command` after it, where there is one."""

    answer: Answer
    needs: tuple[Need, ...]
    reasons: tuple[Reason, ...]
    next: str
    command: str


@dataclass(frozen=True)
class Change:
    """With this fact alone another one, the advice would be `answers`."""

    fact: str
    answers: tuple[Answer, ...]
    verdict: str


@dataclass(frozen=True)
class Advice:
    verdict: Literal["fine-tune", "don't fine-tune"]
    steps: tuple[Step, ...]  # in the order to take them; empty: nothing helps yet
    against: tuple[Reason, ...]  # what ruled something out
    changes: tuple[Change, ...]
    situation: Situation
    not_said: tuple[str, ...]  # facts that matter and count as not there

    @property
    def answers(self) -> tuple[Answer, ...]:
        return tuple(step.answer for step in self.steps)


def advise(facts: Situation, recipe: Path | None = None) -> Advice:
    """`recipe`: the one whose rows were counted, for the commands."""
    kept, reasons = decide(facts)
    steps = [
        Step(answer, needs, _speaking(reasons, answer, needs), *_next(answer, facts, recipe))
        for answer in ANSWERS
        if (needs := _served(answer, kept))
    ]
    asked = [name for name in questions_for(facts.need) if getattr(facts, name) is None]
    return Advice(
        verdict_of(kept),
        tuple(steps),
        tuple(reason for reason in reasons if reason.rules_out and _matters(reason, reasons)),
        tuple(_changes(facts)),
        facts,
        tuple(asked),
    )


def decide(facts: Situation) -> tuple[dict[Need, tuple[Answer, ...]], tuple[Reason, ...]]:
    """The answers to each need, and all reasons that bear on one of the needs."""
    found = (rule(facts) for rule in RULES)
    reasons = tuple(reason for reason in found if reason is not None and set(reason.needs) & set(facts.need))
    return {need: _answers([reason for reason in reasons if need in reason.needs]) for need in facts.need}, reasons


def _answers(reasons: list[Reason]) -> tuple[Answer, ...]:
    helps = {answer for reason in reasons for answer in reason.helps}
    out = {answer for reason in reasons for answer in reason.rules_out}
    return tuple(answer for answer in ANSWERS if answer in helps - out)


def verdict_of(kept: dict[Need, tuple[Answer, ...]]) -> Literal["fine-tune", "don't fine-tune"]:
    return (
        "fine-tune" if any(answer in TRAINING for answers in kept.values() for answer in answers) else "don't fine-tune"
    )


def _served(answer: Answer, kept: dict[Need, tuple[Answer, ...]]) -> tuple[Need, ...]:
    return tuple(need for need, answers in kept.items() if answer in answers)


def _speaking(reasons: tuple[Reason, ...], answer: Answer, needs: tuple[Need, ...]) -> tuple[Reason, ...]:
    """The reasons for an answer, then what is worth knowing of it."""
    bearing = [reason for reason in reasons if set(reason.needs) & set(needs)]
    return (
        *(reason for reason in bearing if answer in reason.helps),
        *(reason for reason in bearing if answer in reason.concerns),
    )


def _matters(against: Reason, reasons: tuple[Reason, ...]) -> bool:
    """Whether it says no to what another rule speaks for, or to what guides usually advise."""
    wanted = {(need, answer) for reason in reasons for need in reason.needs for answer in reason.helps}
    usual = {
        ("facts", "sft"),
        ("domain", "cpt"),
        ("format", "sft"),
        ("skill", "sft"),
        ("latency", "sft"),
        ("tone", "sft"),
    }
    return any((need, answer) in wanted | usual for need in against.needs for answer in against.rules_out)


# ---------------------------------------------------------------- what next


def _next(answer: Answer, facts: Situation, recipe: Path | None) -> tuple[str, str]:
    file = shlex.quote(str(recipe or "recipe.yaml"))
    made = "" if recipe else f"tunesmith init {file} && "
    if answer == "prompt" and facts.prompt in ("close", "good"):
        return "keep the prompt, and the questions that it was tried on with their right answers", ""
    if answer == "prompt":
        todo = (
            "write down 100 questions with right answers as `eval_data`: prompts are tried on them, and what else helps"
        )
        return todo, f"{made}tunesmith advise --measure {file}"
    return {
        "constrained decoding": (
            "send the schema with the request: `response_format` of llama.cpp's server or vLLM; what it brings is "
            "measured beside prompts and trainings",
            f"{made}tunesmith advise --measure {file} --schema schema.json",
        ),
        "retrieval": (
            "put the documents into a folder: how often the right passage is found, and what the model makes of it, is "
            "measured",
            f"{made}tunesmith advise --measure {file} --documents FOLDER",
        ),
        "cpt": ("put the texts into a folder, and hold some out", f"{made}tunesmith plan {file} --stage cpt"),
        "sft": ("put the rows into a file, and hold some out", f"{made}tunesmith data check {file}"),
        "preference": ("put the pairs into a file, and hold some out", f"tunesmith plan {file} --stage preference"),
    }[answer]


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------- what would change it

LIMITS: tuple[tuple[str, int, tuple[Need, ...]], ...] = (
    ("raw_text", FITS_A_PROMPT + 1, ("facts",)),
    ("raw_text", LEAST_TEXT, ("domain",)),
    ("paraphrases", LEAST_PARAPHRASES, ("facts",)),
    ("examples", LEAST_EXAMPLES, NEEDS),
    ("pairs", LEAST_PAIRS, ("tone", "skill")),
    ("requests_month", LEAST_REQUESTS, ("latency",)),
)
OTHERS: dict[str, tuple[Any, ...]] = {
    "facts_change": ("never", "weekly"),
    "prompt": PROMPTED,
    "private": (True, False),
}


def _changes(facts: Situation) -> Iterator[Change]:
    """One fact at a time, the others as they are; values of a fact that come to the same are one change."""
    now = decide(facts)[0]
    found: dict[tuple[str, tuple[Answer, ...], str], list[str]] = {}
    for name, value, said in _tries(facts):
        kept = decide(dataclasses.replace(facts, **{name: value}))[0]
        answers: tuple[Answer, ...] = tuple(a for a in ANSWERS if any(a in one for one in kept.values()))
        if kept != now:
            found.setdefault((name, answers, verdict_of(kept)), []).append(said)
    for (name, answers, verdict), said in found.items():
        yield Change(f"{name.replace('_', ' ')}: {' or '.join(said)}", answers, verdict)


def _tries(facts: Situation) -> Iterator[tuple[str, Any, str]]:
    """A fact, another value of it, and that value in words."""
    for name in questions_for(facts.need):
        for value in OTHERS.get(name, ()):
            yield name, value, _written(value)
    for name, limit, needs in LIMITS:
        if not set(needs) & set(facts.need):
            continue
        there = getattr(facts, name)
        bound = size(limit) if name == "raw_text" else f"{limit:,}"
        if (limit if there is None and name == "requests_month" else there or 0) >= limit:
            yield name, limit - 1, f"under {bound}"
        else:
            yield name, limit, f"{bound} or more"
