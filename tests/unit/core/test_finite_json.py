"""What tunesmith wrote has finite numbers only."""

from __future__ import annotations

import json
import sys

import pytest

from tunesmith.core.finite_json import load_finite_json
from tunesmith.core.json_io import describe_json_error


@pytest.mark.parametrize(
    "value",
    [0, -1, 10**299, 1e308, -2.5e-300, [1.5, None, True, "NaN"], {"a": [{"b": -0.0}]}, "1e999"],
)
def test_finite_values_are_those_of_json(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value).encode()):
        assert load_finite_json(text) == value
        assert type(load_finite_json(text)) is type(value)


def test_floats_have_the_same_bits() -> None:
    numbers = [0.1, 1 / 3, 2.0**-1074, sys.float_info.max, 1e22, 123456789.123456789]
    assert load_finite_json(json.dumps(numbers)) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "is not a finite number")
            for text in ("NaN", "[1, Infinity]", "1e999", "[-1e400]")
        ),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        *((digit * 400, "an integer has more than 300 digits") for digit in "19"),
    ],
)
def test_a_number_that_no_float_holds_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_finite_json(text)
    assert describe_json_error(caught.value).startswith("not valid JSON: ")


def test_what_is_no_json_is_refused_as_by_json() -> None:
    for text in ("", "[1", "nan", b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011 - whichever json raises
            load_finite_json(text)
    with pytest.raises(RecursionError):
        load_finite_json("[" * 10**5)
