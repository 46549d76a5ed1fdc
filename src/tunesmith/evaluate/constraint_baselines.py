"""What costs no training: telling the base model in its prompt what it may not say, and banning
tokens as it answers.

    bad strings -> rules in words -> Examples that are told them; -> token sequences for the sampler

Both are as good as they can easily be: the rules quote what was really said, and the sampler knows
the strings of the held-out rows and of the base's own bad answers. Left out: asking and grading
(measure.py)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.recipe.fields import Constraint

MAX_QUOTES = 3  # strings a rule
# tokens: enough to know what is begun, and a longer one is hardly ever said again to the letter
MAX_BAN_TOKENS = 4
MAX_BANS = 1000  # strings a constraint, the commonest


def collect_bad_strings(
    constraints: Sequence[Constraint], row_answers: Iterable[tuple[str, str]]
) -> dict[str, list[str]]:
    """(row, answer) -> what each constraint matches in the answers, the commonest first."""
    counts = {constraint.name: Counter[str]() for constraint in constraints}
    for row, answer in row_answers:
        for constraint in constraints:
            counts[constraint.name].update(find_matches(constraint, answer, row))
    return {
        name: [text for text, _ in count.most_common(MAX_BANS)] for name, count in counts.items()
    }


def format_rules(constraints: Sequence[Constraint], bad_texts: Mapping[str, Sequence[str]]) -> str:
    """The constraints as a system message has them. A pattern is told by what it matches."""
    lines = [
        f"- Never {_describe_constraint(constraint, bad_texts[constraint.name])}."
        for constraint in constraints
    ]
    return "\n".join(["Rules for every answer:", *lines])


def _describe_constraint(constraint: Constraint, bad_texts: Sequence[str]) -> str:
    if constraint.check or constraint.text or not bad_texts:
        return constraint.instruction
    return "write " + " or ".join(f'"{text}"' for text in bad_texts[:MAX_QUOTES])


def add_rules(example: Example, rules_text: str) -> Example:
    """The example under the rules: at the end of its system message, or in one of their own; before
    a plain prompt."""
    if not example.messages:
        return dataclasses.replace(example, prompt=f"{rules_text}\n\n{example.prompt}")
    first, *rest = example.messages
    if first["role"] == "system":
        messages = ({**first, "content": f"{first['content']}\n\n{rules_text}"}, *rest)
        return dataclasses.replace(example, messages=messages)
    messages = ({"role": "system", "content": rules_text}, *example.messages)
    return dataclasses.replace(
        example, messages=messages, turn_weights=(0.0, *example.turn_weights)
    )


def tokenize_bans(
    bad_texts: Mapping[str, Sequence[str]], renderer: Renderer
) -> tuple[tuple[int, ...], ...]:
    """How the bad strings begin, in tokens, at the start of a text and after a space."""
    banned_texts = [text for texts in bad_texts.values() for text in texts]
    spellings = [
        renderer.encode_text(prefix + text)[:MAX_BAN_TOKENS]
        for text in banned_texts
        for prefix in ("", " ")
    ]
    return tuple(dict.fromkeys(tuple(tokens) for tokens in spellings))
