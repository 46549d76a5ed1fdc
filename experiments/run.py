"""The book of claims: run experiments that test what guides say, and write the page.

    python -m experiments.run [--only NAME ...] [--quick] [--minutes M] [--page]

Each arm is trained once per seed, in the order of evidence per minute; `experiments/NAME/
results.json` grows as arms end, and an arm that it has with the same settings does not run again.
A killed run continues where it was. An arm whose process fails is reported and has no result; the
others run, and the exit code is 1. `docs/results/evidence.md` is written after each experiment that
changed. `--quick` runs two steps of a two-layer model in `build/evidence-quick/` and leaves
results and page alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from experiments.arms import ArmError, ArmJob, ArmRun, run_arm
from experiments.claims import Results, judge_claims
from experiments.definitions import (
    BUILD_FILE,
    Arm,
    Experiment,
    load_experiments,
    resolve_recipe,
    shorten_experiment,
)
from experiments.page import write_page
from experiments.short_model import save_general_texts, save_short_model

import tunesmith
from tunesmith.core.atomic import write_file
from tunesmith.core.formatting import format_count
from tunesmith.core.hardware import measure_machine
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Json

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "evidence"
QUICK_WORK = ROOT / "build" / "evidence-quick"
PAGE = ROOT / "docs" / "results" / "evidence.md"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class StoredRun:
    """A result with what it was measured on. `settings` is the recipe as the experiment has it."""

    arm: str
    seed: int
    settings: Json
    version: str
    date: str
    device: str
    run: ArmRun


def run_experiments(
    experiments: Sequence[Experiment], work: Path, results_root: Path, *, deadline: float
) -> Iterator[Experiment]:
    """Run what has no result; yield each experiment after it changed. Stop at the deadline.

    Raises ArmError at the end if arms failed."""
    failed: list[str] = []
    for experiment in experiments:
        file = results_root / experiment.name / RESULTS_FILE
        stored = load_results(file)
        has_changed = False
        for name, arm, seed in list_missing(experiment, stored):
            if time.monotonic() > deadline:
                break
            print(f"{experiment.name}: {name}, seed {seed} ...", flush=True)
            try:
                run = run_arm(make_job(experiment, name, arm, seed, work))
            except ArmError as error:
                print(f"    {error}", flush=True)
                failed.append(f"{experiment.name}: {name}, seed {seed}")
                continue
            print(f"    {run.minutes:g} minutes {run.failure}", flush=True)
            settings = make_settings(experiment, arm, seed)
            stored = [each for each in stored if (each.arm, each.seed) != (name, seed)]
            stored.append(_stamp(name, seed, settings, run))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, dump_json(stored))
            has_changed = True
        if has_changed:
            yield experiment
    if failed:
        raise ArmError(f"{format_count(len(failed), 'arm')} failed: {'; '.join(failed)}")


def list_missing(
    experiment: Experiment, stored: Sequence[StoredRun]
) -> Iterator[tuple[str, Arm, int]]:
    """Yield each arm and seed without a result of these settings: first seeds first."""
    finished = {(each.arm, each.seed): each.settings for each in stored}
    num_seeds = max(len(arm.seeds) for arm in experiment.arms.values())
    for index in range(num_seeds):
        for name, arm in experiment.arms.items():
            if index < len(arm.seeds):
                seed = arm.seeds[index]
                if finished.get((name, seed)) != make_settings(experiment, arm, seed):
                    yield name, arm, seed


def make_settings(experiment: Experiment, arm: Arm, seed: int) -> Json:
    """Return what decides the result of an arm, the same on every machine."""
    settings: Json = {"recipe": {**experiment.recipe, **arm.recipe, "seed": seed}}
    if arm.answering is not None:
        settings["answering"] = arm.answering.model_dump()
        settings["documents"] = arm.documents
    if (experiment.folder / BUILD_FILE).exists():
        # the file that defines it: experiments may share their rows
        source = inspect.getfile(_import_builder(experiment))
        settings["build"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    return settings


def make_job(experiment: Experiment, name: str, arm: Arm, seed: int, work: Path) -> ArmJob:
    built = work / experiment.name / "data"
    build_data(experiment, built)
    settings = make_settings(experiment, arm, seed)
    recipe = {"retention_data": "none"} | resolve_recipe(settings["recipe"], built)
    folder = work / experiment.name / f"{re.sub(r'[^a-z0-9.-]+', '-', name.lower())}-{seed}"
    documents = built / arm.documents if arm.documents else None
    return ArmJob(folder, settings, recipe, arm.answering, documents)


def build_data(experiment: Experiment, folder: Path) -> None:
    """Fill the folder by the experiment's own script, if it has one; the same rows each time."""
    if (experiment.folder / BUILD_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _import_builder(experiment)(folder)


def _import_builder(experiment: Experiment) -> Callable[[Path], None]:
    return importlib.import_module(f"experiments.{experiment.name}.build").build_data


def load_results(file: Path) -> list[StoredRun]:
    return parse_as(list[StoredRun], read_json(file), where=str(file)) if file.exists() else []


def _stamp(arm: str, seed: int, settings: Json, run: ArmRun) -> StoredRun:
    machine = measure_machine(Path())
    device = f"{machine.device_name}, {format_count(machine.cores, 'core')}"
    today = date.today().isoformat()
    return StoredRun(arm, seed, settings, tunesmith.__version__, today, device, run)


def collect_results(
    experiments: Sequence[Experiment], results_root: Path
) -> Mapping[str, list[StoredRun]]:
    """Return the results that belong to the experiments as they are now defined."""
    collected: dict[str, list[StoredRun]] = {}
    for experiment in experiments:
        stored = load_results(results_root / experiment.name / RESULTS_FILE)
        missing = {(name, seed) for name, _, seed in list_missing(experiment, stored)}
        valid = {(name, seed) for name, arm in experiment.arms.items() for seed in arm.seeds}
        current = [run for run in stored if (run.arm, run.seed) in valid - missing]
        collected[experiment.name] = current
    return collected


def group_runs(stored: Sequence[StoredRun]) -> Results:
    grouped: dict[str, dict[int, ArmRun]] = {}
    for each in stored:
        grouped.setdefault(each.arm, {})[each.seed] = each.run
    return grouped


def update_page(experiments: Sequence[Experiment], results_root: Path, page: Path) -> None:
    collected = collect_results(experiments, results_root)
    results = {name: group_runs(stored) for name, stored in collected.items()}
    write_page(page, experiments, collected, judge_claims(experiments, results))


def main() -> None:
    experiments = load_experiments()
    names = [experiment.name for experiment in experiments]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=names,
        default=names,
        help="Experiments to run.",
    )
    parser.add_argument("--quick", action="store_true", help="Two steps of a two-layer model.")
    parser.add_argument("--minutes", type=float, default=12 * 60, help="Start no arm after these.")
    parser.add_argument("--page", action="store_true", help="Write the page and run nothing.")
    args = parser.parse_args()
    chosen = [experiment for experiment in experiments if experiment.name in args.only]
    deadline = time.monotonic() + 60 * args.minutes
    os.chdir(ROOT)
    try:
        if args.quick:
            _run_quick(chosen, deadline)
        elif not args.page:
            root = ROOT / "experiments"
            for _ in run_experiments(chosen, WORK, root, deadline=deadline):
                update_page(experiments, root, PAGE)
    except ArmError as error:
        sys.exit(str(error))
    finally:
        if not args.quick:
            update_page(experiments, ROOT / "experiments", PAGE)


def _run_quick(chosen: Sequence[Experiment], deadline: float) -> None:
    shutil.rmtree(QUICK_WORK, ignore_errors=True)
    model = save_short_model(QUICK_WORK / "model")
    texts = save_general_texts(QUICK_WORK / "general.jsonl")
    short = [shorten_experiment(experiment, model, texts) for experiment in chosen]
    root = QUICK_WORK / "results"
    for _ in run_experiments(short, QUICK_WORK, root, deadline=deadline):
        update_page(short, root, QUICK_WORK / "evidence.md")


if __name__ == "__main__":
    main()
