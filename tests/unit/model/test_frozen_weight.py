import os

import pytest
import torch

from tiny_models import (
    compute_max_difference,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.frozen_weight import (
    CAPACITY_ENV,
    MAX_PRIMITIVES,
    BlockedWeight,
    DenseWeight,
    has_onednn_bf16,
    limit_onednn_cache,
)

needs_blocks = pytest.mark.skipif(not has_onednn_bf16(), reason="no bf16 products in oneDNN here")


def pair(outputs=96, inputs=64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    return DenseWeight(weight), BlockedWeight(weight), generator


@needs_blocks
@pytest.mark.parametrize("rows", [1, 3, 64, 513])
def test_blocked_products_are_those_of_the_plain_weight(rows):
    plain, blocked, generator = pair()
    x, dy = (torch.randn(rows, n, generator=generator).bfloat16() for n in (64, 96))
    bias, into = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((96,), (rows, 64))
    )
    for optional_bias in (None, bias):
        torch.testing.assert_close(
            blocked.compute_outputs(x, optional_bias),
            plain.compute_outputs(x, optional_bias),
            rtol=1e-2,
            atol=1e-2,
        )
    torch.testing.assert_close(
        blocked.compute_input_grad(dy, None),
        plain.compute_input_grad(dy, None),
        rtol=1e-2,
        atol=1e-2,
    )
    summed = plain.compute_input_grad(dy, into.clone())
    torch.testing.assert_close(
        blocked.compute_input_grad(dy, into.clone()), summed, rtol=1e-2, atol=5e-2
    )


@needs_blocks
def test_the_weight_comes_back_to_the_bit():
    plain, blocked, _ = pair(outputs=50, inputs=34)
    assert torch.equal(blocked.weight, plain.weight)
    blocked.compute_input_grad(torch.ones(2, 50).bfloat16(), None)
    assert torch.equal(blocked.weight, plain.weight)


@needs_blocks
def test_a_blocked_model_trains_like_a_dense_model():
    plain, blocked = (
        make_tiny_model(dtype=torch.bfloat16, blocked=layout) for layout in (False, True)
    )
    layers = [list(find_lora_layers(model.network).values()) for model in (plain, blocked)]
    assert all(isinstance(layer.frozen, DenseWeight) for layer in layers[0])
    assert all(isinstance(layer.frozen, BlockedWeight) for layer in layers[1])
    (loss, gradients), (other_loss, others) = (
        compute_step_gradients(m, make_tiny_documents(), 50) for m in (plain, blocked)
    )
    assert other_loss == pytest.approx(loss, rel=1e-2)
    assert compute_max_difference(others, gradients) < 5e-2


def test_fp32_and_other_machines_stay_plain():
    model = make_tiny_model(dtype=torch.float32, blocked=True)
    assert all(
        isinstance(layer.frozen, DenseWeight) for layer in find_lora_layers(model.network).values()
    )


def test_the_onednn_cache_is_limited_unless_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(CAPACITY_ENV, raising=False)
    limit_onednn_cache()
    assert os.environ[CAPACITY_ENV] == MAX_PRIMITIVES
    monkeypatch.setenv(CAPACITY_ENV, "500")
    limit_onednn_cache()
    assert os.environ[CAPACITY_ENV] == "500"
