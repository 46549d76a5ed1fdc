"""Floors: what rules without a model reach on tasks that differ, and whether a model beats them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence

import pytest

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import Floor
from tunesmith.data.training_rows import TrainingRow
from tunesmith.evaluate.floors import NO_WORDS, measure_floors
from tunesmith.evaluate.metrics import grade_answer
from tunesmith.evaluate.results import MetricValues
from tunesmith.evaluate.shortcuts import build_answer_items

Row = tuple[str, str]  # prompt, expected


def measure(
    make_row: Callable[[random.Random], Row],
    answer: Callable[[str, str], str],
    metric: str = "exact_match",
    *,
    n: int = 100,
    groups: Sequence[str] = (),
) -> dict[str, Floor]:
    """Return the floors of n test rows and 300 training rows, by name."""
    chance = random.Random(0)
    training = [TrainingRow(*make_row(chance)) for _ in range(300)]
    tests = [make_row(chance) for _ in range(n)]
    samples = [
        GenerationSample(1, f"t:{i}", prompt, answer(prompt, expected), expected)
        for i, (prompt, expected) in enumerate(tests)
    ]
    values = tuple(grade_answer(metric, each.answer, each.expected, None) for each in samples)
    ids = tuple(each.id for each in samples)
    part = MetricValues("test", metric, ids, values, groups=tuple(groups))
    floors, note = measure_floors(metric, [part], build_answer_items(samples), training)
    assert note == ""
    return {each.name: each for each in floors}


def make_unbalanced(chance: random.Random) -> Row:
    return f"item {chance.randrange(10**6)}", "yes" if chance.random() < 0.05 else "no"


def make_labels(chance: random.Random) -> Row:
    label = chance.randrange(41)
    words = [f"w{label}x{chance.randrange(3)}" for _ in range(3)]
    return " ".join([*words, f"noise{chance.randrange(50)}"]), f"class {label}"


def make_script(chance: random.Random) -> Row:
    label = chance.choice(["負面", "正面"])
    word = {"負面": "壞差慢", "正面": "好快美"}[label]
    return "這家店的東西很" + chance.choice(word) + "真的" + chance.choice("是嗎吧啊"), label


def make_object(chance: random.Random) -> Row:
    section = chance.choice(["net", "games", "doc"])
    fields = {"name": f"p{chance.randrange(10**6)}", "section": section, "size": 3}
    return f"{section}-tool number {chance.randrange(99)}", json.dumps(fields)


def make_reasons(chance: random.Random) -> Row:
    number = chance.randrange(10**6)
    verdict = "Yes" if number % 2 else "No"
    return f"Is {number} odd?", f"{verdict}, because {number} ends in {number % 10}."


def test_a_constant_does_as_well_on_unbalanced_labels() -> None:
    constant = measure(make_unbalanced, lambda *_: "no")["most frequent answer"]
    assert constant.value >= 0.9
    assert (constant.lead, constant.is_beaten) == (0.0, False)
    floors = measure(make_unbalanced, lambda _, expected: expected, n=400)
    assert floors["most frequent answer"].is_beaten, "20 rarer labels right, none wrong"
    assert floors["copied input"].value == 0


def test_words_tell_labels_of_any_number_and_script() -> None:
    many = measure(make_labels, lambda _, expected: expected)
    assert many["bag of words"].value > 0.8 > 0.1 > many["most frequent answer"].value
    assert many["most frequent answer"].is_beaten
    assert not {"a random training answer", "answer of the nearest row"} & set(many)
    script = measure(make_script, lambda _, expected: expected)
    assert script["bag of words"].value > 0.95
    assert not script["bag of words"].is_beaten


def test_objects_have_floors_of_their_fields() -> None:
    def answer(_: str, expected: str) -> str:
        return json.dumps(json.loads(expected) | {"section": "net"}, indent=1)

    floors = measure(make_object, answer, "field_f1")
    frequent = floors["most frequent value of each field"]
    assert 0.33 < frequent.value < 0.5, "size is always right, a section in a third"
    assert floors["bag of words by field"].value > 0.6
    exact = measure(make_object, lambda _, expected: expected)
    assert exact["bag of words by field"].is_beaten


def test_free_text_is_compared_with_other_answers() -> None:
    floors = measure(make_reasons, lambda _, expected: expected, "chrf")
    assert "bag of words" not in floors
    assert floors["a random training answer"].value > 0.2
    assert floors["answer of the nearest row"].is_beaten
    shuffled = measure(make_reasons, lambda *_: "No, because 7 ends in 4.", "chrf")
    assert not shuffled["answer of the nearest row"].is_beaten


def test_groups_reach_the_interval() -> None:
    groups = [f"g{index // 20}" for index in range(100)]
    alone = measure(make_unbalanced, lambda _, expected: expected)["copied input"]
    grouped = measure(make_unbalanced, lambda _, expected: expected, groups=groups)
    assert alone.is_beaten
    assert not grouped["copied input"].is_beaten, "five groups are too few to tell"


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [GenerationSample(1, f"t:{i}", "ask", "no", "no") for i in range(8)]
    ids = tuple(each.id for each in samples)
    part = MetricValues("test", "exact_match", ids, (1.0,) * 8)
    items = build_answer_items(samples)
    rows = [TrainingRow("ask", "no")] * 9
    assert measure_floors("exact_match", [part], items, ()) == ((), "")
    assert measure_floors("exact_match", [part], items[:4], rows) == ((), "")
    floors, note = measure_floors("g.py:tone", [part], items, rows)
    assert (floors, "a function of yours" in note) == ((), True)
    blank = [TrainingRow(" ", "no"), TrainingRow("", "yes")] * 9
    assert measure_floors("exact_match", [part], items, blank)[0], "no word to learn from"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    floors, note = measure_floors("exact_match", [part], items, rows)
    assert [each.name for each in floors] == ["copied input", "most frequent answer"]
    assert note == NO_WORDS
