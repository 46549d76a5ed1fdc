"""Which run `train` goes on with when torchrun has started it again."""

import dataclasses
import os
from pathlib import Path

from tunesmith.core.json_io import dump_json
from tunesmith.core.run_dir import PLAN_FILE, RECORD_FILE
from tunesmith.core.types import Plan
from tunesmith.train.resume import find_interrupted_run
from view_samples import PLAN

LAUNCH = 1000.0  # when torchrun was started, seconds since 1970


def write_run(runs: Path, name: str, plan: Plan, started: float) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / PLAN_FILE).write_bytes(dump_json(plan))
    os.utime(folder / PLAN_FILE, (started, started))
    return folder


def make_plan(runs: Path) -> Plan:
    config = dataclasses.replace(PLAN.config, output_dir=str(runs / "run-9"))
    return dataclasses.replace(PLAN, recipe={"model": "m"}, config=config)


def test_the_newest_unfinished_run_of_the_recipe_since_the_launch_goes_on(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert find_interrupted_run(plan, LAUNCH) is None
    write_run(tmp_path, "before", plan, LAUNCH - 1)
    write_run(tmp_path, "other", dataclasses.replace(plan, recipe={"model": "n"}), LAUNCH + 9)
    finished = write_run(tmp_path, "finished", plan, LAUNCH + 9)
    (finished / RECORD_FILE).touch()
    assert find_interrupted_run(plan, LAUNCH) is None
    write_run(tmp_path, "z-first", plan, LAUNCH + 1)
    newest = write_run(tmp_path, "newest", plan, LAUNCH + 2)
    assert find_interrupted_run(plan, LAUNCH) == newest


def test_runs_from_before_the_launch_are_not_read(tmp_path: Path) -> None:
    """One that another version has written, or that is damaged, does not keep a run from going
    on."""
    plan = make_plan(tmp_path)
    for name, content in {"old": '{"format": 1}', "damaged": "{"}.items():
        folder = write_run(tmp_path, name, plan, LAUNCH)
        (folder / PLAN_FILE).write_text(content)
        os.utime(folder / PLAN_FILE, (LAUNCH - 1, LAUNCH - 1))
    interrupted = write_run(tmp_path, "interrupted", plan, LAUNCH + 1)
    assert find_interrupted_run(plan, LAUNCH) == interrupted
