from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.ranks import Ranks
from tunesmith.train.follow import Follower, check_ranks


def test_a_machine_that_does_not_see_the_run_folder_says_so_when_asked(tmp_path: Path) -> None:
    follower = Follower(Ranks())
    follower.run_command("run", path=str(tmp_path / "run-1"), plan={}, fingerprint={}, source="")
    follower.run_command("open")  # nothing is loaded after a problem
    assert follower.problem is not None
    assert follower.problem.message == "this machine does not see the run folder of rank 0"
    assert "disk that all machines share" in follower.problem.fix


def test_a_folder_with_another_plan_is_not_that_of_rank_0(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"steps": 3}')
    follower = Follower(Ranks())
    follower.run_command("run", path=str(tmp_path), plan={"steps": 4}, fingerprint={}, source="")
    assert follower.problem is not None
    assert "does not see" in follower.problem.message


def test_rank_0_raises_the_problem_of_another_rank() -> None:
    problem = {"message": "other inputs", "where": "rank 2 on b", "fix": "copy", "exit_code": 2}
    problem["is_consequence"] = False
    consequence = problem | {"message": "another rank", "exit_code": 3, "is_consequence": True}

    class ThreeRanks(Ranks):
        def gather(self, value: object) -> list[object]:
            return [value, *({"value": None, "problem": each} for each in (consequence, problem))]

    with pytest.raises(InputError, match="rank 2 on b: other inputs"):
        check_ranks(ThreeRanks())
