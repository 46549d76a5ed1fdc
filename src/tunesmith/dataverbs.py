"""The verbs on rows as functions: look at them, choose, divide, lock. As in verbs.py, where the others are.

report = tunesmith.data_check("recipe.yaml")["data"]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import InputError
from tunesmith.recipe import Stages
from tunesmith.types import DataReport
from tunesmith.verbs import ONE_STAGE, AnyPath, Wish, by_stage, gather, read_recipe, single

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.curate import Curated
    from tunesmith.data.dataset import Dataset
    from tunesmith.data.divide import Divided
    from tunesmith.data.golden import Golden
    from tunesmith.verbs import Known


def data_check(
    recipe: Wish | Known = None, *, rejected: AnyPath | None = None, **changes: Any
) -> dict[str, DataReport]:
    """Reads all rows once: a report for each role, with what was found. Rows that cannot be used are counted in it,
    and written into the file `rejected`; InputError if there are no others."""
    from tunesmith.data.rejected import write_rejected
    from tunesmith.facts import reports

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
    from tunesmith.facts import show_rows

    known = by_stage(gather(recipe, **changes)).values()
    return [text for one in known for text in show_rows(one, rows=rows, ids=ids)]


def data_curate(recipe: Wish | Known = None, *, keep: int, to: AnyPath, **changes: Any) -> Curated:
    """Chooses `keep` rows of `data` by the scores of the base model, quality first, then diversity, into a new folder
    `to`, beside a random and the longest subset of the same size. Every other row keeps its reason; none is edited."""
    from tunesmith.curate import curate

    return curate(single(gather(recipe, **changes)), keep, Path(to))


def data_lock(recipe: Wish = None, **changes: Any) -> Golden:
    """Locks the file of `data`, in which every row has a `review`: from now on no run trains on its rows, and none
    measures with it once it has changed."""
    from tunesmith.data.golden import lock
    from tunesmith.facts import open_pool

    wish = read_recipe(recipe, **changes)
    if isinstance(wish, Stages):
        raise InputError("the file of one stage is locked, and the recipe has several", where="stage", fix=ONE_STAGE)
    return lock(open_pool(wish))


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
    from tunesmith.data.divide import divide
    from tunesmith.facts import open_pool

    wish = read_recipe(recipe, **changes)
    if isinstance(wish, Stages):
        raise InputError("the rows of one stage are divided, and the recipe has several", where="stage", fix=ONE_STAGE)
    shares = {"eval_share": eval_share, "test_share": test_share}
    return divide(open_pool(wish), Path(to), **shares, group=group, stratify=stratify, seed=wish.seed)
