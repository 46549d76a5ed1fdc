"""The verbs on rows as functions: look at them, choose, divide, lock. As in verbs.py, where the others are.

report = tunesmith.data_check("recipe.yaml")["data"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api import ONE_STAGE, AnyPath, Wish, by_stage, gather, read_recipe, single
from tunesmith.core.errors import InputError
from tunesmith.core.types import DataReport, Plan
from tunesmith.recipe.schema import Recipe, Stages

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.advise.curate import Curated
    from tunesmith.advise.data_ablation import Proof, Trained
    from tunesmith.api import Known
    from tunesmith.data.annotation import Reviewed
    from tunesmith.data.dataset import Dataset
    from tunesmith.data.golden_set import Golden
    from tunesmith.data.group_split import Divided


def data_check(
    recipe: Wish | Known = None, *, rejected: AnyPath | None = None, **changes: Any
) -> dict[str, DataReport]:
    """Reads all rows once: a report for each role, with what was found. Rows that cannot be used are counted in it,
    and written into the file `rejected`, which is a new one, or one of these; InputError if there are no others."""
    from tunesmith.data.rejects import refuse_others_file, write_rejected
    from tunesmith.session.inputs import reports

    if rejected is not None:
        refuse_others_file(Path(rejected))
    found: dict[str, DataReport] = {}
    datasets: dict[str, Dataset] = {}
    for stage, known in by_stage(gather(recipe, **changes)).items():
        of_stage = reports(known, whole=True)
        found |= {f"{stage} {role}".strip(): report for role, report in of_stage.items()}
        datasets |= {f"{stage} {role}".strip(): known.datasets[role] for role in of_stage}
    if rejected is not None:
        write_rejected(Path(rejected), datasets, found)
    return found


def data_show(recipe: Wish | Known = None, *, rows: int = 3, ids: bool = False, **changes: Any) -> list[Text]:
    """The first training rows as the model sees them, coloured by what is trained; `print` shows them plain."""
    from tunesmith.session.inputs import show_rows

    known = by_stage(gather(recipe, **changes)).values()
    return [text for one in known for text in show_rows(one, rows=rows, ids=ids)]


def data_curate(
    recipe: Wish | Known = None, *, keep: int, to: AnyPath, likeness: str = "states", **changes: Any
) -> Curated:
    """Chooses `keep` rows of `data` by the scores of the base model, quality first, then diversity, into a new folder
    `to`, beside a random and the longest subset of the same size. Every other row keeps its reason; none is edited.
    `likeness`: by what rows are alike, the model's hidden states of their questions, or their words."""
    from tunesmith.advise.curate import curate

    return curate(single(gather(recipe, **changes)), keep, Path(to), likeness)


def data_prove(
    recipe: Wish | Known = None, *, folder: AnyPath, steps: int = 30, seeds: int = 1, **changes: Any
) -> Iterator[Trained | Proof]:
    """Trains briefly on each file of a folder of `data_curate`, and on the whole, from the same start: each `Trained`
    as it ends, then the `Proof`, which is also written into the folder. InputError without held-out rows."""
    from tunesmith.advise.data_ablation import conclude, try_subsets
    from tunesmith.core.atomic import write_file
    from tunesmith.core.json_io import json_bytes

    known = single(gather(recipe, **changes))
    decided = refuse_unprovable(known)
    trained: list[Trained] = []
    for one in try_subsets(decided, known, Path(folder), steps=steps, seeds=seeds):
        trained.append(one)
        yield one
    proof = conclude(decided, trained, steps)
    write_file(Path(folder) / "proof.json", json_bytes(proof, indent=1))
    yield proof


def refuse_unprovable(recipe: Known) -> Plan:
    """The plan of the short trainings. Raises what `data_prove` would, before rows are scored."""
    from tunesmith.advise.data_ablation import held_out_items
    from tunesmith.plan.build import refuse_without_room
    from tunesmith.session.inputs import make_plan

    known = single(recipe)
    decided = make_plan(known)
    held_out_items(decided, known)
    refuse_without_room(decided)
    return decided


def _of_one_stage(recipe: Wish, what: str, changes: Mapping[str, Any]) -> Recipe:
    wish = read_recipe(recipe, **changes)
    if isinstance(wish, Stages):
        raise InputError(f"{what}, and the recipe has several", where="stage", fix=ONE_STAGE)
    return wish


def data_lock(recipe: Wish = None, **changes: Any) -> Golden:
    """Locks the file of `data`, in which every row has a `review`: from now on no run trains on its rows, and none
    measures with it once it has changed."""
    from tunesmith.data.golden_set import lock
    from tunesmith.session.inputs import open_pool

    wish = _of_one_stage(recipe, "the file of one stage is locked", changes)
    return lock(open_pool(wish))


def data_review(recipe: Wish = None, *, tool: str, to: AnyPath, **changes: Any) -> int:
    """Writes the rows of `data` into the file `to`, which Label Studio (`label-studio`) or Argilla (`argilla`) imports,
    to be judged by people; how many there are."""
    from tunesmith.data.annotation import write_tasks
    from tunesmith.session.inputs import open_pool

    wish = _of_one_stage(recipe, "the rows of one stage are reviewed", changes)
    return write_tasks(open_pool(wish), tool, Path(to))


def data_reviewed(path: AnyPath, *, to: AnyPath, date: str | None = None) -> Reviewed:
    """Reads what either tool exports as JSON into a file of reviewed rows, for `data_lock`. `date`: of the reviews of
    Argilla, whose files have none."""
    from tunesmith.data.annotation import read_reviews

    return read_reviews(Path(path), Path(to), date)


def data_split(
    recipe: Wish = None,
    *,
    to: AnyPath,
    eval_share: float = 0.1,
    test_share: float = 0.1,
    group: str | None = None,
    stratify: str | None = None,
    **changes: Any,
) -> Divided:
    """Divides the rows of `data` into train.jsonl, eval.jsonl and test.jsonl in a new folder `to`. Rows that say nearly
    the same, ask the same or share the value of the key `group` stay together; each label, or value of the key
    `stratify`, is divided by itself. The recipe's seed decides."""
    from tunesmith.data.group_split import divide
    from tunesmith.session.inputs import open_pool

    wish = _of_one_stage(recipe, "the rows of one stage are divided", changes)
    shares = {"eval_share": eval_share, "test_share": test_share}
    return divide(open_pool(wish), Path(to), **shares, group=group, stratify=stratify, seed=wish.seed)
