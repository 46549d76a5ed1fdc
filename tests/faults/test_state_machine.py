"""Any sequence of step, save, damage, crash and resume gives the weights of a training that nothing
happened to."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hypothesis_budget import iter_chunks, make_settings
from plan_configs import make_config
from tiny_models import make_tiny_document, make_tiny_model
from tunesmith.core.atomic import disk_errors
from tunesmith.core.errors import MachineError
from tunesmith.core.events import TrainStep
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import RUN_FORMAT
from tunesmith.train.loop import TrainingLoop

STEPS = 8
SETTINGS = make_config(
    pack_length=12,
    learning_rate=2e-3,
    warmup_ratio=0.25,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
    seed=5,
)


def new_training() -> TrainingLoop:
    return TrainingLoop(
        make_tiny_model(lora_dropout=0.1, lora_r=2),
        lambda step: [make_tiny_document(n, step) for n in (5, 9)],
        SETTINGS,
        steps=STEPS,
    )


def digest(training: TrainingLoop) -> str:
    """Of the weights and of both moments."""
    hasher = hashlib.sha256()
    for parameter in training.parameters.values():
        moments = training.optimizer.state.get(parameter, {})
        for tensor in (parameter, *(moments[name] for name in sorted(moments))):
            hasher.update(tensor.detach().numpy().tobytes())
    return hasher.hexdigest()


@cache
def straight() -> tuple[list[str], list[float]]:
    """Digests after 0..STEPS steps, and the losses, of a training that nothing happens to."""
    training = new_training()
    digests, losses = [digest(training)], list[float]()
    for event in training:
        if isinstance(event, TrainStep):
            digests.append(digest(training))
            losses.append(event.loss)
    return digests, losses


class CrashingRun(RuleBasedStateMachine):
    """`good`: the steps of the checkpoints that a resume may trust. `training` is None while the
    process is dead."""

    @initialize()
    def begin(self) -> None:
        self.parent = Path(tempfile.mkdtemp())
        self.path, self.good = self.parent / "run", set[int]()
        self.folder: RunFolder | None = RunFolder.create(self.path)
        self.folder.write_json("plan.json", {"format": RUN_FORMAT})
        self.training: TrainingLoop | None = new_training()

    def teardown(self) -> None:
        if self.folder is not None:
            self.folder.close()
        shutil.rmtree(self.parent)

    alive: Callable = precondition(lambda self: self.training is not None)
    dead: Callable = precondition(lambda self: self.training is None)

    @alive
    @rule()
    def step(self) -> None:
        assert self.training is not None
        event = next(self.training, None)
        if isinstance(event, TrainStep):
            assert event.loss == straight()[1][event.step - 1]

    @alive
    @rule()
    def look_away(self) -> None:
        """What others do between two steps."""
        torch.rand(3)
        torch.manual_seed(0)

    @alive
    @rule(keep_last=st.integers(1, 3))
    def save(self, keep_last: int) -> None:
        assert self.training is not None
        assert self.folder is not None
        with self.folder.checkpoint(self.training.step, metadata={}, keep_last=keep_last) as target:
            self.training.save(target)
        self.good.add(self.training.step)
        self.good &= self._kept()
        assert self.training.step in self.good

    @alive
    @rule(half=st.booleans())
    def save_on_a_full_disk(self, half: bool) -> None:
        assert self.training is not None
        assert self.folder is not None
        target = self.path / "checkpoints" / f"step-{self.training.step}"
        with (  # noqa: PT012
            pytest.raises(MachineError),
            self.folder.checkpoint(self.training.step, metadata={}) as scratch,
        ):
            if half:
                self.training.save(scratch)
            with disk_errors(target):
                raise OSError(28, "No space left on device")
        self.good &= self._kept()

    @rule(number=st.integers(0, 3), location=st.floats(0, 1), file=st.integers(0, 2))
    def flip_a_byte(self, number: int, location: float, file: int) -> None:
        actual = sorted(self._kept())
        if number < len(actual):
            step = actual[number]
            files = sorted((self.path / "checkpoints" / f"step-{step}").iterdir())
            content = bytearray(files[file].read_bytes())
            position = int(location * (len(content) - 1))
            # Not a flipped bit: the same rule applied twice would mend the file.
            content[position] = (content[position] + 1) % 256
            files[file].write_bytes(content)
            self.good.discard(step)

    @alive
    @rule(rest=st.sampled_from(["", ".tmp-step-9-1-a", ".trash-step-1-1-b"]))
    def crash(self, rest: str) -> None:
        assert self.folder is not None
        if rest:
            (self.path / "checkpoints" / rest).mkdir(parents=True)
            (self.path / "checkpoints" / rest / "half").write_bytes(b"x")
        self.folder.close()
        self.folder = self.training = None

    @dead
    @rule()
    def resume(self) -> None:
        self.folder, self.training = RunFolder.open(self.path), new_training()
        actual, skipped = self.folder.find_latest_checkpoint()
        assert (actual is not None) == bool(self.good)
        if actual is not None:
            self.training.restore(actual)
            assert self.training.step == max(self.good)
        assert len(skipped) == len(
            [step for step in self._kept() if step > max(self.good, default=-1)]
        )

    @invariant()
    def weights_are_those_of_a_straight_run(self) -> None:
        if getattr(self, "training", None) is not None:
            assert self.training is not None
            assert digest(self.training) == straight()[0][self.training.step]

    def _kept(self) -> set[int]:
        return {
            int(path.name.removeprefix("step-"))
            for path in (self.path / "checkpoints").glob("step-*")
        }


def sequences_explored(cases: int, seconds: float, *, steps: int, size: int = 10) -> Counter[str]:
    """How many sequences of up to `steps` actions were tried."""
    seen: Counter[str] = Counter()

    class Counted(CrashingRun):
        def teardown(self) -> None:
            seen["sequences"] += 1
            super().teardown()

    for number in iter_chunks(cases, seconds, size):
        run_state_machine_as_test(
            seed(number)(Counted), settings=make_settings(size, stateful_step_count=steps)
        )
    return seen


@pytest.mark.promise
def test_fault_22_any_sequence_of_step_save_crash_and_resume_is_the_straight_run() -> None:
    assert sequences_explored(8, 60, steps=20, size=8)["sequences"] >= 8
