"""Constants: what expected answers do as well is none, injected ones are detected."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import Shortcut, TrainingValues
from tunesmith.data.answer_values import MAX_FIELDS, split_fields
from tunesmith.evaluate.json_metrics import field_f1
from tunesmith.evaluate.shortcuts import (
    build_answer_items,
    find_constants,
    has_suspect,
)
from tunesmith.evaluate.statistics import compute_excess_p
from tunesmith.evaluate.training_answers import build_training_values


def make_samples(
    count: int, expect: Callable[[int], object], answer: Callable[[int], object]
) -> list[GenerationSample]:
    """Return samples whose texts are values as JSON, or texts as they are."""
    texts = []
    for index in range(count):
        pair = [
            value if isinstance(value, str) else json.dumps(value)
            for value in (expect(index), answer(index))
        ]
        texts.append(pair)
    return [
        GenerationSample(1, f"t:{index}", f"question number {index}", answered, expected)
        for index, (expected, answered) in enumerate(texts)
    ]


def detect(
    samples: Sequence[GenerationSample], training: TrainingValues | None = None
) -> list[Shortcut]:
    return list(find_constants(build_answer_items(samples), training))


def make_row(index: int) -> dict[str, object]:
    return {"id": f"row {index}", "urgent": index % 3 == 0}


def test_a_field_that_is_always_answered_the_same_is_a_constant() -> None:
    samples = make_samples(80, make_row, lambda index: make_row(index) | {"urgent": False})
    training = build_training_values((json.dumps(make_row(index)) for index in range(90)), 90)
    (constant,) = detect(samples, training)
    assert (constant.field, constant.value) == ("urgent", "false")
    assert (constant.n, constant.count, constant.expected) == (80, 80, 53)
    assert (constant.training_rows, constant.total_rows) == (30, 90)
    assert constant.p_value < 1e-6
    assert constant.rows[0] == "t:0"
    assert constant.description == (
        "urgent is false in 80 of 80 answers, expected in 53; "
        "30 of 90 training rows have another value"
    )


def test_nearly_constant_is_constant_and_a_field_that_is_right_is_not() -> None:
    nearly = make_samples(80, make_row, lambda index: make_row(index) | {"urgent": index % 40 == 0})
    assert [shortcut.field for shortcut in detect(nearly)] == ["urgent"]
    assert detect(make_samples(80, make_row, make_row)) == []
    weak = make_samples(80, make_row, lambda index: make_row(index) | {"urgent": index % 6 == 0})
    assert detect(weak) == [], "half of the urgent rows are recognised"


def test_a_constant_that_is_expected_is_none() -> None:
    samples = make_samples(
        80, lambda index: {"kind": "a", "id": index}, lambda index: {"kind": "a", "id": index}
    )
    assert detect(samples) == []


def test_a_few_answers_prove_no_constant() -> None:
    samples = make_samples(16, make_row, lambda index: make_row(index) | {"urgent": False})
    assert detect(samples) == []
    assert has_suspect(build_answer_items(samples)), "more answers could show it"
    assert not has_suspect(build_answer_items(make_samples(16, make_row, make_row)))
    assert detect(samples[:2]) == []
    assert detect(samples[:1]) == []
    assert detect([]) == []


@pytest.mark.parametrize("constant", ["a", "", "I do not know."])
def test_a_label_or_text_that_is_always_the_same_is_a_constant(constant: str) -> None:
    samples = make_samples(60, lambda index: "abc"[index % 3], lambda _: constant)
    (shortcut,) = detect(samples)
    assert (shortcut.field, shortcut.value) == ("", constant)
    assert shortcut.description.startswith(f"the answer is {constant or 'empty'} in 60 of 60")


def test_answers_that_are_no_objects_do_not_hide_a_constant() -> None:
    samples = make_samples(
        80,
        make_row,
        lambda index: "[[[" if index % 4 == 3 else make_row(index) | {"urgent": False},
    )
    (shortcut,) = detect(samples)
    assert (shortcut.field, shortcut.n) == ("urgent", 60)


def test_labels_of_the_training_rows_are_no_constants() -> None:
    training = build_training_values(["yes", "no"] * 50, 100)
    samples = make_samples(
        80, lambda index: ["yes", "no"][index % 2], lambda index: ["yes", "no"][index % 3 % 2]
    )
    assert detect(samples, training) == []


def test_hostile_names_and_values_are_bounded() -> None:
    escape = "\x1b[2J\u202e"
    row = {f"{escape}{'x' * 500}{index}": escape * 50 for index in range(600)}
    fields = split_fields(json.dumps(row))
    assert fields is not None
    assert len(fields) == MAX_FIELDS + 1
    assert all(len(name) <= 70 and len(value) <= 70 for name, value in fields.items())
    assert len(set(fields)) == len(fields)
    samples = make_samples(6, lambda _: row, lambda _: row)
    assert detect(samples) == []


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": NaN}', "{}", '{"a": ' + "9" * 5_000 + "}", "", "1"],
)
def test_what_is_no_object_with_fields_has_none(text: str) -> None:
    assert split_fields(text) is None


def test_names_with_dots_are_no_paths() -> None:
    assert split_fields('{"a.b": 1, "a": {"b": 2}, "c": [1, {"d": 3}]}') == {
        '"a.b"': "1",
        "a.b": "2",
        "c": '[1, {"d": 3}]',
    }


@pytest.mark.parametrize(
    ("answer", "expected", "is_equal"),
    [
        ('["y", "x", "x"]', '["x", "y", "x"]', True),
        ('["y", "x", "x"]', '["y", "x"]', False),
        ("[1, true]", "[true, 1.0]", True),
        ("1", "true", False),
        ("-0.0", "0", True),
        ("1e400", "1e400", True),
        ("0.5", "0.50", True),
        ('[{"a": [2, 1]}, 3]', '[{"a": [1, 2]}, 3.0]', True),
        ('[{"a": 1}, {"a": 2}]', '[{"a": 2}, {"a": 1}]', False),
        ('[["a", 1], []]', '[[1, "a"], []]', True),
        ('{"b": {"c": {"d": {"e": [null, ""]}}}}', '{"b": {"c": {"d": {"e": ["", null]}}}}', True),
    ],
)
def test_values_are_equal_where_the_metric_finds_them_equal(
    answer: str, expected: str, is_equal: bool
) -> None:
    texts = f'{{"a": {answer}}}', f'{{"a": {expected}}}'
    assert (split_fields(texts[0]) == split_fields(texts[1])) is is_equal
    assert (field_f1(*texts, None) == 1.0) is is_equal


@pytest.mark.parametrize(
    ("gains", "losses", "p_value"),
    [(0, 0, 1.0), (5, 0, 1 / 32), (3, 1, 5 / 16), (0, 5, 1.0), (3_000, 0, 0.0)],
)
def test_the_test_is_the_binomial_tail(gains: int, losses: int, p_value: float) -> None:
    assert compute_excess_p(gains, losses) == pytest.approx(p_value)
