"""One model beside another, item by item, from what their runs have measured: no model is loaded.

    RUN, RUN@0 or base, answers.jsonl -> Measured; two of them -> Compared

Left out: sides that no file holds, such as a checkpoint or half of an adapter (contenders.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.events import Sample
from tunesmith.core.json_io import from_json, read_json
from tunesmith.core.run_dir import AFTER, BEFORE, RECORD, is_run, is_staged, plan_in
from tunesmith.core.types import Comparison, Json
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.metrics import METRICS, given_to, graded, split
from tunesmith.evaluate.pairing import paired
from tunesmith.evaluate.results import Measured, Measurement, compare
from tunesmith.evaluate.scale_choice import LARGEST
from tunesmith.evaluate.significance import holm, p_of
from tunesmith.model.hub.builtin import BUILT_IN, HUB_ID

BASE = "base"
SCALED = re.compile(r"@\d+(\.\d+)?$")
RUNS = Path("runs")  # where runs are, unless somebody said otherwise
MOST_NEAR = 3


@dataclass(frozen=True)
class Compared:
    """`b` minus `a`, measure by measure. `together`: Holm's p of each among all. `notes`: what is not compared."""

    a: str
    b: str
    comparisons: tuple[Comparison, ...]
    together: tuple[float, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One of the two as it was named. `run` is the folder of its run, if it is of one; `scale` is of its adapter."""

    name: str
    run: Path | None = None
    scale: float = 1.0
    checkpoint: Path | None = None

    @property
    def file(self) -> str:
        """Which file of the run holds its measures; none for a checkpoint or another scale."""
        return "" if self.checkpoint else {0.0: BEFORE, 1.0: AFTER}.get(self.scale, "")


def side_of(name: str) -> Side:
    """What a name means. Raises InputError for a scale that is none, and for what can be seen to be nothing."""
    try:
        side = _side(name)
        if side.run is None and name != BASE and not name.endswith(".jsonl"):
            _refuse_nothing(name)
    except OSError as error:
        raise InputError(f"nothing can have this name: {error.strerror}", where=f"{name:.80}") from error
    return side


def _side(name: str) -> Side:
    path, at, scale = name.rpartition("@")
    if at and is_run(Path(path)):
        if not re.fullmatch(r"\d+(\.\d+)?", scale) or float(scale) > LARGEST:
            fix = f"a scale is a number from 0 to {LARGEST:g}: RUN@0.5"
            raise InputError(f"{scale:.40} is no scale", where=name, fix=fix)
        return Side(name, Path(path), float(scale))
    found = Path(name)
    if found.parent.name == "checkpoints" and found.name.startswith("step-") and is_run(found.parent.parent):
        return Side(name, found.parent.parent, checkpoint=found)
    if found.name == "adapter" and is_run(found.parent):
        return Side(name, found.parent)
    return Side(name, found if is_run(found) else None)


def _refuse_nothing(name: str) -> None:
    """InputError for a path where nothing is. An id on the hub looks like one: it passes unless it is near to a run."""
    path = Path(name.rpartition("@")[0] if SCALED.search(name) else name).expanduser()
    if path.exists() or name in BUILT_IN:
        return
    near = _nearest(path)
    if HUB_ID.fullmatch(name) and not any(is_run(one) for one in [*near, *_folders(path.parent)]):
        return
    likely = [str(one) for one in near]
    if len(path.parts) == 1:
        likely += [str(one) for one in _nearest(RUNS / path)]
        likely += get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    fix = f"did you mean {' or '.join(likely[:MOST_NEAR])}?" if likely else f"built in: {', '.join(BUILT_IN)}"
    raise InputError("there is no run folder, model folder or built-in model of that name", where=name, fix=fix)


def _nearest(path: Path) -> list[Path]:
    """Folders whose path is like it, part by part; the folder itself where there is one."""
    if path.is_dir() or path == path.parent:
        return [path] if path.is_dir() else []
    found: list[Path] = []
    for parent in _nearest(path.parent):
        own = {one.name: one for one in _folders(parent)}
        alike = [path.name] if path.name in own else get_close_matches(path.name, own, n=MOST_NEAR)
        found += [own[name] for name in alike]
    return found


def _folders(path: Path) -> list[Path]:
    """Those in a folder that may be read."""
    try:
        return [one for one in path.iterdir() if one.is_dir()]
    except OSError:
        return []


def on_file(side: Side, other: Side) -> Measured | None:
    """What files say of it: its run's, or, of the `base` and of answers, those of the other side's run. None if a model
    must be loaded. Raises InputError for a run that is not finished, damaged or of another version."""
    if side.name == BASE or side.name.endswith(".jsonl"):
        if other.run is None:
            what = f"{side.name} is compared with a run, whose items it is measured on"
            raise InputError(what, where=other.name, fix="name a run folder as the other side")
        return measured_in(other.run, BEFORE) if side.name == BASE else answers_in(Path(side.name), other.run)
    return measured_in(side.run, side.file) if side.run is not None and side.file else None


def measured_in(run: Path, file: str) -> Measured:
    """The measures of a finished run."""
    if not (run / RECORD).is_file():
        raise InputError("this run is not finished", where=str(run), fix=f"finish it: tunesmith resume {run}")
    if not (run / file).is_file():
        what = f"there is no {file}: the run was made by another version, or its folder is damaged"
        raise InputError(what, where=str(run), fix="measure it again with `tunesmith eval`, or train it again")
    return from_json(Measured, read_json(run / file), where=str(run / file))


# ---------------------------------------------------------------- answers of somebody else


def answers_in(path: Path, run: Path) -> Measured:
    """A file of answers, {"id": ..., "answer": ...} a line, graded by the metrics of a run. Raises InputError with
    file:line for a row without them, for an id that the run does not know, and for one that stands twice."""
    if is_staged(run):
        what = "answers are graded by the metrics of one run, and this one has several stages"
        raise InputError(what, where=str(run), fix="name the folder of a stage")
    known = measured_in(run, AFTER)
    asked = {sample.id: sample for sample in known.samples if sample.expected}
    said = _read(path, asked)
    plan = plan_in(run)
    schema = read_json(Path(plan.recipe["schema"])) if plan.recipe.get("schema") else None
    names = [name for name in plan["metrics"] if split(name)[0] in METRICS]
    found = [_graded(name, said, asked, schema) for name in names]
    if not found:
        raise InputError("the run has no metric that grades answers", where=str(run), fix="compare it with another run")
    return Measured(tuple(found), contents=known.contents)


def _read(path: Path, asked: dict[str, Sample]) -> dict[str, str]:
    source, said = open_source(path), dict[str, str]()
    for place in range(len(source)):
        row = source.row(place)
        item, answer = row.data.get("id"), row.data.get("answer")
        if not isinstance(item, str) or not isinstance(answer, str):
            fix = 'write {"id": "test.jsonl:1", "answer": "..."}'
            raise InputError("the row needs an `id` and an `answer`, both texts", where=row.id, fix=fix)
        if item not in asked:
            fix = f"ids are those of its after.json, such as {next(iter(asked), 'none')}"
            raise InputError(f"the run has asked nothing with the id {item!r:.80}", where=row.id, fix=fix)
        if item in said:
            raise InputError(f"the id {item!r:.80} stands twice", where=row.id, fix="give one answer to each")
        said[item] = answer
    return said


def _graded(metric: str, said: dict[str, str], asked: dict[str, Sample], schema: Json | None) -> Measurement:
    given = given_to(metric, schema)
    values = tuple(graded(metric, answer, asked[item].expected, given) for item, answer in said.items())
    return Measurement("test", metric, tuple(said), values)


# ---------------------------------------------------------------- together


def compared(names: Sequence[str], measured: Sequence[Measured]) -> Compared:
    """The second minus the first. Raises InputError when they have nothing in common."""
    pairs, notes = paired(*measured)
    if not pairs:
        fix = "compare runs with the same test_data or retention_data"
        raise InputError("they have no measure in common:\n  " + "\n  ".join(notes), where=" and ".join(names), fix=fix)
    found = tuple(compare(first, second) for first, second in pairs)
    return Compared(names[0], names[1], found, holm([p_of(one) for one in found]), tuple(notes))
