import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch

from tunesmith.core import ranks as core_ranks
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.ranks import Ranks, open_ranks

TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_gets_back_what_it_says() -> None:
    with open_ranks() as ranks:
        ranks.send("step")
        tensor = torch.ones(3)
        ranks.sum_(tensor)
        assert ranks.is_main
        assert ranks.gather("ä") == ["ä"]
        assert tensor.tolist() == [1, 1, 1]


def test_one_process_does_not_load_torch() -> None:
    script = "from tunesmith.core.ranks import open_ranks\nwith open_ranks() as r: r.gather(1)\n"
    script += "import sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_torchruns_variables_say_who_a_process_is(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    ranks = open_ranks()
    assert (ranks.rank, ranks.world, ranks.local, ranks.restarts) == (1, 2, 0, 3)
    assert not ranks.is_main
    environment.setenv("WORLD_SIZE", "1")
    assert open_ranks().is_main


def test_a_rank_waits_for_rank_0_no_longer_than_it_says(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    environment.setattr(core_ranks, "START", timedelta(seconds=0.3))
    with pytest.raises(MachineError, match="rank 0 does not listen") as refusal, open_ranks():
        pytest.fail("nobody is there")
    assert refusal.value.where == "127.0.0.1:1"


def test_rank_0_waits_for_the_name_of_its_machine_no_longer(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("MASTER_ADDR", "host.invalid")
    environment.setattr(core_ranks, "START", timedelta(seconds=0.3))
    with pytest.raises(MachineError, match="MASTER_ADDR is unknown") as refusal, open_ranks():
        pytest.fail("nobody is there")
    assert refusal.value.where == "host.invalid:1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_ADDR", None, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ("MASTER_PORT", "", "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000, but the last port is 65535"),
        ("RANK", None, "RANK is not set"),
        ("RANK", "2", "RANK is 2, but WORLD_SIZE is 2"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', not a number\n  fix: start the ranks with"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    environment.delenv(name)
    if value is not None:
        environment.setenv(name, value)
    with pytest.raises(InputError, match=message):
        open_ranks()


def test_a_command_is_sent_by_rank_0_only() -> None:
    sent: list[Any] = []

    class RecordingRanks(Ranks):
        def _send_json(self, value: Any) -> None:
            sent.append(value)

    for rank in (1, 0):
        RecordingRanks(rank, world=2).send("step", step=3)
    assert sent == [{"do": "step", "step": 3}]
