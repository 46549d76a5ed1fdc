"""The rows of a recipe, by role, each checked against the others.

In: a recipe and the renderer of its model. Out: a Dataset for each role. `data` trains, `eval_data`
selects, and `test_data` is read once, by the final comparison; without test_data the held-out rows
are split in half by a hash of their group or content. Left out: the model (inputs.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import Dataset, RowKind, open_dataset
from tunesmith.data.formats.few_shot import add_shots
from tunesmith.data.golden_set import (
    refuse_locked_rows,
    refuse_rehearsal_leakage,
    refuse_task_leakage,
)
from tunesmith.data.split import split_by_hash
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import Recipe, select_sources
from tunesmith.session.hub_data import fetch_sources
from tunesmith.session.row_groups import map_groups

HELD_OUT_ROLES = ("eval_data", "test_data")


def open_datasets(
    recipe: Recipe, renderer: Renderer, generated_rows: Path | None = None
) -> dict[str, Dataset]:
    """Open the dataset of each role, with the length limit of the recipe.

    Raises InputError for unusable rows, and for rows that a role shares with another one."""
    datasets = {"data": open_training_rows(recipe, renderer)}
    rehearsal_sources = _select_rehearsal_sources(recipe, generated_rows)
    if rehearsal_sources:
        datasets["rehearsal"] = _open_rows(
            recipe, renderer, rehearsal_sources, ConstraintSet(recipe.never, can_ban=False)
        )
    held_out = ConstraintSet(recipe.never, is_held_out=True)
    if recipe.eval_data:
        sources = select_sources(recipe, "eval_data")
        datasets["eval_data"] = _open_rows(recipe, renderer, sources, held_out)
    elif recipe.eval_split:
        datasets["data"], datasets["eval_data"] = _split(
            recipe, datasets["data"], recipe.eval_split, recipe.seed
        )
    if recipe.test_data and not recipe.has_no_test:
        sources = select_sources(recipe, "test_data")
        datasets["test_data"] = _open_rows(recipe, renderer, sources, held_out)
    elif "eval_data" in datasets and not recipe.has_no_test:
        datasets["eval_data"], datasets["test_data"] = _split(
            recipe, datasets["eval_data"], 0.5, recipe.seed + 1
        )
    held_out_roles = {role: datasets[role] for role in HELD_OUT_ROLES if role in datasets}
    for role, dataset in held_out_roles.items():
        _refuse_single_row(recipe, role, dataset)
    refuse_task_leakage(datasets["data"], held_out_roles)
    refuse_locked_rows(datasets, trained_roles=("data", "rehearsal"))
    if rehearsal_sources:
        eval_datasets = open_eval_datasets(recipe, datasets, renderer)
        refuse_rehearsal_leakage(datasets["rehearsal"], eval_datasets)
    max_length = recipe.max_length if isinstance(recipe.max_length, int) else None
    datasets["data"] = datasets["data"].with_max_length(max_length, recipe.on_overlong)
    return add_shots(datasets)


def _split(recipe: Recipe, dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    return split_by_hash(dataset, share, seed, map_groups(dataset, recipe.group))


def open_training_rows(recipe: Recipe, renderer: Renderer) -> Dataset:
    """Open the rows of `data`, with none of them held out."""
    constraints = ConstraintSet(recipe.never, can_ban=recipe.stage == "sft")
    sources = select_sources(recipe, "data")
    return _open_rows(recipe, renderer, sources, constraints, max_examples=recipe.max_examples)


def _open_rows(
    recipe: Recipe,
    renderer: Renderer,
    sources: Sequence[DataSource],
    constraints: ConstraintSet,
    *,
    max_examples: int | None = None,
) -> Dataset:
    return open_dataset(
        fetch_sources(sources),
        renderer.train_on(recipe.train_on),
        max_examples=max_examples,
        skip_invalid=recipe.skip_invalid,
        row_kind=get_row_kind(recipe),
        constraint_set=constraints,
    )


def get_row_kind(recipe: Recipe) -> RowKind:
    """Return what the rows of a recipe hold."""
    if recipe.stage != "preference":
        return "text" if recipe.stage == "cpt" else "answer"
    return "labelled" if recipe.loss.name == "kto" else "pair"


def _select_rehearsal_sources(
    recipe: Recipe, generated_rows: Path | None
) -> tuple[DataSource, ...]:
    if recipe.rehearsal is None:
        return ()
    if recipe.rehearsal.is_self_generated:
        return () if generated_rows is None else (DataSource(path=generated_rows),)
    return recipe.rehearsal.data


def _refuse_single_row(recipe: Recipe, role: str, dataset: Dataset) -> None:
    if len(dataset) >= 2:
        return
    fix = "use at least two rows, better a hundred"
    if not recipe.test_data:
        fix += "; without test_data, half of the held-out rows become it"
    message = "one row: a score on it has no confidence interval"
    raise InputError(message, where=f"{role}: {dataset.path}", fix=fix)


def open_eval_datasets(
    recipe: Recipe, open_roles: Mapping[str, Dataset], renderer: Renderer
) -> dict[str, Dataset]:
    """Return the datasets that a run is evaluated on, retention_data included."""
    datasets = {role: open_roles[role] for role in HELD_OUT_ROLES if role in open_roles}
    if recipe.general_texts is not None:
        source = DataSource(path=recipe.general_texts, format="text")
        datasets["retention_data"] = open_dataset([source], renderer)
    return datasets


def read_response_schema(path: Path | None) -> Json | None:
    """Read a JSON schema. Raises InputError if it is missing or broken."""
    return None if path is None else read_json(path, key="response_schema")
