import pytest
import torch

from tiny import step_gradients, tiny_documents, tiny_model, worst_difference
from tunesmith.model.adapters import lora_layers
from tunesmith.model.frozen_weight import Blocked, Plain, blocks_here

needs_blocks = pytest.mark.skipif(not blocks_here(), reason="no bf16 products in oneDNN here")


def pair(outputs=96, inputs=64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    return Plain(weight), Blocked(weight), generator


@needs_blocks
@pytest.mark.parametrize("rows", [1, 3, 64, 513])
def test_blocked_products_are_those_of_the_plain_weight(rows):
    plain, blocked, generator = pair()
    x, dy = (torch.randn(rows, n, generator=generator).bfloat16() for n in (64, 96))
    bias, into = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((96,), (rows, 64)))
    for given in (None, bias):
        torch.testing.assert_close(blocked.outputs(x, given), plain.outputs(x, given), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(blocked.input_gradient(dy, None), plain.input_gradient(dy, None), rtol=1e-2, atol=1e-2)
    summed = plain.input_gradient(dy, into.clone())
    torch.testing.assert_close(blocked.input_gradient(dy, into.clone()), summed, rtol=1e-2, atol=5e-2)


@needs_blocks
def test_the_weight_comes_back_to_the_bit():
    plain, blocked, _ = pair(outputs=50, inputs=34)
    assert torch.equal(blocked.weight, plain.weight)
    blocked.input_gradient(torch.ones(2, 50).bfloat16(), None)
    assert torch.equal(blocked.weight, plain.weight)


@needs_blocks
def test_a_blocked_model_trains_as_a_plain_one():
    plain, blocked = (tiny_model(dtype=torch.bfloat16, blocked=layout) for layout in (False, True))
    layers = [list(lora_layers(model.network).values()) for model in (plain, blocked)]
    assert all(isinstance(layer.frozen, Plain) for layer in layers[0])
    assert all(isinstance(layer.frozen, Blocked) for layer in layers[1])
    (loss, gradients), (other_loss, others) = (step_gradients(m, tiny_documents(), 50) for m in (plain, blocked))
    assert other_loss == pytest.approx(loss, rel=1e-2)
    assert worst_difference(others, gradients) < 5e-2


def test_fp32_and_other_machines_stay_plain():
    model = tiny_model(dtype=torch.float32, blocked=True)
    assert all(isinstance(layer.frozen, Plain) for layer in lora_layers(model.network).values())
