"""The rate equals transformers' schedulers, AdamW its definition, clipping the norm's."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from tiny_models import make_tiny_model
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.train.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    clip_gradients,
    compute_last_update,
    compute_learning_rate,
    get_moments,
    make_optimizer,
    step_optimizer,
)


def parameters(*values: list[float], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(v, dtype=dtype)) for v in values]


def set_gradients(parameters: list[nn.Parameter], *gradients: list[float]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)


SCHEDULER_KWARGS: dict[str, list[dict[str, Any]]] = {
    "inverse_sqrt": [{"timescale": 3}, {"timescale": 10_000}],
    "warmup_stable_decay": [
        {"num_decay_steps": steps, "decay_type": kind, "min_lr_ratio": floor}
        for steps in (1, 5, 9)
        for kind in ("linear", "cosine", "1-sqrt")
        for floor in (0.0, 0.2)
    ],
}


@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [(name, kwargs) for name in SCHEDULES for kwargs in SCHEDULER_KWARGS.get(name, [{}])],
)
def test_the_rate_is_that_of_transformers(
    schedule: str, kwargs: dict[str, Any], warmup: int
) -> None:
    total = warmup + 9
    warmup *= schedule != "constant"  # which transformers never warms up
    optimizer = torch.optim.SGD(parameters([0.0]), lr=0.3)
    theirs = get_scheduler(
        schedule, optimizer, warmup, total, scheduler_specific_kwargs=dict(kwargs)
    )
    for step in range(total):
        ours = compute_learning_rate(
            step,
            peak=0.3,
            warmup_steps=warmup,
            total_steps=total,
            schedule=schedule,
            kwargs=kwargs,
        )
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_rows_have_a_rate_of_their_own() -> None:
    """Adam's first step moves every value by the rate."""
    plain, new = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = make_optimizer([plain, new], weight_decay=0.0, rows=[new], rows_lr_factor=10.0)
    plain.grad, new.grad = torch.ones(2, 3), torch.ones(2, 3)
    step_optimizer(optimizer, 0.01)
    torch.testing.assert_close(1 - plain, torch.full((2, 3), 0.01), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 - new, torch.full((2, 3), 0.1), rtol=1e-5, atol=0)


def test_update_is_adamw() -> None:
    """Three steps by the formula: decay apart from the gradient, moments with bias correction."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64))
    optimizer, expected = make_optimizer([p], weight_decay=0.1), p.detach().clone()
    first, second = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for step, rate in enumerate((0.1, 0.05, 0.2), 1):
        gradient = torch.tensor([[0.3 * step, -0.1, 2.0]], dtype=torch.float64)
        p.grad = gradient.clone()
        step_optimizer(optimizer, rate)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected -= rate * 0.1 * expected
        expected -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "lora", "use_dora": True}])
def test_only_matrices_decay(settings: dict[str, Any]) -> None:
    """With gradients of 0 an update is the decay alone. For a full model the same ones as in
    transformers' Trainer."""
    network = make_tiny_model("llama", **settings).network
    trained = get_trainable_parameters(network)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    step_optimizer(make_optimizer(trained.values(), weight_decay=0.5), 0.1)
    decayed = {
        name for name, p in trained.items() if torch.allclose(p.detach(), before[name] * 0.95)
    }
    assert {
        name for name, p in trained.items() if torch.equal(p.detach(), before[name])
    } == trained.keys() - decayed
    assert decayed == {name for name in trained if trained[name].ndim == 2} != trained.keys()
    if settings["method"] == "full":
        theirs = get_parameter_names(network, [nn.LayerNorm], ["bias", "norm"])
        assert decayed == trained.keys() & set(theirs)


