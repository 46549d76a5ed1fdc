"""The verbs on rows as functions: look at them, choose, divide, lock. As in verbs.py, where the
others are.

report = tunesmith.data_check("recipe.yaml")["data"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api import (
    SINGLE_STAGE_FIX,
    AnyPath,
    RecipeLike,
    load_inputs,
    read_recipe,
    require_single_stage,
    split_by_stage,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import DataReport, Plan
from tunesmith.recipe.schema import Recipe, Stages

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.advise.curate import CurationResult
    from tunesmith.advise.data_ablation import AblationResult, SubsetRun
    from tunesmith.api import AnyInputs
    from tunesmith.data.annotation import ReviewImport
    from tunesmith.data.dataset import Dataset
    from tunesmith.data.golden_set import GoldenLock
    from tunesmith.data.group_split import SplitResult


def data_check(
    recipe: RecipeLike | AnyInputs = None, *, rejected: AnyPath | None = None, **changes: Any
) -> dict[str, DataReport]:
    """Reads all rows once: a report for each role, with what was found. Rows that cannot be used
    are counted in it, and written into the file `rejected`, which is a new one, or one of these;
    InputError if there are no others."""
    from tunesmith.data.rejects import refuse_foreign_file, write_rejected_rows
    from tunesmith.session.inputs import build_data_reports

    if rejected is not None:
        refuse_foreign_file(Path(rejected))
    reports_by_role: dict[str, DataReport] = {}
    datasets: dict[str, Dataset] = {}
    for stage, inputs in split_by_stage(load_inputs(recipe, **changes)).items():
        stage_reports = build_data_reports(inputs, needs_all_texts=True)
        reports_by_role |= {
            f"{stage} {role}".strip(): report for role, report in stage_reports.items()
        }
        datasets |= {f"{stage} {role}".strip(): inputs.datasets[role] for role in stage_reports}
    if rejected is not None:
        write_rejected_rows(Path(rejected), datasets, reports_by_role)
    return reports_by_role


def data_show(
    recipe: RecipeLike | AnyInputs = None, *, rows: int = 3, ids: bool = False, **changes: Any
) -> list[Text]:
    """The first training rows as the model sees them, coloured by what is trained; `print` shows
    them plain."""
    from tunesmith.session.inputs import show_rows

    all_inputs = split_by_stage(load_inputs(recipe, **changes)).values()
    return [
        text
        for stage_inputs in all_inputs
        for text in show_rows(stage_inputs, rows=rows, should_show_ids=ids)
    ]


def data_curate(
    recipe: RecipeLike | AnyInputs = None,
    *,
    keep: int,
    to: AnyPath,
    likeness: str = "states",
    **changes: Any,
) -> CurationResult:
    """Chooses `keep` rows of `data` by the scores of the base model, quality first, then diversity,
    into a new folder `to`, beside a random and the longest subset of the same size. Every other row
    keeps its reason; none is edited. `likeness`: by what rows are alike, the model's hidden states
    of their questions, or their words."""
    from tunesmith.advise.curate import curate

    return curate(require_single_stage(load_inputs(recipe, **changes)), keep, Path(to), likeness)


def data_prove(
    recipe: RecipeLike | AnyInputs = None,
    *,
    folder: AnyPath,
    steps: int = 30,
    seeds: int = 1,
    **changes: Any,
) -> Iterator[SubsetRun | AblationResult]:
    """Trains briefly on each file of a folder of `data_curate`, and on the whole, from the same
    start: each `Trained` as it ends, then the `Proof`, which is also written into the folder.
    InputError without held-out rows."""
    from tunesmith.advise.data_ablation import summarize_ablation, train_subsets
    from tunesmith.core.atomic import write_file
    from tunesmith.core.json_io import dump_json

    inputs = require_single_stage(load_inputs(recipe, **changes))
    plan = plan_ablation(inputs)
    runs: list[SubsetRun] = []
    for run in train_subsets(plan, inputs, Path(folder), steps=steps, seeds=seeds):
        runs.append(run)
        yield run
    ablation = summarize_ablation(plan, runs, steps)
    write_file(Path(folder) / "proof.json", dump_json(ablation, indent=1))
    yield ablation


def plan_ablation(recipe: AnyInputs) -> Plan:
    """The plan of the short trainings. Raises what `data_prove` would, before rows are scored."""
    from tunesmith.advise.data_ablation import select_held_out_items
    from tunesmith.plan.build import refuse_if_too_large
    from tunesmith.session.inputs import make_plan

    inputs = require_single_stage(recipe)
    plan = make_plan(inputs)
    select_held_out_items(plan, inputs)
    refuse_if_too_large(plan)
    return plan


def _read_single_stage(recipe: RecipeLike, message: str, changes: Mapping[str, Any]) -> Recipe:
    loaded_recipe = read_recipe(recipe, **changes)
    if isinstance(loaded_recipe, Stages):
        raise InputError(
            f"{message}, and the recipe has several", where="stage", fix=SINGLE_STAGE_FIX
        )
    return loaded_recipe


def data_lock(recipe: RecipeLike = None, **changes: Any) -> GoldenLock:
    """Locks the file of `data`, in which every row has a `review`: from now on no run trains on its
    rows, and none measures with it once it has changed."""
    from tunesmith.data.golden_set import write_lock
    from tunesmith.session.inputs import open_data_pool

    loaded_recipe = _read_single_stage(recipe, "the file of one stage is locked", changes)
    return write_lock(open_data_pool(loaded_recipe))


def data_review(recipe: RecipeLike = None, *, tool: str, to: AnyPath, **changes: Any) -> int:
    """Writes the rows of `data` into the file `to`, which Label Studio (`label-studio`) or Argilla
    (`argilla`) imports, to be judged by people; how many there are."""
    from tunesmith.data.annotation import write_tasks
    from tunesmith.session.inputs import open_data_pool

    loaded_recipe = _read_single_stage(recipe, "the rows of one stage are reviewed", changes)
    return write_tasks(open_data_pool(loaded_recipe), tool, Path(to))


def data_reviewed(path: AnyPath, *, to: AnyPath, date: str | None = None) -> ReviewImport:
    """Reads what either tool exports as JSON into a file of reviewed rows, for `data_lock`. `date`:
    of the reviews of Argilla, whose files have none."""
    from tunesmith.data.annotation import import_reviews

    return import_reviews(Path(path), Path(to), date)


def data_split(
    recipe: RecipeLike = None,
    *,
    to: AnyPath,
    eval_share: float = 0.1,
    test_share: float = 0.1,
    group: str | None = None,
    stratify: str | None = None,
    **changes: Any,
) -> SplitResult:
    """Divides the rows of `data` into train.jsonl, eval.jsonl and test.jsonl in a new folder `to`.
    Rows that say nearly the same, ask the same or share the value of the key `group` stay together;
    each label, or value of the key `stratify`, is divided by itself. The recipe's seed decides."""
    from tunesmith.data.group_split import split_by_group
    from tunesmith.session.inputs import open_data_pool

    loaded_recipe = _read_single_stage(recipe, "the rows of one stage are divided", changes)
    shares = {"eval_share": eval_share, "test_share": test_share}
    return split_by_group(
        open_data_pool(loaded_recipe),
        Path(to),
        **shares,
        group=group,
        stratify=stratify,
        seed=loaded_recipe.seed,
    )
