"""When a run will be finished: all that it does beside its steps counts, and more of it takes longer."""

import dataclasses
from pathlib import Path
from typing import Any

from tiny_run import recipe
from tunesmith import facts
from tunesmith.finish import LOAD_SECONDS, Beside, with_finish
from tunesmith.scales import SCALES


def beside(folder: Path, scratch: Path, **wish: Any) -> Beside:
    known = facts.gather(recipe(folder, scratch, **wish))
    return Beside(facts.make_plan(known), known)


def whole(folder: Path, scratch: Path, **wish: Any) -> float:
    known = facts.gather(recipe(folder, scratch, **wish))
    plan = dataclasses.replace(facts.make_plan(known), seconds=(100.0,))
    return with_finish(plan, known).whole_seconds


def test_a_run_takes_longer_than_its_steps(tiny_folder: Path, tmp_path: Path) -> None:
    measured = whole(tiny_folder, tmp_path)
    alone = whole(tiny_folder, tmp_path, test_data=None, eval_data=None)
    assert measured > alone > 100 + LOAD_SECONDS


def test_looks_and_probes_count(tiny_folder: Path, tmp_path: Path) -> None:
    few, many = (whole(tiny_folder, tmp_path, eval_steps=steps) for steps in (2, 1))
    assert many > few
    probed, not_probed = (whole(tiny_folder, tmp_path, guard={"probe_steps": steps}) for steps in (1, 0))
    assert probed - not_probed == 0.05 * 100


def test_the_base_writes_longer_answers_than_the_trained_model(tiny_folder: Path, tmp_path: Path) -> None:
    found = beside(tiny_folder, tmp_path)
    assert found.before() > found.after() > 0
    assert found.scales() == len(SCALES) * found.eval_tokens
    assert beside(tiny_folder, tmp_path, method="full").scales() == 0
