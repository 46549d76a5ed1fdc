"""The recipe model: what is accepted, what is contradictory, and its schema."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from pydantic import ValidationError

from tunesmith.data.formats.parse import FORMATS
from tunesmith.model.attention import BACKENDS
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import ALIASES, KEYS, Recipe, build_recipe_schema
from tunesmith.train.optimizer import OPTIMIZERS


def recipe(**values: object) -> Recipe:
    return Recipe.model_validate({"model": "tiny", "data": "train.jsonl", **values})


def test_only_model_and_data_are_required() -> None:
    minimal_recipe = Recipe(model="tiny", data=(DataSource(path=Path("train.jsonl")),))
    assert minimal_recipe.data[0].format == "auto"
    assert (
        minimal_recipe.learning_rate,
        minimal_recipe.lora_r,
        minimal_recipe.max_length,
        minimal_recipe.output_dir,
    ) == ("auto",) * 4
    assert (
        minimal_recipe.stage,
        minimal_recipe.seed,
        minimal_recipe.on_overlong,
        minimal_recipe.max_steps,
    ) == ("sft", 0, "drop", None)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 1


@pytest.mark.parametrize(
    "data",
    [
        "a.jsonl",
        ["a.jsonl"],
        {"path": "a.jsonl"},
        [{"path": "a.jsonl"}],
        [{"path": "a.jsonl", "format": "auto"}],
    ],
)
def test_every_way_to_name_a_file_is_the_same_recipe(data: object) -> None:
    assert recipe(data=data) == recipe(data="a.jsonl")


def test_numbers_that_yaml_leaves_as_text_are_numbers() -> None:
    assert recipe(learning_rate="1e-4").learning_rate == 1e-4
    assert recipe(lora_r="16").lora_r == 16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", True),
        ("lora_r", True),
        ("learning_rate", "nan"),
        ("learning_rate", 10),
        ("num_train_epochs", "inf"),
        ("num_train_epochs", 1e308),
        ("eval_split", 1.0),
        ("batch_size", 0),
        ("lora_target_modules", "(q_proj"),
        ("lora_target_modules", "(" * 5000),
        ("lora_target_modules", ""),
        ("lora_target_modules", []),
        ("template", "chatml"),
        ("model", ""),
        ("data", []),
        ("data", ""),
        ("output_dir", ""),
        ("stage", "rlhf"),
        ("add_tokens", [""]),
        ("add_tokens", ["[a]", "[b]", "[a]"]),
        ("add_tokens", ["New York"]),
        ("add_tokens", [" "]),
        ("add_tokens", ["a\0"]),
        ("add_tokens", ["x" * 201]),
        ("add_tokens", [7]),
    ],
)
def test_values_that_mean_nothing_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        recipe(**{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_data": "e.jsonl", "eval_split": 0.1}, "contradict each other"),
        ({"test_data": "./x/../train.jsonl"}, "test_data and data name the same file"),
        (
            {"eval_data": "e.jsonl", "test_data": ["t.jsonl", "e.jsonl"]},
            "test_data and eval_data name the same file",
        ),
        ({"method": "full", "lora_r": 8}, "no effect with method: full"),
        ({"method": "full", "use_rslora": False}, "use_rslora has no effect"),
        ({"method": "full", "use_dora": True}, "use_dora has no effect"),
        ({"max_length": 4096, "pack_length": 2048}, "must fit in a pack"),
        ({"share_prefixes": True, "lora_dropout": 0.1}, "share_prefixes contradicts lora_dropout"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**values)


def test_what_looks_like_a_contradiction_but_is_none() -> None:
    assert recipe(max_steps=10, num_train_epochs=3).max_steps == 10
    assert recipe(method="full", lora_r="auto").lora_r == "auto"
    assert recipe(max_length=2048, pack_length=2048).pack_length == 2048
    assert recipe(share_prefixes=True, lora_dropout=0.0).share_prefixes is True
    assert recipe(eval_data="e.jsonl", eval_split=None).eval_split is None


def test_the_schema_accepts_what_the_recipe_accepts() -> None:
    validator = jsonschema.Draft202012Validator(build_recipe_schema())
    validator.check_schema(build_recipe_schema())
    good = {
        "base_model": "tiny",
        "data": [{"path": "a.jsonl"}],
        "lora_rank": 8,
        "template": "none",
        "schema": "s.json",
    }
    assert list(validator.iter_errors(good)) == []
    for bad in (
        {"data": "a.jsonl"},
        {**good, "learning_rat": 1},
        {**good, "lora_r": 0},
        {**good, "method": "prompt"},
    ):
        assert list(validator.iter_errors(bad)), bad


def test_every_key_and_alias_is_described_in_the_schema() -> None:
    properties = build_recipe_schema()["properties"]
    assert set(properties) == {*KEYS, *ALIASES}
    for key, value in properties.items():
        assert value["description"].endswith("."), key
        assert "\n" not in value["description"], key


def test_names_of_the_recipe_are_those_of_the_code() -> None:
    assert set(get_args(DataSource.model_fields["format"].annotation)) == {"auto", *FORMATS}
    for key, table in (("attention", BACKENDS), ("optim", OPTIMIZERS)):
        auto, others = get_args(Recipe.model_fields[key].annotation)
        literal, _ = get_args(others)
        assert get_args(auto) == ("auto",)
        assert set(get_args(literal)) == set(table)
