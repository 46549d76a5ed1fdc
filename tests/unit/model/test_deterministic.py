"""The deterministic mode: sums that have one value in any order, and models that run in it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.fixture
def deterministic() -> Iterator[None]:
    set_deterministic(True)
    yield
    set_deterministic(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_integers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 500, generator=generator, dtype=dtype)
    expected = np.cumsum(x.numpy().astype(np.longdouble), axis=-1).astype(np.float64)
    assert ops.cumsum(x).dtype == dtype
    np.testing.assert_allclose(ops.cumsum(x).numpy(), expected, atol=1e-9, rtol=1e-7)
    # the last sum of any order of the values, to the bit
    order = torch.randperm(500, generator=generator)
    assert torch.equal(ops.cumsum(x)[:, -1], ops.cumsum(x[:, order])[:, -1])


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "granitemoehybrid"])
def test_gradients_are_those_of_the_other_mode(family: str) -> None:
    documents = make_tiny_documents((9, 70, 5))
    _, expected = compute_step_gradients(make_tiny_model(family, torch.float64), documents, 90)
    set_deterministic(True)
    try:
        _, actual = compute_step_gradients(make_tiny_model(family, torch.float64), documents, 90)
    finally:
        set_deterministic(False)
    assert compute_max_difference(actual, expected) < 1e-8


def answer() -> list[object]:
    requests = [GenerationRequest((5, 6, n), 12, temperature=1.0, top_p=0.9) for n in range(4)]
    return sorted(generate(make_tiny_model(), requests, decode=str, end_ids=()))


def test_sampled_answers_are_those_of_the_other_mode() -> None:
    expected = answer()
    set_deterministic(True)
    try:
        assert answer() == expected
    finally:
        set_deterministic(False)


def test_triton_kernels_add_in_one_order() -> None:
    source = (KERNELS / "triton_kernels.py").read_text()
    assert "tl.sum" in source
    assert "atomic" not in source
