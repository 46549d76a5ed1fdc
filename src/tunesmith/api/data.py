"""The Python API on data: check, show, select, review and split rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api.inputs import AnyPath, load_inputs, read_recipe, split_by_stage
from tunesmith.core.formatting import format_count
from tunesmith.core.types import DataReport
from tunesmith.plan.stages import require_single_stage

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.advise.curate import CurationResult
    from tunesmith.api.inputs import AnyInputs
    from tunesmith.data.dataset import Dataset
    from tunesmith.data.golden_set import GoldenLock
    from tunesmith.data.reviews import ReviewImport
    from tunesmith.data.split import SplitResult
    from tunesmith.recipe.load import RecipeLike


def data_check(
    recipe: RecipeLike | AnyInputs = None, *, rejected: AnyPath | None = None, **changes: Any
) -> dict[str, DataReport]:
    """Read all rows once and report statistics and findings for each data role.

    Invalid rows are counted, and written to `rejected`, a new file or one written by an earlier
    check. Raises InputError if no row is valid."""
    from tunesmith.data.rejects import refuse_foreign_file, write_rejected_rows
    from tunesmith.session.planner import build_data_reports

    if rejected is not None:
        refuse_foreign_file(Path(rejected))
    reports: dict[str, DataReport] = {}
    datasets: dict[str, Dataset] = {}
    for stage, inputs in split_by_stage(load_inputs(recipe, **changes)).items():
        for role, report in build_data_reports(inputs, needs_all_texts=True).items():
            name = f"{stage} {role}".strip()
            reports[name] = report
            datasets[name] = inputs.datasets[role]
    if rejected is not None:
        write_rejected_rows(Path(rejected), datasets, reports)
    return reports


def data_show(
    recipe: RecipeLike | AnyInputs = None, *, rows: int = 3, ids: bool = False, **changes: Any
) -> list[Text]:
    """Return the first training rows as the model sees them, supervised tokens highlighted."""
    from rich.text import Text

    from tunesmith.data.preview import render_preview

    texts: list[Text] = []
    for inputs in split_by_stage(load_inputs(recipe, **changes)).values():
        dataset = inputs.datasets["data"]
        for index in range(min(rows, len(dataset))):
            row = dataset.render_row(index)[1]
            texts += render_preview(row, inputs.renderer, should_show_ids=ids)
        if num_rejected := dataset.rejected_rows.counts.total():
            rejected = format_count(num_rejected, "row")
            texts.append(Text(f"{rejected} cannot be used: run `tunesmith data check`", "yellow"))
    return texts


def data_curate(
    recipe: RecipeLike | AnyInputs = None,
    *,
    keep: int,
    to: AnyPath,
    allow_personal: bool = False,
    **changes: Any,
) -> CurationResult:
    """Select `keep` rows of `data` by the base model's scores: quality first, then diversity.

    Writes them to a new folder `to`, with a random and a longest subset of the same size for
    comparison, and a reason for every other row. Rows with personal data are excluded unless
    `allow_personal`."""
    from tunesmith.advise.curate import curate

    inputs = require_single_stage(load_inputs(recipe, **changes))
    return curate(inputs, keep, Path(to), allow_personal=allow_personal)


def data_lock(recipe: RecipeLike = None, **changes: Any) -> GoldenLock:
    """Lock the file of `data` as a golden set; every row needs a `review`.

    From then on no run trains on its rows, and none measures with it after it has changed."""
    from tunesmith.data.golden_set import write_lock
    from tunesmith.session.inputs import load_training_rows

    return write_lock(load_training_rows(require_single_stage(read_recipe(recipe, **changes))))


def data_export_reviews(recipe: RecipeLike = None, *, to: AnyPath, **changes: Any) -> int:
    """Write the rows of `data` as CSV with columns for a review; return their number."""
    from tunesmith.data.reviews import write_reviews
    from tunesmith.session.inputs import load_training_rows

    rows = load_training_rows(require_single_stage(read_recipe(recipe, **changes)))
    return write_reviews(rows, Path(to))


def data_import_reviews(
    *paths: AnyPath,
    to: AnyPath,
    reviewer: str = "",
    date: str = "",
    response_schema: AnyPath | None = None,
) -> ReviewImport:
    """Write the rows of reviewed tables, corrected, to a file for `data_lock`.

    `reviewer` and `date` are used for rows that name none; corrections are checked against the file
    `response_schema`. Where reviewers differ, a table beside the file lists their verdicts."""
    from tunesmith.data.reviews import import_reviews
    from tunesmith.session.datasets import read_response_schema

    schema = read_response_schema(Path(response_schema) if response_schema else None)
    tables = [Path(path) for path in paths]
    return import_reviews(tables, Path(to), reviewer=reviewer, day=date, schema=schema)


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
    """Split the rows of `data` into train.jsonl, eval.jsonl and test.jsonl in a new folder `to`.

    Near duplicates, rows with the same prompt and rows with the same value of the key `group` stay
    together. Labels, or values of the key `stratify`, are split in equal shares."""
    from tunesmith.data.split import split_by_group
    from tunesmith.session.inputs import load_training_rows

    loaded_recipe = require_single_stage(read_recipe(recipe, **changes))
    return split_by_group(
        load_training_rows(loaded_recipe),
        Path(to),
        eval_share=eval_share,
        test_share=test_share,
        group=group,
        stratify=stratify,
        seed=loaded_recipe.seed,
    )