def test_moments_in_8_bits_follow_those_in_fp32_in_a_quarter_of_the_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = (
        torch.randn(128, 64, generator=generator),
        torch.randn(5, 128, 64, generator=generator),
    )
    moved, remaining = {}, {}
    for kind in OPTIMIZERS:
        p = nn.Parameter(start.clone())
        optimizer = make_optimizer([p], weight_decay=0.1, kind=kind)
        for gradient in gradients:
            p.grad = gradient.clone()
            step_optimizer(optimizer, 0.01)
        moved[kind] = p.detach() - start
        remaining[kind] = sum(tensor.nbytes for tensor in get_moments(optimizer, p).values())
    assert remaining == {"adamw": 8 * p.numel(), "adamw_8bit": 2 * p.numel() * 260 // 256}
    assert (moved["adamw_8bit"] - moved["adamw"]).norm() < 0.05 * moved["adamw"].norm()


def test_moments_in_8_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install '\.\[qlora\]'"):
        make_optimizer(parameters([0.0]), weight_decay=0, kind="adamw_8bit")


def test_autograd_hears_of_an_update() -> None:
    """What is derived from a weight and kept (MasterLinear's narrow copy) tells the age by the
    version."""
    (p,) = parameters([1.0, 2.0])
    optimizer, before = make_optimizer([p], weight_decay=0.0), p._version
    set_gradients([p], [1.0, 1.0])
    step_optimizer(optimizer, 0.1)
    assert p._version > before


def get_gradients(ps: list[nn.Parameter]) -> list[Tensor | None]:
    return [p.grad for p in ps]


def test_clipping_scales_the_common_norm() -> None:
    ps = parameters([0.0, 0.0], [0.0], [0.0])
    set_gradients(ps[:2], [3.0, 0.0], [4.0])
    assert clip_gradients(ps, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(
        ps[0].grad, torch.tensor([0.6, 0.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        ps[1].grad, torch.tensor([0.8], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert ps[2].grad is None


@pytest.mark.parametrize("max_norm", [0.0, 5.1, math.inf])
def test_what_is_small_enough_stays_bitwise(max_norm: float) -> None:
    ps = parameters([0.0, 0.0], [0.0], dtype=torch.float32)
    set_gradients(ps, [3.1, 0.0], [-3.3])
    before = [g.clone() for g in get_gradients(ps) if g is not None]
    assert clip_gradients(ps, max_norm) == pytest.approx(math.hypot(3.1, 3.3))
    assert all(
        g is not None and torch.equal(g, b) for g, b in zip(get_gradients(ps), before, strict=True)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_returned_as_such(bad: float) -> None:
    ps = parameters([0.0], [0.0])
    set_gradients(ps, [1.0], [bad])
    assert not math.isfinite(clip_gradients(ps, 1.0))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_last_update_is_what_the_last_step_added(decay: float) -> None:
    matrix, vector, row, still = (
        nn.Parameter(torch.tensor(values, dtype=torch.float64))
        for values in ([[1.0, -2.0]], [0.5, 3.0], [[4.0, 1.0]], [[7.0]])
    )
    everything = [matrix, vector, row, still]
    optimizer = make_optimizer(everything, weight_decay=decay, rows=[row], rows_lr_factor=4.0)
    assert compute_last_update(optimizer, matrix) is None
    for number, rate in enumerate((0.1, 0.05, 0.2), start=1):
        before = [p.detach().clone() for p in everything]
        set_gradients([matrix, vector, row], [[0.3 * number, -0.1]], [2.0, -number], [[0.5, 0.1]])
        step_optimizer(optimizer, rate)
        for parameter, old in zip(everything[:3], before, strict=False):
            factor = 4.0 if parameter is row else 1.0
            decayed = rate * factor * (decay if parameter.ndim > 1 else 0.0)
            change = parameter.detach() - old * (1 - decayed)
            update = compute_last_update(optimizer, parameter)
            torch.testing.assert_close(update, change, rtol=1e-9, atol=1e-12)
    assert compute_last_update(optimizer, still) is None


def test_vectors_and_matrices_have_the_same_rate() -> None:
    """Adam's first step moves every value by the rate."""
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([matrix, vector], weight_decay=0.0)
    matrix.grad, vector.grad = torch.ones(2, 3), torch.ones(3)
    step_optimizer(optimizer, 0.01)
    for parameter in (matrix, vector):
        expected = torch.full_like(parameter, 0.01)
        torch.testing.assert_close(1 - parameter.detach(), expected, rtol=1e-5, atol=0)


def test_the_device_itself_skips_an_update() -> None:
    """Weights, moments and the number of updates stay bitwise; the next update is the usual one."""
    skipping, plain = (nn.Parameter(torch.tensor([[1.0, -2.0]])) for _ in range(2))
    optimizers = [make_optimizer([p], weight_decay=0.1) for p in (skipping, plain)]
    no, yes = torch.tensor(False), torch.tensor(True)
    for gradient, should_skip in ((0.5, no), (math.nan, yes), (math.inf, yes), (2.0, no)):
        skipping.grad = torch.full((1, 2), gradient)
        step_optimizer(optimizers[0], 0.1, should_skip)
        if not should_skip:
            plain.grad = torch.full((1, 2), gradient)
            step_optimizer(optimizers[1], 0.1)
        assert torch.equal(skipping, plain)
    states = [
        optimizer.state[p] for optimizer, p in zip(optimizers, (skipping, plain), strict=True)
    ]
    assert float(states[0]["step"]) == float(states[1]["step"]) == 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(states[0][name], states[1][name])
