"""A run whose last rollback went to a checkpoint that is gone does not go on from an older one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_runs import write_run
from tunesmith.core.errors import InputError
from tunesmith.core.events import Rollback
from tunesmith.core.run_dir import RunFolder
from tunesmith.train.resume import _refuse_missing_checkpoint

ROLLBACKS = (
    Rollback(900, 300, "collapse", "e", "c"),
    Rollback(800, 500, "collapse", "e", "c"),
    Rollback(700, 400, "collapse", "e", "c"),
)


def test_the_last_of_several_rollbacks_decides(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with RunFolder.open(run) as folder:
        _refuse_missing_checkpoint(folder, 0)  # without a rollback
        for rollback in ROLLBACKS:
            folder.record_rollback(rollback)
        for step in (400, 401, 600):
            _refuse_missing_checkpoint(folder, step)
        for step, advice in ((399, "continue before it with --checkpoint 399"), (0, "restore it,")):
            with pytest.raises(InputError, match="from step 700 to checkpoints/step-400") as caught:
                _refuse_missing_checkpoint(folder, step)
            assert advice in caught.value.fix
            assert ("--checkpoint" in caught.value.fix) == bool(step)
