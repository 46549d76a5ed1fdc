"""The deterministic mode: sums that have one value in any order, and models that run in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tunesmith.model.kernels
from tiny_models import (
    compute_max_difference,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.core.types import GenerationRequest
from tunesmith.model.generation.engine import generate
from tunesmith.model.kernels import ops
from tunesmith.session.session import set_deterministic

KERNELS = Path(tunesmith.model.kernels.__path__[0])


@contextmanager
def deterministic() -> Iterator[None]:
    set_deterministic(True)
    try:
        yield
    finally:
        set_deterministic(False)


def sum_up(x: Tensor) -> Tensor:
    with deterministic():
        return ops.cumsum(x)


@pytest.mark.parametrize("size", [1e-9, 1.0, 2.0**24])  # gradients, and such with a loss scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_integers(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(3, 500, generator=generator, dtype=dtype)
    expected = np.cumsum(x.numpy().astype(np.longdouble), axis=-1).astype(np.float64)
    assert sum_up(x).dtype == dtype
    np.testing.assert_allclose(sum_up(x).numpy(), expected, atol=1e-12 * size, rtol=1e-7)
    # the last sum of any order of the values, to the bit
    order = torch.randperm(500, generator=generator)
    assert torch.equal(sum_up(x)[:, -1], sum_up(x[:, order])[:, -1])


def test_sums_of_the_largest_and_smallest_values() -> None:
    x = torch.tensor([[3e38] * 3, [1e-45] * 3, [0.0] * 3], dtype=torch.float32)
    expected = torch.stack([x[:, 0], 2 * x[:, 0], 3 * x[:, 0]], dim=1)
    assert torch.equal(sum_up(x), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_not_lost(value: float) -> None:
    sums = sum_up(torch.tensor([[1.0, value, 1.0], [1.0, 1.0, 1.0]]))
    assert sums[0].isnan().all()
    assert sums[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "granitemoehybrid"])
def test_gradients_are_those_of_the_other_mode(family: str) -> None:
    documents = make_tiny_documents((9, 70, 5))
    _, expected = compute_step_gradients(make_tiny_model(family, torch.float64), documents, 90)
    with deterministic():
        _, actual = compute_step_gradients(make_tiny_model(family, torch.float64), documents, 90)
    assert compute_max_difference(actual, expected) < 1e-8


def answer() -> list[object]:
    requests = [GenerationRequest((5, 6, n), 12, temperature=1.0, top_p=0.9) for n in range(4)]
    return sorted(generate(make_tiny_model(), requests, decode=str, end_ids=()))


def test_sampled_answers_are_those_of_the_other_mode() -> None:
    expected = answer()
    with deterministic():
        assert answer() == expected


def test_triton_kernels_add_in_one_order() -> None:
    source = (KERNELS / "triton_kernels.py").read_text()
    assert "tl.sum" in source
    assert "atomic" not in source
