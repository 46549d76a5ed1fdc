"""`import tunesmith`: a function per verb, which returns the objects that --json prints."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

import tunesmith
from tiny_runs import build_sum_rows, make_tiny_recipe, train, write_rows
from tunesmith import api
from tunesmith.cli import app, serve
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.json_io import dump_json, to_jsonable
from tunesmith.recipe.load import read_recipe
from tunesmith.recipe.schema import Recipe

pytestmark = pytest.mark.promise


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """A folder as a user has it: rows, and a recipe of two steps on the tiny model."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 6))
    write_rows(tmp_path / "test.jsonl", build_sum_rows(50, 2))
    values = {"model": str(tiny_folder), "data": "train.jsonl", "test_data": "test.jsonl"}
    values |= {"max_steps": 2, "batch_size": 2, "dtype": "fp32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


# ---------------------------------------------------------------- names


def test_public_names_survive_importing_every_module() -> None:
    before = {name: getattr(tunesmith, name) for name in tunesmith.__all__}
    for module in pkgutil.walk_packages(tunesmith.__path__, "tunesmith."):
        importlib.import_module(module.name)
    assert {name: getattr(tunesmith, name) for name in tunesmith.__all__} == before
    assert not {name for name, thing in before.items() if inspect.ismodule(thing)}
    assert importlib.import_module("tunesmith.plan.rules").RULES


def test_every_verb_is_a_function_of_its_name() -> None:
    for name in app.VERBS.keys() - serve.VERBS.keys():  # a server is a program of its own
        default = name.replace(" ", "_").replace("-", "_")
        function = {"eval": "evaluate", "report": "write_report", "runs": "list_runs"}.get(
            name, default
        )
        assert getattr(api, function) is getattr(tunesmith, function)
        assert function in tunesmith.__all__


def test_public_functions_have_docstrings_and_types() -> None:
    for name in tunesmith.__all__:
        thing = getattr(tunesmith, name)
        if inspect.isfunction(thing):
            assert thing.__doc__, name
            assert set(inspect.signature(thing).parameters) <= {*thing.__annotations__}, name


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("form", ["path", "text", "mapping", "recipe", "keywords", "inputs"])
def test_a_plan_can_be_made_of(form: str, here: Path) -> None:
    path = here / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    forms = {
        "path": lambda: tunesmith.plan(path, lora_r=3),
        "text": lambda: tunesmith.plan("recipe.yaml", lora_rank=3),
        "mapping": lambda: tunesmith.plan(values | {"lora_rank": 7}, lora_r=3),
        "recipe": lambda: tunesmith.plan(Recipe.model_validate(values), lora_r=3),
        "keywords": lambda: tunesmith.plan(**values, lora_r=3),
        "inputs": lambda: tunesmith.plan(api.load_inputs(values, lora_r=3)),
    }
    plan = forms[form]()
    assert (plan.config.lora_r, plan.reasons["lora_r"].decided_by, plan.steps) == (3, "user", 2)


def test_paths_and_tuples_are_values_too(here: Path) -> None:
    loaded_recipe = read_recipe(
        {"model": "tiny", "data": here / "a.jsonl"},
        lora_target_modules=("q_proj",),
        output_dir=Path("out"),
    )
    assert loaded_recipe.data[0].path == here / "a.jsonl"
    assert loaded_recipe.lora_target_modules == ("q_proj",)
    assert read_recipe(loaded_recipe) is loaded_recipe
    changed = read_recipe(loaded_recipe, seed=3)
    assert changed.model_dump() == loaded_recipe.model_dump() | {"seed": 3}


@pytest.mark.parametrize(
    ("wrong_recipe", "changes", "message"),
    [
        (
            {"model": "tiny", "data": "a.jsonl", "learning_rat": 1},
            {},
            "did you mean 'learning_rate'",
        ),
        (
            {"model": "tiny", "data": "a.jsonl"},
            {"learning_rate": "fast"},
            "learning_rate: expected 'auto' or a number",
        ),
        (
            {"model": "tiny", "data": "a.jsonl"},
            {"lora_r": object()},
            "lora_r is a object, which has no JSON form",
        ),
        ({"model": "tiny", "data": "a.jsonl"}, {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"model": "tiny", "data": "a.jsonl"}, {"lora_r": 3, "lora_rank": 4}, "are the same key"),
        ({}, {}, "'model' is missing"),
        (["recipe.yaml"], {}, "a recipe is a path, a mapping or a Recipe, not a list"),
        ("nowhere.yaml", {}, "no such file"),
    ],
)
def test_a_wrong_recipe_is_explained(
    wrong_recipe: object, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        tunesmith.plan(wrong_recipe, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- runs


def test_train_takes_a_plan_and_nothing_else() -> None:
    for other in ("recipe.yaml", {"model": "tiny"}, Recipe(model="tiny", data="a.jsonl")):  # type: ignore[arg-type]
        with pytest.raises(
            InputError, match=f"train takes a Plan, not a {type(other).__name__}"
        ) as raised:
            tunesmith.train(other)  # type: ignore[arg-type]
        assert "tunesmith.plan" in raised.value.fix


def read_floats(value: object) -> list[str]:
    """Return every float below a value with all of its bits, without `to_jsonable`."""
    if isinstance(value, float):
        return [value.hex()]
    if dataclasses.is_dataclass(value):
        items: Iterable[object] = [
            getattr(value, field.name) for field in dataclasses.fields(value)
        ]
    elif isinstance(value, dict):
        items = value.values()
    else:
        items = value if isinstance(value, list | tuple) else ()
    return [number for item in items for number in read_floats(item)]


def test_a_plan_read_back_trains_the_same_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    digits = {"learning_rate": 0.010123456789012345, "warmup_ratio": 1 / 3}
    straight = make_tiny_recipe(tiny_folder, tmp_path / "a", **digits)
    train(straight)
    plan = tunesmith.plan(make_tiny_recipe(tiny_folder, tmp_path / "b", **digits))
    assert plan.config.learning_rate == digits["learning_rate"]
    file = tmp_path / "plan.json"
    file.write_bytes(dump_json({"tunesmith": tunesmith.__version__, **json.loads(dump_json(plan))}))
    assert read_floats(tunesmith.read_plan(file)) == read_floats(plan)
    assert to_jsonable(tunesmith.read_plan(file)) == to_jsonable(
        plan
    )  # a tuple comes back as a list
    steps = [
        event
        for event in tunesmith.train(tunesmith.read_plan(file))
        if isinstance(event, tunesmith.TrainStep)
    ]
    assert len(steps) == plan.steps
    saved = [tmp_path / name / "run" / "adapter" / "adapter_model.safetensors" for name in "ab"]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    record = tunesmith.read_record(tmp_path / "b" / "run")
    assert record.plan == tunesmith.read_plan(tmp_path / "b" / "run")
    assert record.steps == plan.steps


@pytest.mark.parametrize("function", ["read_plan", "read_record", "resume", "evaluate", "chat"])
def test_a_folder_that_is_no_run_is_refused(function: str, tmp_path: Path) -> None:
    more = ["hello"] if function == "chat" else []
    with pytest.raises(TunesmithError) as raised:
        list(getattr(tunesmith, function)(str(tmp_path), *more))
    assert str(tmp_path) in raised.value.where


READERS = {
    "read_plan": (),
    "read_record": (),
    "resume": (),
    "evaluate": (),
    "compare": ("base",),
    "chat": ("hello",),
    "export": (),
    "write_report": (),
}


@pytest.mark.parametrize("function", READERS)
def test_a_run_folder_of_an_older_format_is_refused(function: str, tmp_path: Path) -> None:
    old_run = tmp_path / "run"
    (old_run / "adapter").mkdir(parents=True)
    for name in ("plan.json", "record.json", "identity.json", "before.json", "after.json"):
        (old_run / name).write_text('{"choices": {}}')
    call = getattr(tunesmith, function, None) or getattr(api, function)
    keywords = {"to": "peft"} if function == "export" else {}
    with pytest.raises(InputError, match="run folder format 1 is not supported") as raised:
        list(call(str(old_run), *READERS[function], **keywords))
    assert raised.value.where == str(old_run / "plan.json")
    assert "train again" in raised.value.fix


# ---------------------------------------------------------------- docs/reference/python.md


def blocks(page: Path) -> Iterator[str]:
    yield from re.findall(
        r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


@pytest.mark.usefixtures("here")
def test_the_examples_of_the_page_run(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("train.jsonl"), build_sum_rows(1, 40))
    code = "\n".join(blocks(DOCS / "reference" / "python.md")).replace(
        "smollm2-135m-instruct", str(tiny_folder)
    )
    names: dict[str, object] = {}
    exec(compile(code, "docs/reference/python.md", "exec"), names)  # noqa: S102 - the page is ours
    out = capsys.readouterr().out
    assert "did you mean 'learning_rate'" in out
    assert "negative controls" in out  # of the preflight, printed as check results
    assert isinstance(names["record"], tunesmith.RunRecord)
    assert Path("recipes/new.yaml").exists()
    shown = {
        name
        for name in tunesmith.__all__
        if re.search(rf"\btunesmith\.{name}\b", (DOCS / "reference" / "python.md").read_text())
    }
    functions = {name for name in tunesmith.__all__ if inspect.isfunction(getattr(tunesmith, name))}
    assert functions <= shown
