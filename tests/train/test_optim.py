"""The rate equals transformers' schedulers, AdamW its definition, clipping the norm's."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tunesmith.train.optim import clip, make_adamw, rate_at, update


def parameters(*values: list[float], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(v, dtype=dtype)) for v in values]


def give(parameters: list[nn.Parameter], *gradients: list[float]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)


@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_is_that_of_transformers(schedule: str, warmup: int) -> None:
    total = 10
    optimizer = torch.optim.SGD(parameters([0.0]), lr=0.3)
    theirs = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    for step in range(total):
        ours = rate_at(step, peak=0.3, warmup_steps=warmup, total_steps=total, schedule=schedule)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_update_is_adamw() -> None:
    """Three steps by the formula: decay apart from the gradient, moments with bias correction."""
    (p,) = parameters([1.0, -2.0, 0.5])
    optimizer, expected = make_adamw([p], weight_decay=0.1), p.detach().clone()
    first, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step, rate in enumerate((0.1, 0.05, 0.2), 1):
        gradient = torch.tensor([0.3 * step, -0.1, 2.0], dtype=torch.float64)
        give([p], gradient.tolist())
        update(optimizer, rate)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected -= rate * 0.1 * expected
        expected -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_autograd_hears_of_an_update() -> None:
    """What is derived from a weight and kept (MasterLinear's narrow copy) tells the age by the version."""
    (p,) = parameters([1.0, 2.0])
    optimizer, before = make_adamw([p], weight_decay=0.0), p._version
    give([p], [1.0, 1.0])
    update(optimizer, 0.1)
    assert p._version > before


def gradients_of(ps: list[nn.Parameter]) -> list[Tensor | None]:
    return [p.grad for p in ps]


def test_clipping_scales_the_common_norm() -> None:
    ps = parameters([0.0, 0.0], [0.0], [0.0])
    give(ps[:2], [3.0, 0.0], [4.0])
    assert clip(ps, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(ps[0].grad, torch.tensor([0.6, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(ps[1].grad, torch.tensor([0.8], dtype=torch.float64), atol=1e-6, rtol=0)
    assert ps[2].grad is None


@pytest.mark.parametrize("max_norm", [0.0, 5.1, math.inf])
def test_what_is_small_enough_stays_bitwise(max_norm: float) -> None:
    ps = parameters([0.0, 0.0], [0.0], dtype=torch.float32)
    give(ps, [3.1, 0.0], [-3.3])
    before = [g.clone() for g in gradients_of(ps) if g is not None]
    assert clip(ps, max_norm) == pytest.approx(math.hypot(3.1, 3.3))
    assert all(g is not None and torch.equal(g, b) for g, b in zip(gradients_of(ps), before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_returned_as_such(bad: float) -> None:
    ps = parameters([0.0], [0.0])
    give(ps, [1.0], [bad])
    assert not math.isfinite(clip(ps, 1.0))
