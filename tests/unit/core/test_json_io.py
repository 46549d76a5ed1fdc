"""JSON of our dataclasses: strict on the way out, the same objects on the way in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from plan_configs import DEFAULTS
from tunesmith.core.errors import InputError
from tunesmith.core.events import TrainStep
from tunesmith.core.json_io import (
    describe_json_error,
    dump_json,
    has_more_values,
    load_finite_json,
    measure_depth,
    parse_as,
    read_file,
    read_json,
    to_jsonable,
)
from tunesmith.core.types import (
    DataReport,
    Finding,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    split_settings,
)
from tunesmith.recipe.schema import Recipe

MACHINE = Machine(
    "cpu",
    "a cpu",
    2,
    2**34,
    2**33,
    2**36,
    has_bf16_matmul=True,
    compiler="/usr/bin/cc",
    versions={"x": "1"},
)
MODEL = ModelSpec(
    "tiny",
    Path("/m"),
    "LlamaForCausalLM",
    "llama",
    2,
    64,
    4,
    2,
    16,
    128,
    512,
    2048,
    True,
    10**5,
    "bf16",
    block_parameters=73_728,
    active_parameters=73_728,
    layer_mixers=("attention", "attention"),
)
REPORT = DataReport(
    "a.jsonl",
    "messages",
    "has messages",
    3,
    3,
    90,
    30,
    findings=(Finding("empty", "warn", "m", 1, ("a:1",)),),
)
SETTINGS = {key: PlanValue(value, "rule", "its default") for key, value in DEFAULTS.items()}
SETTINGS |= {
    "lora_r": PlanValue(16, "rule", "small model"),
    "learning_rate": PlanValue(1e-4, "user", "recipe"),
    "lora_target_modules": PlanValue(("q_proj", "v_proj"), "checkpoint", "its adapter"),
    "mixture": PlanValue({"sums": 3}, "rule", "all"),
}
CONFIG, REASONS = split_settings(SETTINGS)
PLAN = Plan(
    recipe=to_jsonable(
        Recipe.model_validate({"model": "tiny", "data": "a.jsonl", "response_schema": "s.json"})
    ),
    config=CONFIG,
    reasons=REASONS,
    machine=MACHINE,
    model=MODEL,
    data={"data": REPORT},
    steps=10,
    tokens_per_epoch=90,
    memory_bytes={"peak": 10**9},
)


def test_a_plan_survives_the_way_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(dump_json(PLAN, indent=2))
    again = parse_as(Plan, read_json(tmp_path / "plan.json"))
    assert again == PLAN
    assert again.config.lora_r == 16
    assert again.recipe["response_schema"] == "s.json"


def test_numpy_numbers_and_paths_become_plain() -> None:
    value = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": np.float64(0.25),
        "d": Path("x"),
        1: (True, None),
    }
    plain = to_jsonable(value)
    assert plain == {"a": 0.5, "b": 3, "c": 0.25, "d": "x", "1": [True, None]}
    assert [type(item) for item in plain.values()] == [float, int, float, str, list]
    assert plain["1"][0] is True


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_is_not_finite_is_not_written(number: float) -> None:
    step = TrainStep(3, number, 10, 5, 0.1, 1e-4, 1.0, 100)
    with pytest.raises(ValueError, match=r"value\.loss is (nan|-?inf)"):
        to_jsonable(step)


def test_objects_without_a_json_form_are_named() -> None:
    with pytest.raises(TypeError, match=r"value\.a\[1\] is a set"):
        to_jsonable({"a": [1, {2}]})


def test_a_lone_surrogate_survives() -> None:
    assert json.loads(dump_json({"text": "a\ud800b"})) == {"text": "a\ud800b"}
    assert dump_json("é\u2028") == b'"\xc3\xa9\xe2\x80\xa8"\n'


def test_a_plan_that_lost_a_field_is_refused_by_name() -> None:
    broken = to_jsonable(PLAN)
    del broken["machine"]["cores"]
    with pytest.raises(InputError, match=r"plan\.json: not a Plan: machine\.cores: Field required"):
        parse_as(Plan, broken, "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b" 2}', "x.json:2:6: not valid JSON"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"[" * 100_000, r"x\.json: nested too deeply"),
        (b"1" * 5000, r"x\.json: an integer has more than 4,300 digits"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: embedded null byte"):
        read_json(tmp_path / "a\0.json")


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    file = tmp_path / "sparse.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    for path in (file, Path("/dev/zero")):
        with pytest.raises(InputError, match="more than 268,435,456 bytes"):
            read_json(path)
    file.write_bytes(b"12345")
    assert read_file(file, max_bytes=5) == b"12345"
    assert read_file(file, max_bytes=None) == b"12345"
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_file(file, max_bytes=4)


@pytest.mark.parametrize(
    ("text", "depth"), [("5", 0), ('"[["', 0), ("[]", 1), ('{"a": [{}, 1], "b": []}', 3)]
)
def test_depth_counts_objects_and_arrays(text: str, depth: int) -> None:
    assert measure_depth(json.loads(text)) == depth
    value: object = 1
    for _ in range(100_000):
        value = [value]
    assert measure_depth(value) == 100_000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[1, 2.5, true]", 1),
        ('{"a": 0, "b": "c"}', 4),
        (r'["\"[{", "[", "\\"]', 4),
        ('[["a', 3),  # a text that is not closed
        ('["a\\', 2),
        ("[[],[{}]]", 4),
    ],
)
def test_values_are_counted_without_being_decoded(text: str, count: int) -> None:
    assert has_more_values(text, count - 1)
    assert not has_more_values(text, count)


# ---------------------------------------------------------------- finite numbers


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
