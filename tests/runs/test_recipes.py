"""Every recipe in recipes/ runs, at toy size: its own choices, on a tiny model and a few rows."""

from pathlib import Path
from typing import Any

import pytest

from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    save_writer_folder,
    select_steps,
    train,
    write_rows,
)
from tunesmith import api
from tunesmith.core.events import Event, StageStart
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.load import read_recipe
from tunesmith.recipe.schema import Recipe, Stages
from tunesmith.train import stages

pytestmark = pytest.mark.promise


FOLDER = Path(__file__).parents[2] / "recipes"
STAGES = FOLDER / "stages.yaml"
SERVE = FOLDER / "serve.yaml"  # of tests/unit/serve/test_settings.py
CHOSEN: dict[str, Json] = {
    "qlora": {"method": "qlora", "optim": "adamw", "gradient_checkpointing": "none"},
    "dora": {"method": "lora", "use_dora": True, "lora_r": 8},
    "full": {"method": "full", "optim": "adamw_8bit"},
    "cpt": {"stage": "cpt"},
    "constraints": {"never": ["ai-self-mention (ban)", "apology (ban)"]},
    "rehearsal": {"rehearsal_margin": 0.02},
    "shared-prefixes": {"share_prefixes": True},
    "instruction": {"mixture": {"arguments": 6, "returns": 6, "names": 6}},
}


def rows_of(stage: str, first: int) -> list[Json]:
    if stage == "preference":
        pairs = [(f"{n} and {n}", f"{2 * n}", f"no {n}") for n in range(first, first + 6)]
        return [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in pairs
        ]
    if stage == "cpt":
        return [
            {"text": f"Text number {n}. " + "More of it. " * (n % 4)}
            for n in range(first, first + 100)
        ]
    return [
        make_chat_row(f"{n} and {n}", f"{2 * n}", "Add these two numbers.")
        for n in range(first, first + 6)
    ]


def columns(number: int) -> list[Json]:
    """Rows of a task, as the forms of the recipe want them."""
    return [
        {"code": f"f{number}_{n}()", "name": f"f{number}_{n}", "completion": f"F{n}"}
        for n in range(6)
    ]


def small(wish: Recipe, model: Path, folder: Path) -> Recipe:
    """The recipe with a tiny model, and toy rows in the place of every file that it names."""
    folder.mkdir(exist_ok=True)
    changed: dict[str, Any] = (
        {"batch_tokens": 200, "max_length": 60} if wish.stage == "cpt" else {"batch_size": 2}
    )
    for number, key in enumerate(("data", "eval_data", "test_data")):
        if wish.mixture is not None and getattr(wish, key):
            changed[key] = [
                {
                    **source.model_dump(mode="json"),
                    "path": str(write_rows(folder / source.path.name, columns(n))),
                }
                for n, source in enumerate(getattr(wish, key), start=10 * number)
            ]
        elif getattr(wish, key):
            changed[key] = str(
                write_rows(folder / f"{key}.jsonl", rows_of(wish.stage, 10 + 500 * number))
            )
    if wish.rehearsal is not None and not wish.rehearsal.is_self_generated:
        changed["rehearsal"] = {
            "data": str(write_rows(folder / "general.jsonl", build_sum_rows(300, 6)))
        }
    if wish.retention_data is not None:
        texts = [{"text": f"some text {n}"} for n in range(4)]
        changed["retention_data"] = str(write_rows(folder / "retention.jsonl", texts))
    size = {"model": str(model), "output_dir": str(folder / "run"), "max_steps": 2, "dtype": "fp32"}
    actual = read_recipe(wish, **changed, **size)
    assert isinstance(actual, Recipe)
    return actual


def run_small(path: Path, model: Path, folder: Path) -> list[Event]:
    wish = read_recipe(path)
    assert isinstance(wish, Recipe)
    return train(small(wish, model, folder))


@pytest.mark.parametrize(
    "path", sorted(set(FOLDER.glob("*.yaml")) - {STAGES, SERVE}), ids=lambda path: path.stem
)
def test_every_recipe_runs(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = save_writer_folder(tmp_path / "writer") if path.stem == "rehearsal" else tiny_folder
    events = run_small(path, model, tmp_path)
    assert [step.step for step in select_steps(events)] == [1, 2]
    choices, chosen = read_json(tmp_path / "run" / "plan.json")["settings"], CHOSEN[path.stem]
    assert {key: choices[key]["value"] for key in chosen} == chosen
    assert (tmp_path / "run" / ("model" if path.stem == "full" else "adapter")).is_dir()
    assert (tmp_path / "run" / "record.json").exists()


def test_the_recipe_with_stages_runs(tiny_folder: Path, tmp_path: Path) -> None:
    wish = read_recipe(STAGES)
    assert isinstance(wish, Stages)
    parts = [small(item, tiny_folder, tmp_path / item.stage) for item in wish.recipes]
    made = Stages(tuple(item.model_copy(update={"output_dir": tmp_path / "run"}) for item in parts))
    run_inputs = stages.load_stage_inputs(made)
    events = list(api.train(stages.make_staged_plan(run_inputs), run_inputs))
    assert [event.name for event in events if isinstance(event, StageStart)] == ["cpt", "sft"]
    assert [step.step for step in select_steps(events)] == [1, 2, 1, 2]
    assert (tmp_path / "run" / "record.json").exists()


def test_rows_that_begin_alike_are_shared(tiny_folder: Path, tmp_path: Path) -> None:
    events = run_small(FOLDER / "shared-prefixes.yaml", tiny_folder, tmp_path)
    assert all(step.shared_tokens > len("Add these two numbers.") for step in select_steps(events))
