"""Every recipe in recipes/ runs, at toy size: its own choices, on a tiny model and a few rows."""

from pathlib import Path
from typing import Any

import pytest

from tiny_run import chat, steps_of, sums, train, write_rows
from tunesmith.jsonfile import read_json
from tunesmith.types import Event, Json
from tunesmith.verbs import read_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
CHOSEN: dict[str, Json] = {
    "qlora": {"method": "qlora", "optim": "adamw", "activations": "keep"},
    "dora": {"method": "lora", "use_dora": True, "lora_r": 8},
    "full": {"method": "full", "optim": "adamw_8bit"},
    "cpt": {"stage": "cpt"},
    "never": {"never": ["ai-self-mention (ban)", "apology (ban)"]},
    "shared-prefixes": {"share_prefixes": True},
    "instruction": {"mixture": {"arguments": 6, "returns": 6, "names": 6}},
}


def rows_of(stage: str, first: int) -> list[Json]:
    if stage == "preference":
        pairs = [(f"{n} and {n}", f"{2 * n}", f"no {n}") for n in range(first, first + 6)]
        return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    if stage == "cpt":
        return [{"text": f"Text number {n}. " + "More of it. " * (n % 4)} for n in range(first, first + 100)]
    return [chat(f"{n} and {n}", f"{2 * n}", "Add these two numbers.") for n in range(first, first + 6)]


def columns(number: int) -> list[Json]:
    """Rows of a task, as the forms of the recipe want them."""
    return [{"code": f"f{number}_{n}()", "name": f"f{number}_{n}", "completion": f"F{n}"} for n in range(6)]


def run_small(path: Path, model: Path, folder: Path) -> list[Event]:
    """Runs a recipe with a tiny model, and toy rows in the place of every file that it names."""
    wish = read_recipe(path)
    changed: dict[str, Any] = {"batch_tokens": 200, "max_length": 60} if wish.stage == "cpt" else {"batch_size": 2}
    for number, key in enumerate(("data", "eval_data", "test_data")):
        if wish.mixture is not None and getattr(wish, key):
            changed[key] = [
                {**source.model_dump(mode="json"), "path": str(write_rows(folder / source.path.name, columns(n)))}
                for n, source in enumerate(getattr(wish, key), start=10 * number)
            ]
        elif getattr(wish, key):
            changed[key] = str(write_rows(folder / f"{key}.jsonl", rows_of(wish.stage, 10 + 500 * number)))
    if wish.rehearsal is not None:
        changed["rehearsal"] = {"data": str(write_rows(folder / "general.jsonl", sums(300, 6)))}
    if wish.retention_data is not None:
        texts = [{"text": f"some text {n}"} for n in range(4)]
        changed["retention_data"] = str(write_rows(folder / "retention.jsonl", texts))
    small = {"model": str(model), "output_dir": str(folder / "run"), "max_steps": 2, "dtype": "fp32"}
    return train(read_recipe(path, **changed, **small))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    events = run_small(path, tiny_folder, tmp_path)
    assert [step.step for step in steps_of(events)] == [1, 2]
    choices, chosen = read_json(tmp_path / "run" / "plan.json")["choices"], CHOSEN[path.stem]
    assert {key: choices[key]["value"] for key in chosen} == chosen
    assert (tmp_path / "run" / ("model" if path.stem == "full" else "adapter")).is_dir()
    assert (tmp_path / "run" / "record.json").exists()


def test_rows_that_begin_alike_are_shared(tiny_folder: Path, tmp_path: Path) -> None:
    events = run_small(FOLDER / "shared-prefixes.yaml", tiny_folder, tmp_path)
    assert all(step.shared_tokens > len("Add these two numbers.") for step in steps_of(events))
