"""The verbs of the command line that look at rows and write them: `data check`, `show`, `curate`,
`review`, `reviewed`, `lock`, `split`.

Each is a function as in cli.py, whose table of verbs takes them from here. Imports stand inside the
functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api, dataverbs
from tunesmith.cli.args import AsJson, RecipeArgs, parse_recipe_args, print_result
from tunesmith.recipe.schema import Recipe


def data_check(
    args: RecipeArgs = None,
    rejected: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the rows that cannot be used here.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read all data once and say what is wrong with it; exit code 2 if a run would stop at bad
    rows."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.tables import render_data
    from tunesmith.data.rejects import has_many_dropped

    reports = dataverbs.data_check(recipe, rejected=rejected)
    print_result({"data": reports}, render_data(reports), as_json=as_json)
    skip_bad = (
        recipe.skip_bad
        if isinstance(recipe, Recipe)
        else all(stage_recipe.skip_bad for stage_recipe in recipe.recipes)
    )
    train_reports = [report for role, report in reports.items() if role.split()[-1] == "data"]
    if (
        any(report.rejected for report in reports.values())
        or any(map(has_many_dropped, train_reports))
    ) and not skip_bad:
        sys.exit(2)


def data_show(
    args: RecipeArgs = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print real rows as the model sees them, coloured by what is trained."""
    texts = dataverbs.data_show(parse_recipe_args(args), rows=rows, ids=ids)
    print_result({"rows": [text.plain for text in texts]}, *texts, as_json=as_json)


def data_curate(
    keep: Annotated[int, typer.Option(min=1, help="How many rows.", show_default=False)],
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A new folder for the files.", show_default=False)
    ],
    args: RecipeArgs = None,
    similarity: Annotated[
        str, typer.Option(help="By what rows are alike: the model's `states`, or `words`.")
    ] = "states",
    ablate: Annotated[
        bool, typer.Option("--prove", help="Train on each file briefly: which is better?")
    ] = False,
    steps: Annotated[int, typer.Option(min=5, help="Of each training of --prove.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="How often --prove trains on each file.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Choose a few good rows by the scores of the base model; why each other row is not kept."""
    inputs = api.load_inputs(parse_recipe_args(args))
    from tunesmith.cli.views.curate import render_ablation, render_curation, report_subset_runs
    from tunesmith.core.json_io import to_jsonable

    if ablate:
        dataverbs.plan_ablation(inputs)
    curated = dataverbs.data_curate(inputs, keep=keep, to=to, likeness=similarity)
    if not (ablate and as_json):
        print_result(curated, render_curation(curated), as_json=as_json)
    if ablate:
        ablation = report_subset_runs(
            dataverbs.data_prove(inputs, folder=to, steps=steps, seeds=seeds)
        )
        print_result(
            {**to_jsonable(curated), "proof": ablation}, render_ablation(ablation), as_json=as_json
        )


def data_lock(args: RecipeArgs = None, as_json: AsJson = False) -> None:
    """Lock a reviewed file, so that no run trains on it, and none measures with it once it has
    changed."""
    golden = dataverbs.data_lock(parse_recipe_args(args))
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in golden.verdicts.items())
    reviewers = ", ".join(f"{name} ({rows:,})" for name, rows in golden.reviewers.items())
    dates = f"{golden.first_date} to {golden.last_date}"
    print_result(
        golden,
        f"locked {golden.rows:,} rows of {golden.file}: {verdicts}; {reviewers}, {dates}",
        as_json=as_json,
    )


def data_export_reviews(
    tool: Annotated[
        str, typer.Option(help="Where people review: label-studio or argilla.", show_default=False)
    ],
    to: Annotated[
        Path,
        typer.Option(metavar="FILE.json", help="The file to import there.", show_default=False),
    ],
    args: RecipeArgs = None,
    as_json: AsJson = False,
) -> None:
    """Write the rows of a file for people to judge, as Label Studio or Argilla imports them."""
    rows = dataverbs.data_review(parse_recipe_args(args), tool=tool, to=to)
    print_result({"rows": rows, "path": str(to)}, f"{rows:,} rows in {to}", as_json=as_json)


def data_import_reviews(
    path: Annotated[
        Path, typer.Argument(metavar="EXPORT.json", help="What the tool has exported as JSON.")
    ],
    to: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="The reviewed rows.", show_default=False)
    ],
    date: Annotated[
        str | None, typer.Option(help="Of reviews that have none.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read what Label Studio or Argilla exports back as reviewed rows, to be locked."""
    reviewed = dataverbs.data_reviewed(path, to=to, date=date)
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in reviewed.verdicts.items())
    skipped_text = (
        f"; {reviewed.unanswered_rows:,} without a verdict are left out"
        if reviewed.unanswered_rows
        else ""
    )
    print_result(
        reviewed,
        f"{reviewed.rows:,} reviewed rows of {reviewed.tool} in {reviewed.path}: {verdicts}{skipped_text}",
        as_json=as_json,
    )


def data_split(
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A new folder for the files.", show_default=False)
    ],
    args: RecipeArgs = None,
    eval_share: Annotated[float, typer.Option(help="Of the rows, for eval.jsonl.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Of the rows, for test.jsonl.")] = 0.1,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Rows with one value of it stay together.", show_default=False
        ),
    ] = None,
    stratify: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Divide each value of it; else each label.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Divide data into files for training, selecting and the last measure; rows that are alike stay
    together."""
    recipe = parse_recipe_args(args)
    from tunesmith.cli.views.tables import render_split

    shares = {"eval_share": eval_share, "test_share": test_share}
    split = dataverbs.data_split(recipe, to=to, **shares, group=group, stratify=stratify)
    print_result(split, render_split(split), as_json=as_json)


VERBS: dict[str, Callable[..., None]] = {
    "data check": data_check,
    "data show": data_show,
    "data curate": data_curate,
    "data review": data_export_reviews,
    "data reviewed": data_import_reviews,
    "data lock": data_lock,
    "data split": data_split,
}
