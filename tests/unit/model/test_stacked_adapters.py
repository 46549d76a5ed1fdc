"""Adapters in one buffer, stacked: equal to the path of single linears; and the whole path of a GPU
equals that of a CPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_path
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model.kernels.lora import Adapter
from tunesmith.model.lora import LinearGroup, LoraLinear
from tunesmith.model.stacked_adapters import (
    AdapterBuffer,
    StackedAdapters,
    bundle_adapters,
    multiply_wide,
    stack_rows,
)
from tunesmith.train.optimizer import make_optimizer, step_optimizer

FOLDER = Path(__file__).parent
FP64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def make_layers(
    ranks: tuple[int, ...] = (3, 2, 4),
    scales: tuple[float, ...] = (0.5, 0.5, 0.5),
    dtype: torch.dtype = FP64,
) -> list[LoraLinear]:
    """Return adapted linears of 6 inputs, B away from zero."""
    layers: list[LoraLinear] = []
    for index, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        base = nn.Linear(6, 5 + index, bias=False, dtype=dtype).requires_grad_(False)
        generator = torch.Generator().manual_seed(index)
        layer = LoraLinear(base, rank=rank, scale=scale, dropout=0.0, generator=generator)
        with torch.no_grad():
            layer.lora_B.add_(random(*layer.lora_B.shape, seed=index))
        layers.append(layer)
    return layers


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, 0.25), (0.5, 0.0, 0.5)], ids=str)
@pytest.mark.parametrize("is_buffered", [True, False])
def test_stacked_products_equal_those_of_single_linears(
    scales: tuple[float, ...], is_buffered: bool
) -> None:
    """Also where a scale of 0 leaves a linear without an adapter."""
    layers = make_layers(scales=scales)
    if is_buffered:
        bundle_adapters(layers, FP64)
    x, dys = random(7, 6, seed=9), [random(7, 5 + index, seed=10 + index) for index in range(3)]
    single = LinearGroup(layers, FP64)
    outputs, inner = single.forward(x)
    assert single.packed is None
    dys_out, dz, outer = single.outputs_backward(dys, inner)
    expected_dx = single.compute_input_grad(dys_out, dz)
    expected = single.compute_parameter_grads(x, dys_out, dz, outer)

    group = LinearGroup(layers, FP64)
    adapters: list[Adapter | None] = [linear.adapter for linear in group.linears]
    stacked = StackedAdapters(adapters, FP64)
    ours = [linear.frozen.compute_outputs(x, None) for linear in group.linears]
    z = stacked.compute_inner(x)
    stacked.add_outputs(ours, z)
    dz_N, dbs = stacked.outputs_backward(dys, z)
    dx = sum((dy @ layer.frozen.weight for dy, layer in zip(dys, layers, strict=True)), x * 0)
    stacked.add_inputs(dx, dz_N)
    das = stacked.inputs_backward(x, dz_N)
    for actual, other in zip((*ours, dx), (*outputs, expected_dx), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)
    for index in range(3):
        for actual, other in ((das[index], expected[5 * index + 2]), (dbs[index], outer[index][0])):
            assert (actual is None) == (other is None) == (scales[index] == 0)
            if actual is not None and other is not None:
                torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


def test_neighbors_are_one_matrix_without_a_copy() -> None:
    layers = make_layers((2, 2, 2), dtype=torch.float32)
    bundle_adapters(layers, torch.bfloat16)
    factors = [layer.cast_factors(torch.bfloat16) for layer in layers]
    stacked = stack_rows([a for a, _ in factors])
    assert stacked.data_ptr() == factors[0][0].data_ptr()
    assert torch.equal(stacked, torch.cat([layer.lora_A for layer in layers]).bfloat16())
    # not those of q and v, between which k lies
    apart = stack_rows([factors[0][0], factors[2][0]])
    assert apart.data_ptr() != factors[0][0].data_ptr()
    assert torch.equal(apart, torch.cat([layers[0].lora_A, layers[2].lora_A]).bfloat16())


def test_products_on_an_amd_gpu_are_widened_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for ROCm refuses a product of bf16 with sums in fp32."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch, "mm", lambda *_, **_settings: pytest.fail("not on ROCm"))
    with FakeTensorMode():
        a = torch.empty(3, 4, dtype=torch.bfloat16, device="cuda")
        product = multiply_wide(a, a.t(), torch.float32)
    assert (product.dtype, product.device.type) == (torch.float32, "cuda")


def count_updates(buffer: AdapterBuffer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    update = buffer.update

    def count() -> None:
        calls.append(1)
        update()

    monkeypatch.setattr(buffer, "update", count)
    return calls


def test_an_update_casts_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(dtype=torch.float32)
    before = [layer.lora_A.detach().clone() for layer in layers]
    bundle_adapters(layers, torch.bfloat16)
    assert all(torch.equal(layer.lora_A, a) for layer, a in zip(layers, before, strict=True))
    buffer = layers[0].buffer
    assert buffer is not None
    calls = count_updates(buffer, monkeypatch)
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    optimizer = make_optimizer(parameters, weight_decay=0.0)
    for step in range(1, 3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step_optimizer(optimizer, 0.1)
        for _ in range(2):
            for layer in layers:
                a, b = layer.cast_factors(torch.bfloat16)
                assert torch.equal(a, layer.lora_A.bfloat16())
                assert torch.equal(b, layer.lora_B.bfloat16())
        assert len(calls) == step
    assert not torch.equal(layers[0].lora_A, before[0])


def test_parameters_of_a_buffer_are_saved_and_restored(tmp_path: Path) -> None:
    """They share memory, and a checkpoint has each of them whole."""
    layers = make_layers(dtype=torch.float32)
    bundle_adapters(layers, torch.bfloat16)
    tensors = {f"{i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "state")
    saved = load_file(tmp_path / "state")
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.mul_(3)
        for name, parameter in tensors.items():
            parameter.copy_(saved[name])
    for layer in layers:
        assert torch.equal(layer.cast_factors(torch.bfloat16)[0], layer.lora_A.bfloat16())


# ---------------------------------------------------------------- the whole path


QUICK_CASES = ("gemma2", "dora", "bad step")
OTHER_CASES = tuple(name for name in gpu_path.CASES if name not in QUICK_CASES)


def run_path(file: Path, names: Sequence[str], **environment: str) -> dict[str, Tensor]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "gpu_path.py"), str(file), *names],
        env=os.environ
        | {"PYTHONPATH": str(FOLDER.parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(file)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK_CASES, id="quick"),
        pytest.param(OTHER_CASES, id="others"),
    ],
)
def test_the_path_of_a_gpu_equals_that_of_a_cpu(names: Sequence[str], tmp_path: Path) -> None:
    """Triton's kernels in its interpreter, stacked adapters in one buffer, residuals added in the
    norms, long chunks of the head: a step of training, in fp32."""
    ours: dict[str, Any] = run_path(tmp_path / "gpu", names, TRITON_INTERPRET="1")
    expected = run_path(tmp_path / "cpu", names)
    assert ours.keys() == expected.keys()
    largest = 0.0
    for name, other in expected.items():
        error = float((ours[name].double() - other.double()).norm() / (other.norm() + 1e-12))
        largest = max(largest, error)
        assert error < 2e-5, name
    assert largest > 0, "both took the same path"
