"""The verbs of the command line that look at rows and write them: `data check`, `show`, `curate`, `review`,
`reviewed`, `lock`, `split`.

Each is a function as in cli.py, whose table of verbs takes them from here. Imports stand inside the functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import api, dataverbs
from tunesmith.cli.args import AsJson, Wish, read_wish, say
from tunesmith.recipe.schema import Recipe


def data_check(
    wish: Wish = None,
    rejected: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows that cannot be used here.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read all data once and say what is wrong with it; exit code 2 if a run would stop at bad rows."""
    recipe = read_wish(wish)
    from tunesmith.cli.views.tables import data_view
    from tunesmith.data.rejects import loses_most

    found = dataverbs.data_check(recipe, rejected=rejected)
    say({"data": found}, data_view(found), as_json=as_json)
    skip_bad = recipe.skip_bad if isinstance(recipe, Recipe) else all(one.skip_bad for one in recipe.recipes)
    trained = [report for role, report in found.items() if role.split()[-1] == "data"]
    if (any(report.rejected for report in found.values()) or any(map(loses_most, trained))) and not skip_bad:
        sys.exit(2)


def data_show(
    wish: Wish = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print real rows as the model sees them, coloured by what is trained."""
    texts = dataverbs.data_show(read_wish(wish), rows=rows, ids=ids)
    say({"rows": [text.plain for text in texts]}, *texts, as_json=as_json)


def data_curate(
    keep: Annotated[int, typer.Option(min=1, help="How many rows.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the files.", show_default=False)],
    wish: Wish = None,
    likeness: Annotated[str, typer.Option(help="By what rows are alike: the model's `states`, or `words`.")] = "states",
    prove: Annotated[bool, typer.Option("--prove", help="Train on each file briefly: which is better?")] = False,
    steps: Annotated[int, typer.Option(min=5, help="Of each training of --prove.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="How often --prove trains on each file.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Choose a few good rows by the scores of the base model; why each other row is not kept."""
    known = api.gather(read_wish(wish))
    from tunesmith.cli.views.curate import curated_view, proof_view, told
    from tunesmith.core.json_io import to_json

    if prove:
        dataverbs.refuse_unprovable(known)
    curated = dataverbs.data_curate(known, keep=keep, to=to, likeness=likeness)
    if not (prove and as_json):
        say(curated, curated_view(curated), as_json=as_json)
    if prove:
        proof = told(dataverbs.data_prove(known, folder=to, steps=steps, seeds=seeds))
        say({**to_json(curated), "proof": proof}, proof_view(proof), as_json=as_json)


def data_lock(wish: Wish = None, as_json: AsJson = False) -> None:
    """Lock a reviewed file, so that no run trains on it, and none measures with it once it has changed."""
    golden = dataverbs.data_lock(read_wish(wish))
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in golden.verdicts.items())
    reviewers = ", ".join(f"{name} ({rows:,})" for name, rows in golden.reviewers.items())
    dates = f"{golden.first_date} to {golden.last_date}"
    say(golden, f"locked {golden.rows:,} rows of {golden.file}: {verdicts}; {reviewers}, {dates}", as_json=as_json)


def data_review(
    tool: Annotated[str, typer.Option(help="Where people review: label-studio or argilla.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="FILE.json", help="The file to import there.", show_default=False)],
    wish: Wish = None,
    as_json: AsJson = False,
) -> None:
    """Write the rows of a file for people to judge, as Label Studio or Argilla imports them."""
    rows = dataverbs.data_review(read_wish(wish), tool=tool, to=to)
    say({"rows": rows, "path": str(to)}, f"{rows:,} rows in {to}", as_json=as_json)


def data_reviewed(
    path: Annotated[Path, typer.Argument(metavar="EXPORT.json", help="What the tool has exported as JSON.")],
    to: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The reviewed rows.", show_default=False)],
    date: Annotated[str | None, typer.Option(help="Of reviews that have none.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Read what Label Studio or Argilla exports back as reviewed rows, to be locked."""
    found = dataverbs.data_reviewed(path, to=to, date=date)
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in found.verdicts.items())
    left = f"; {found.left_out:,} without a verdict are left out" if found.left_out else ""
    say(found, f"{found.rows:,} reviewed rows of {found.tool} in {found.path}: {verdicts}{left}", as_json=as_json)


def data_split(
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the files.", show_default=False)],
    wish: Wish = None,
    eval_share: Annotated[float, typer.Option(help="Of the rows, for eval.jsonl.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Of the rows, for test.jsonl.")] = 0.1,
    group: Annotated[
        str | None, typer.Option(metavar="KEY", help="Rows with one value of it stay together.", show_default=False)
    ] = None,
    stratify: Annotated[
        str | None, typer.Option(metavar="KEY", help="Divide each value of it; else each label.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Divide data into files for training, selecting and the last measure; rows that are alike stay together."""
    recipe = read_wish(wish)
    from tunesmith.cli.views.tables import divided_view

    shares = {"eval_share": eval_share, "test_share": test_share}
    divided = dataverbs.data_split(recipe, to=to, **shares, group=group, stratify=stratify)
    say(divided, divided_view(divided), as_json=as_json)


VERBS: dict[str, Callable[..., None]] = {
    "data check": data_check,
    "data show": data_show,
    "data curate": data_curate,
    "data review": data_review,
    "data reviewed": data_reviewed,
    "data lock": data_lock,
    "data split": data_split,
}
