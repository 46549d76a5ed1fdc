"""Whether an answer follows a schema, for any JSON that a stranger or a model writes."""

from __future__ import annotations

from typing import Any

import pytest

from processor_time import check_seconds
from tunesmith.core.errors import InputError
from tunesmith.data.json_schema import find_violation, make_validator

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
NESTED = {"$schema": DRAFT_7, "type": ["array", "integer"], "items": {"$ref": "#"}}


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_deeper_than_a_recursive_schema_can_follow_violate_it() -> None:
    validator = make_validator(NESTED)
    assert find_violation(nest(20), validator) == ""
    assert find_violation([[[1], "a"]], validator) == "'a' is not of type 'array', 'integer'"
    assert find_violation(nest(900), validator).startswith("nested too deeply")


def test_a_schema_that_refers_only_to_itself_accepts_nothing() -> None:
    assert find_violation(1, make_validator({"$ref": "#"})).startswith("nested too deeply")


@pytest.mark.parametrize("number", [float("inf"), 10**400])
def test_a_number_out_of_range_violates_what_is_computed_with_it(number: float) -> None:
    validator = make_validator({"multipleOf": 0.01})
    assert find_violation(number, validator) == "a number is out of range"
    assert find_violation(0.5, validator) == ""


@pytest.mark.parametrize(
    ("items", "is_unique"),
    [
        ([], True),
        ([1, 2.5, "1", True, None, [], {}, [1], {"a": 1}], True),
        ([["a", 1], ["a", True]], True),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}], False),
        ([0, False, 1, True], True),
        ([1, 1.0], False),
        ([[{"a": []}], [{"a": []}]], False),
        ([{}, []], True),
    ],
)
def test_unique_items_are_those_of_the_specification(items: list[Any], is_unique: bool) -> None:
    validator = make_validator({"uniqueItems": True})
    assert (find_violation(items, validator) == "") is is_unique
    assert find_violation(items, make_validator({"uniqueItems": False})) == ""


def test_unique_items_are_compared_in_linear_time() -> None:
    schema = {"$schema": DRAFT_7, "items": {"anyOf": [{"type": "object"}, {"$ref": "#"}]}}
    validator = make_validator(schema | {"uniqueItems": True})
    items = [{"number": number} for number in range(20_000)]

    def compare() -> None:
        assert find_violation([items], validator) == ""
        assert find_violation([[*items, items[0]]], validator)

    check_seconds(compare, limit=5)


def test_a_schema_is_refused_with_the_path_of_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"response_schema: \$\.properties\.a\.pattern: not a"):
        make_validator({"properties": {"a": {"pattern": "("}}})
    validator = make_validator({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(InputError, match=r"the schema refers to 'http://127\.0\.0\.1"):
        find_violation(1, validator)
