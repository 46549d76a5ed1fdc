"""Verbs on data: check, show, curate, lock, export-reviews, import-reviews, split.

Each verb is a function; cli/app.py collects them from `VERBS`. Imports are inside the functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api
from tunesmith.cli.args import AsJson, RecipeArgs, parse_recipe_args
from tunesmith.cli.help import option, switch
from tunesmith.cli.output import print_result
from tunesmith.core.formatting import format_count

# --to is the former name of --out.
OutputFolder = Annotated[Path, option("FOLDER", "Output folder; must be new.", "--out", "--to")]


def data_check(
    args: RecipeArgs = None,
    rejected: Annotated[Path | None, option("FILE", "Write invalid rows to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check all data; exit with 2 if a run would refuse it."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.data import render_data
    from tunesmith.data.rejects import find_table_fault, has_many_dropped
    from tunesmith.recipe.schema import Recipe

    reports = api.data_check(recipe, rejected=rejected)
    print_result({"data": reports}, render_data(reports), as_json=as_json)
    recipes = [recipe] if isinstance(recipe, Recipe) else recipe.recipes
    train_reports = [report for role, report in reports.items() if role.split()[-1] == "data"]
    if any(map(find_table_fault, train_reports)):
        sys.exit(2)
    if all(stage_recipe.skip_invalid for stage_recipe in recipes):
        return
    has_invalid_rows = any(report.rejected for report in reports.values())
    if has_invalid_rows or any(map(has_many_dropped, train_reports)):
        sys.exit(2)


def data_show(
    args: RecipeArgs = None,
    rows: Annotated[int, option("N", "Number of rows.", min=1)] = 3,
    ids: Annotated[bool, switch("--ids", "Print token ids too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model sees them, trained tokens in color."""
    texts = api.data_show(parse_recipe_args(args), rows=rows, ids=ids)
    print_result({"rows": [text.plain for text in texts]}, *texts, as_json=as_json)


def data_curate(
    keep: Annotated[int, option("N", "Number of rows to keep.", min=1)],
    out: OutputFolder,
    args: RecipeArgs = None,
    allow_personal: Annotated[
        bool, switch("--allow-personal", "Also select rows with personal data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Select the most useful rows by base-model scores."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.curate import render_curation

    curated = api.data_curate(recipe, keep=keep, to=out, allow_personal=allow_personal)
    print_result(curated, render_curation(curated), as_json=as_json)


def data_lock(args: RecipeArgs = None, as_json: AsJson = False) -> None:
    """Lock a reviewed file as a golden set, never trained on."""
    golden = api.data_lock(parse_recipe_args(args))
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in golden.verdicts.items())
    reviewers = ", ".join(f"{name} ({rows:,})" for name, rows in golden.reviewers.items())
    dates = f"{golden.first_date} to {golden.last_date}"
    rows = format_count(golden.rows, "row")
    text = f"locked {rows} of {golden.file}: {verdicts}; {reviewers}, {dates}"
    if golden.excluded_rows:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in golden.excluded_rows.items())
        text += f"; left out: {counts}"
    print_result(golden, text, as_json=as_json)


def data_export_reviews(
    out: Annotated[Path, option("FILE.csv", "Table to write.", "--out", "--to")],
    args: RecipeArgs = None,
    as_json: AsJson = False,
) -> None:
    """Write rows as CSV, with columns for a review."""
    rows = api.data_export_reviews(parse_recipe_args(args), to=out)
    print_result({"rows": rows, "path": str(out)}, f"{rows:,} rows in {out}", as_json=as_json)


def data_import_reviews(
    tables: Annotated[
        list[Path], typer.Argument(metavar="FILE.csv", help="Tables of export-reviews, filled in.")
    ],
    out: Annotated[Path, option("FILE.jsonl", "File to write.", "--out", "--to")],
    reviewer: Annotated[str, option("NAME", "Reviewer of rows that name none.")] = "",
    date: Annotated[str, option("DATE", "Date of rows that have none.")] = "",
    response_schema: Annotated[
        Path | None, option("FILE.json", "JSON schema of a correct answer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read verdicts and corrections of reviewed tables."""
    from tunesmith.cli.views.data import render_reviews

    reviewed = api.data_import_reviews(
        *tables, to=out, reviewer=reviewer, date=date, response_schema=response_schema
    )
    print_result(reviewed, render_reviews(reviewed), as_json=as_json)


def data_split(
    out: OutputFolder,
    args: RecipeArgs = None,
    eval_share: Annotated[float, option("X", "Fraction of rows for eval.jsonl.")] = 0.1,
    test_share: Annotated[float, option("X", "Fraction of rows for test.jsonl.")] = 0.1,
    group: Annotated[str | None, option("KEY", "Keep rows with the same value together.")] = None,
    stratify: Annotated[
        str | None, option("KEY", "Stratify by this key instead of the label.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Split data into train, eval and test files without leakage."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.data import render_split

    split = api.data_split(
        recipe,
        to=out,
        eval_share=eval_share,
        test_share=test_share,
        group=group,
        stratify=stratify,
    )
    print_result(split, render_split(split), as_json=as_json)


VERBS: dict[str, Callable[..., None]] = {
    "data check": data_check,
    "data show": data_show,
    "data curate": data_curate,
    "data export-reviews": data_export_reviews,
    "data import-reviews": data_import_reviews,
    "data lock": data_lock,
    "data split": data_split,
}
