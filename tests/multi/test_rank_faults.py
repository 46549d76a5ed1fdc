"""What goes wrong on one rank of several reaches all of them in the same step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_loops import (
    drift,
    fail_in_a_step,
    roll_back,
    stop_while_groups_form,
    train_with_little_memory,
    train_with_nan,
    wait_for_silent_rank,
)
from rank_processes import call_on_rank, run_in_turn, run_processes
from rank_runs import start_with_recipes
from tunesmith.core.ranks import SINGLE_PROCESS

pytestmark = pytest.mark.multi
Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return what each of two ranks, which start once, says of faults after which they go on."""
    faults: dict[str, tuple[Any, ...]] = {
        "nan": (train_with_nan,),
        "little memory": (train_with_little_memory,),
        "drift": (drift,),
        "rollback": (roll_back, str(tmp_path_factory.mktemp("two"))),
    }
    return dict(zip(faults, run_in_turn(list(faults.values()), 2), strict=True))


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all(results: Results) -> None:
    verdicts, weights = train_with_nan(SINGLE_PROCESS)
    assert [verdict.split(",")[0] for verdict in verdicts] == ["3 non-finite: step 3: loss nan"]
    for rank_verdicts, rank_weights in results["nan"]:
        assert rank_verdicts == verdicts
        assert rank_weights == results["nan"][0][1]
        difference = np.frombuffer(rank_weights, np.float32) - np.frombuffer(weights, np.float32)
        assert np.abs(difference).max() < 1e-5


def test_all_ranks_halve_their_packs_when_one_is_out_of_memory(results: Results) -> None:
    messages = [verdicts[0] for verdicts, _ in results["little memory"]]
    assert messages[0].startswith("1 memory: rank 1 is out of memory; packs of ")
    assert messages[1].startswith("1 memory: out of memory: CUDA out of memory; packs of ")
    assert messages[0].partition(";")[2] == messages[1].partition(";")[2], "the same packs"
    main_weights, other_weights = (weights for _, weights in results["little memory"])
    assert main_weights == other_weights


def test_a_bug_in_the_middle_of_a_step_of_rank_0_leaves_no_rank_waiting() -> None:
    main, other = run_processes(call_on_rank, 2, fail_in_a_step)
    assert main.startswith("Traceback")
    assert main.endswith("ValueError: a bug\n")
    assert other.startswith("another rank has ended")


def test_a_rank_without_a_sign_of_life_ends_the_others() -> None:
    assert run_processes(wait_for_silent_rank, 2) == [None, "awake"], "rank 0 has ended itself"


def test_a_rank_that_is_stopped_while_groups_form_ends_the_others(tmp_path: Path) -> None:
    assert run_processes(stop_while_groups_form, 2, str(tmp_path)) == [None, None]


def test_weights_that_differ_in_one_bit_are_noticed_by_all(results: Results) -> None:
    for message in results["drift"]:
        assert message.startswith("the weights of rank 1 differ from those of rank 0")


def test_a_rollback_of_rank_0_reaches_all(results: Results, tmp_path: Path) -> None:
    expected = np.frombuffer(roll_back(SINGLE_PROCESS, str(tmp_path)), np.float32)
    first, second = results["rollback"]
    assert first == second
    np.testing.assert_allclose(np.frombuffer(first, np.float32), expected, rtol=0, atol=1e-5)


RECIPE = {"model": "m", "data": "rows.jsonl"}


def test_ranks_with_the_same_recipe_start() -> None:
    assert run_processes(start_with_recipes, 2, [RECIPE, RECIPE]) == [(0, "started"), (0, "")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lora_r": 4}, "another recipe than that of rank 0: lora_r"),
        ({"lora_r": "many"}, "lora_r"),
    ],
)
def test_ranks_with_other_recipes_are_refused_by_rank_0(
    other: dict[str, Any], message: str
) -> None:
    main, follower = run_processes(start_with_recipes, 2, [RECIPE, RECIPE | other])
    assert (main[0], follower) == (2, (2, ""))
    assert message in main[1]
    assert "rank 1 on " in main[1]
