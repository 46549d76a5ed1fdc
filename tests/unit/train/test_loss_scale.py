"""Training in fp16: the scale of the loss, steps that overflow, and a resumed run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from damages import FORGED_VALUES, REMOVED
from plan_configs import make_config
from tiny_models import compute_max_difference, make_tiny_documents, make_tiny_model
from tiny_runs import select_steps
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.types import Document
from tunesmith.train import optimizer
from tunesmith.train.checkpoint import TRAINER_STATE_FILE
from tunesmith.train.loop import POSITION_FIELDS, TrainingLoop
from tunesmith.train.optimizer import LossScale

OVERFLOWING = 2.0**24
# of the forged values, those that a position may have
VALID_VALUES = {"seconds": -1, "ratios": [], "rollbacks": [], "loss_scale": {}}


def load_documents(step: int) -> Sequence[Document]:
    return make_tiny_documents((13, 9, 5, step))


def make_loop(
    dtype: torch.dtype = torch.float16, scale: float | None = None, steps: int = 6, **settings: int
) -> TrainingLoop:
    """Return a loop whose steps have two packs."""
    config = make_config(pack_length=20, learning_rate=2e-3, **settings)
    loop = TrainingLoop(make_tiny_model(dtype=dtype), load_documents, config, steps=steps)
    if scale is not None:
        loop.loss_scale = LossScale(scale)
    return loop


def get_weights(loop: TrainingLoop) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loop.parameters.items()}


def list_checks(events: Sequence[Event]) -> list[CheckResult]:
    return [event for event in events if isinstance(event, CheckResult)]


def test_a_scale_grows_after_finite_steps_and_halves_when_gradients_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "GROWTH_STEPS", 3)
    scale = LossScale(8.0)
    for expected in (8.0, 8.0, 16.0, 16.0):
        scale.count_update()
        assert scale.value == expected
    assert scale.halve()
    assert (scale.value, scale.finite_steps, scale.overflows) == (8.0, 0, 1)
    scale = LossScale(optimizer.MAX_SCALE, finite_steps=2)
    scale.count_update()
    assert scale.value == optimizer.MAX_SCALE
    scale = LossScale(1.0)
    assert not scale.halve()
    assert (scale.value, scale.overflows) == (1.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes_have_no_scale(dtype: torch.dtype) -> None:
    assert LossScale.from_dtype(dtype) is None
    assert LossScale.from_dtype(torch.float16) == LossScale(65536.0)


class _GradientFactor(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def multiply_gradients(loop: TrainingLoop, factor: float) -> TrainingLoop:
    compute_hidden = loop.model.compute_hidden
    loop.model.compute_hidden = lambda batch: _GradientFactor.apply(  # type: ignore[method-assign]
        compute_hidden(batch), factor
    )
    return loop


def test_fp16_trains_as_fp32_does() -> None:
    half, single = make_loop(), make_loop(torch.float32)
    start = get_weights(half)
    steps, expected = (select_steps(list(loop)) for loop in (half, single))
    assert len(steps) == 6
    for step, other in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=2e-3)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
    assert compute_max_difference(get_weights(half), start) > 1e-3


def test_gradients_that_fp16_would_round_away_are_kept() -> None:
    """As if the loss changed 65,536 times less with the hidden states."""
    loops = [make_loop(torch.float32, steps=1), *(make_loop(scale=s, steps=1) for s in (1, 65536))]
    (expected, plain, scaled) = (
        select_steps(list(multiply_gradients(loop, 2.0**-16)))[0].grad_norm for loop in loops
    )
    assert scaled == pytest.approx(expected, rel=2e-2)
    assert plain != pytest.approx(expected, rel=0.2)


def test_a_step_that_overflows_is_repeated_and_loses_no_row() -> None:
    quiet, loud = make_loop(scale=2.0**8), make_loop(scale=OVERFLOWING)
    expected, events = list(quiet), list(loud)
    repeated = list_checks(events)
    assert list_checks(expected) == []
    assert 1 <= len(repeated) < 20
    assert {(check.kind, check.level, check.step) for check in repeated} == {
        ("loss scale", "ok", 1)
    }
    assert loud.loss_scale is not None
    assert repeated[-1].evidence.endswith(f"{len(repeated)} repeated so far")
    assert f"{loud.loss_scale.value:g}" in repeated[-1].evidence
    assert loud.loss_scale.overflows == len(repeated)
    assert loud.loss_scale.value == OVERFLOWING / 2 ** len(repeated)
    for step, other in zip(select_steps(events), select_steps(expected), strict=True):
        assert (step.step, step.tokens) == (other.step, other.tokens)
        assert step.loss == pytest.approx(other.loss, rel=1e-3)
    assert loud.bad_steps == 0
    assert compute_max_difference(get_weights(loud), get_weights(quiet)) < 1e-3


def test_a_loss_that_is_not_finite_is_not_the_scales_fault() -> None:
    loop = make_loop()
    compute_hidden = loop.model.compute_hidden
    loop.model.compute_hidden = lambda batch: compute_hidden(batch) * math.nan  # type: ignore[method-assign]
    (check,) = list_checks([next(loop)])
    assert check.kind == "non-finite"
    assert loop.loss_scale == LossScale(65536.0)


def test_gradients_that_overflow_without_a_scale_are_refused() -> None:
    loop = multiply_gradients(make_loop(scale=2.0), math.inf)
    checks = list_checks([next(loop), next(loop)])
    assert [check.kind for check in checks] == ["loss scale", "non-finite"]
    with pytest.raises(GateError, match="3 consecutive non-finite steps"):
        list(loop)


def test_a_resumed_run_has_the_same_scale_and_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale overflows in step 1, and doubles in steps 3 and 6."""
    monkeypatch.setattr(optimizer, "GROWTH_STEPS", 3)
    straight = make_loop(scale=OVERFLOWING)
    list(straight)
    first = make_loop(scale=OVERFLOWING)
    while first.step < 2:
        next(first)
    first.save(tmp_path)
    second = make_loop()
    second.restore(tmp_path)
    assert second.loss_scale == first.loss_scale
    steps = [event for event in second if isinstance(event, TrainStep)]
    assert [step.step for step in steps] == [3, 4, 5, 6]
    assert second.loss_scale == straight.loss_scale
    expected = get_weights(straight)
    for name, weight in get_weights(second).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("key", [*POSITION_FIELDS, "loss_scale"])
def test_a_position_of_another_type_is_refused(key: str, tmp_path: Path) -> None:
    first = make_loop()
    next(first)
    first.save(tmp_path)
    file = tmp_path / TRAINER_STATE_FILE
    position = json.loads(file.read_text())
    for value in FORGED_VALUES.values():
        if key in VALID_VALUES and value == VALID_VALUES[key]:
            continue
        forged = position | {key: value}
        file.write_text(json.dumps({k: v for k, v in forged.items() if v is not REMOVED}))
        with pytest.raises(InputError) as caught:
            make_loop().restore(tmp_path)
        assert TRAINER_STATE_FILE in caught.value.where
