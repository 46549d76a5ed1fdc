"""Which answers are labels: tasks that a stranger may bring, and what only looks like labels."""

from __future__ import annotations

import json
import random

import pytest

from tunesmith.data.labels import count_labels

chance = random.Random(0)
SECTIONS = ["games", "sound", "fonts", "net", "text", "science", "admin", "graphics"]
WORDS = [f"{a}{b}" for a in "bdfglmnprs" for b in ("ado", "enu", "ilo", "om", "urt")]


def draw(values: list[str], n: int = 200) -> list[str]:
    return [*values * 3, *chance.choices(values, k=n)]


@pytest.mark.parametrize(
    "answers",
    [
        draw(SECTIONS),
        draw(["yes", "no"], 20),
        draw(["positive", "negative", "neutral"]),
        [*["no"] * 190, *["yes"] * 10],
        draw([f"card_{word}" for word in WORDS[:26]]),
        draw(["Checking or savings account", "Credit reporting, or other consumer reports"]),
        draw([" A", " B", " C", " D"]),
        draw(["1", "2", "3", "4", "5"]),
        draw(["A1", "A2", "B1", "B2", "C1", "C2"]),
        draw(["正面", "負面"]),
        [*draw(SECTIONS), "Net", "game"],
        draw(WORDS),
    ],
    ids=lambda answers: str(answers[0])[:12],
)
def test_short_answers_that_repeat_are_labels(answers: list[str]) -> None:
    counts = count_labels(answers)
    assert counts == {label.strip(): answers.count(label) for label in answers}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


@pytest.mark.parametrize(
    "answers",
    [
        [str(chance.randrange(10) + chance.randrange(10)) for _ in range(400)],
        [f"{chance.randrange(12)} km" for _ in range(300)],
        [f"2024-{1 + chance.randrange(12):02d}" for _ in range(300)],
        [*["N/A"] * 150, *(f"a note on {word}" for word in WORDS[:45])],
        [f"{chance.choice(WORDS)} {chance.choice(WORDS)}" for _ in range(500)],
        [json.dumps({"section": chance.choice(SECTIONS)}) for _ in range(300)],
        [json.dumps([chance.choice(SECTIONS)]) for _ in range(300)],
        draw(["yes", "no", f"{'It depends on what you mean by that. ' * 4}"]),
        draw(["yes\nbecause", "no\nbecause"]),
        [*draw(["yes", "no"]), ""],
        ["yes"] * 100,
        ["yes", "no"] * 5,
        draw([*WORDS, "one more"]),
    ],
    ids=lambda answers: str(answers[0])[:12],
)
def test_other_answers_are_not(answers: list[str]) -> None:
    assert count_labels(answers) == {}
