"""The values of a sweep are read as those of their keys, and refused where the key refuses them."""

from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import InputError
from tunesmith.recipe.load import dump_recipe, load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.sweep import SweepConfig, ValueRange

HEAD = "model: base\ndata: a.jsonl\neval_data: b.jsonl\ntest_data: c.jsonl\n"


def read_sweep(folder: Path, text: str) -> SweepConfig:
    """Return the sweep of a recipe, which is the same after it was written and read again."""
    path = folder / "recipe.yaml"
    path.write_text(f"{HEAD}sweep: {text}\n")
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert recipe.sweep is not None
    return recipe.sweep


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{learning_rate: [1e-3, 0.01]}", (0.001, 0.01)),  # YAML reads 1e-3 as text
        ("{num_train_epochs: [1, '2']}", (1.0, 2.0)),
        ("{optim: [paged_adamw_8bit]}", ("adamw_8bit",)),
        ("{use_dora: ['true', false]}", (True, False)),
        ("{lora_target_modules: [all-linear, 'q_proj,v_proj']}", ("all-linear", "q_proj,v_proj")),
    ],
)
def test_values_are_read_as_their_key_reads_them(
    text: str, values: tuple[Any, ...], tmp_path: Path
) -> None:
    (parsed,) = read_sweep(tmp_path, text).space.values()
    assert isinstance(parsed, tuple)
    assert list(map(repr, parsed)) == list(map(repr, values))


def test_the_bounds_of_a_range_are_numbers(tmp_path: Path) -> None:
    text = "{learning_rate: {min: 1e-5, max: 1e-2, log: true}, search: tpe, trials: 4}"
    assert read_sweep(tmp_path, text).space == {
        "learning_rate": ValueRange(min=1e-5, max=1e-2, log=True)
    }


RANDOM = "search: random, trials: 4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{learning_rate: [1e-3, 0.001]}", "learning_rate: 0.001 is repeated"),
        ("{use_dora: [true, 'yes', 'true']}", "use_dora: True is repeated"),
        ("{learning_rate: [fast]}", "'fast' is not a value of learning_rate"),
        ("{learning_rate: [auto]}", "'auto' is not a value of learning_rate"),
        ("{learning_rate: []}", "an empty list has no value to try"),
        ("{learning_rate: [[1e-3]]}", "expected single values"),
        ("{learning_rate: 1e-3}", "expected a list or {min, max, log}"),
        ("{lora_r: [8], seeds: [1, '1']}", "1 is repeated: its trial would be the same"),
        ("{lora_r: [8], trials: 3}", "trials has no effect with search: grid"),
        ("{lora_r: {min: 2, max: 8}}", "lora_r is a range: list values"),
        (f"{{lora_r: {{min: 2, max: 2.5}}, {RANDOM}}}", "max is not a whole number"),
        (f"{{lora_r: {{min: 8, max: '2'}}, {RANDOM}}}", "min 8 is not below max 2"),
        (f"{{lora_r: {{min: true, max: 8}}, {RANDOM}}}", "min is not a number"),
        (f"{{lora_r: {{min: 2}}, {RANDOM}}}", "max is not a number"),
        (f"{{optim: {{min: 2, max: 8}}, {RANDOM}}}", "no range of numbers; list its values"),
        ("{learning_rates: [1e-3]}", "did you mean learning_rate?"),
        ("{seed: [1, 2]}", "seed is swept by seeds"),
        ("{seeds: 1}", "no key varies"),
        ("{seeds: [7]}", "no key varies"),
    ],
)
def test_a_sweep_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        read_sweep(tmp_path, text)
    assert message in str(refusal.value)
    assert "recipe.yaml:5: sweep" in str(refusal.value)
