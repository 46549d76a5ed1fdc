"""Each Triton kernel equals its reference in Triton's interpreter, on CPU tensors, and compiles for
each GPU without spilling registers.

Triton reads TRITON_INTERPRET when it is imported: `test_in_the_interpreter` runs this file and
test_ops.py in a process of their own, `test_for_gpus` compiles in another. The interpreter computes
in fp32 as the reference does, and truncates to bf16."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.model.kernels import ops

FOLDER = Path(__file__).parent
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="test_in_the_interpreter runs it")
FP32_ROUNDING = 1e-6
QUICK_CAPABILITIES = (90,)
OTHER_CAPABILITIES = (80, 89, 100, 120)
OLD_CAPABILITIES = (70, 75)  # V100 and T4, which train in fp16
MAX_SHARED_BYTES = 99 * 1024  # of the smallest of these GPUs


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    files = ("test_ops.py", "test_triton_ops.py")
    # numpy, which computes for it, warns about infinities; the fp32 tests cover test_divergence
    choice = ("-W", "ignore::RuntimeWarning", "-k", "not compil and not test_divergence[")
    choice += ("-m", "not gpu")
    done = subprocess.run(
        [*command, *files, *choice, "-o", "addopts="],
        cwd=FOLDER,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 60, done.stdout


# ---------------------------------------------------------------- in the interpreter


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


def differentiate(
    function: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return the outputs and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def assert_equal(ours: Sequence[Tensor], exact: Sequence[Tensor], terms: int = 1) -> None:
    """Check equality to fp32, relative to the largest value; `terms` are added for each."""
    for actual, other in zip(ours, exact, strict=True):
        assert actual.dtype == torch.float32
        largest = float(other.abs().max()) if other.numel() else 0.0
        error = float((actual.double() - other).abs().max()) if other.numel() else 0.0
        assert error <= FP32_ROUNDING * max(1.0, largest) * terms**0.5, (error, largest)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, residual, weight, 1e-5)


def fork_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, None, weight, 1e-5)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 576), (2, 4100), (700, 24)], ids=str)
def test_norms_in_fp32(shape: tuple[int, ...]) -> None:
    x, residual, dy, dsum = (random(*shape, seed=seed) for seed in range(4))
    weight = random(shape[-1], seed=4)
    rows = x.numel() // shape[-1]
    for function, inputs in ((add_norm, (x, residual, weight)), (fork_norm, (x, weight))):
        ours = differentiate(function, inputs, (dy, dsum))
        wide = [tensor.double() for tensor in inputs]
        exact = differentiate(function, wide, (dy.double(), dsum.double()))
        assert_equal(ours[:-1], exact[:-1])
        assert_equal(ours[-1:], exact[-1:], terms=rows)


@interpreted
def test_the_sum_of_a_norm_may_be_all_that_is_used() -> None:
    x, residual = random(3, 8), random(3, 8, seed=1)
    ours = differentiate(lambda x, r: add_norm(x, r, torch.ones(8))[1], (x, residual), (x,))
    assert torch.equal(ours[0], x + residual)
    assert torch.equal(ours[1], x)
    assert torch.equal(ours[2], x)


@interpreted
def test_the_sum_is_rounded_before_its_norm() -> None:
    """As torch's own, in another kernel: the norm is that of what the layer passes on."""
    x, residual = random(4, 64).bfloat16(), random(4, 64, seed=1, spread=100).bfloat16()
    y, total = add_norm(x, residual, torch.ones(64))
    alone = ops.rms_norm(total, torch.ones(64), 1e-5)
    assert torch.equal(y, alone)
    torch.testing.assert_close(total, x + residual, rtol=2.0**-7, atol=0)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 18), (300, 2, 8), (3, 33, 192)], ids=str)
def test_rotation_in_fp32(shape: tuple[int, int, int]) -> None:
    angles = random(shape[0], shape[2] // 2, seed=5, spread=3)
    x, dy = random(*shape), random(*shape, seed=1)
    turn = lambda x: ops.apply_rotary(x, angles.to(x.dtype).cos(), angles.to(x.dtype).sin())  # noqa: E731
    assert_equal(
        differentiate(turn, (x,), (dy,)), differentiate(turn, (x.double(),), (dy.double(),))
    )


@interpreted
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("count", [1, 2047, 2049, 9000])
def test_gated_in_fp32(count: int, is_gelu: bool) -> None:
    gate, up, dy = random(count, spread=3), random(count, seed=1), random(count, seed=2)
    gate[:4] = torch.tensor([0.0, -60.0, 60.0, 1e-5])[:count]
    ours = ops.gated_activation_backward(gate, up, dy, is_gelu)
    exact = ops.gated_activation_backward(gate.double(), up.double(), dy.double(), is_gelu)
    # a gelu's derivative cancels
    assert_equal(ours, exact, terms=4)
    assert torch.equal(ops.gated_activation(gate, up, is_gelu), ours[2])


@interpreted
@pytest.mark.parametrize(
    ("scale", "cap", "smoothing"), [(1.0, 0.0, 0.0), (0.4, 0.0, 0.1), (0.4, 30.0, 0.0)]
)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (12, 97), (2, 9001)])
def test_cross_entropy_in_fp32(
    rows: int, vocabulary: int, scale: float, cap: float, smoothing: float
) -> None:
    logits = random(rows, vocabulary, spread=5)
    targets = (torch.arange(rows) * 4097) % vocabulary
    weights = torch.linspace(0, 1.5, rows)
    wide = (logits.double(), targets, weights.double())
    exact = ops.cross_entropy(*wide, scale, cap, smoothing)
    ours = ops.cross_entropy(logits, targets, weights, scale, cap, smoothing)
    assert_equal(ours, exact)


@interpreted
@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_has_no_loss(target: int) -> None:
    """The step is then refused as not finite; nothing is read or written there."""
    logits, targets = random(3, 5), torch.tensor([0, target, 1])
    losses = ops.kl_divergence(logits, logits, targets, 1.0, 0.0)[0]
    assert losses.isnan().tolist() == [False, True, False]
    losses, _ = ops.cross_entropy(logits, targets, torch.ones(3), 1.0, 0.0)
    assert losses.isnan().tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.4, 9.0)])
def test_divergence_in_fp32(scale: float, cap: float) -> None:
    base, targets = random(6, 5001, spread=3), torch.arange(6) * 1000
    tuned = base + random(6, 5001, seed=1, spread=0.3)
    exact = ops.kl_divergence(base.double(), tuned.double(), targets, scale, cap)
    ours = ops.kl_divergence(base, tuned, targets, scale, cap)
    assert_equal(ours, exact)
    assert ours[2].tolist() == exact[2].tolist()


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (50, 300), (400, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    y, dy = random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
    gain = random(shape[1], seed=2)
    exact = ops.scale_columns_backward(dy.double(), y.double(), gain.double())
    dx, sums = ops.scale_columns_backward(dy, y, gain)
    assert_equal((sums,), exact[1:], terms=shape[0])
    scaled = ops.scale_columns(y.clone(), gain)
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(dx.double(), exact[0], rtol=rounding, atol=0)
    torch.testing.assert_close(scaled.double(), y.double() * gain.double(), rtol=rounding, atol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_rows(dtype: torch.dtype) -> None:
    """Rows of the middle of a tensor, 3 heads of 40 values."""
    x, other = random(11, 3, 40).to(dtype), random(7, 3, 40, seed=1).to(dtype)
    shares = random(7, 3, seed=2).sigmoid()
    exact = x.double()
    ops.mix_rows(exact[2:9], other.double(), shares.double())
    ops.mix_rows(x[2:9], other, shares)
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(x.double(), exact, rtol=rounding, atol=1e-7)


@interpreted
def test_nothing_is_launched_for_no_rows() -> None:
    nothing, weight = torch.empty(0, 8), torch.ones(8)
    ours = differentiate(add_norm, (nothing, nothing, weight), (nothing, nothing))
    assert ours[-1].tolist() == [0.0] * 8
    assert ops.apply_rotary(torch.empty(0, 2, 8), torch.empty(0, 4), torch.empty(0, 4)).numel() == 0
    assert ops.gated_activation(nothing, nothing, False).numel() == 0
    assert len(ops.cross_entropy(nothing, torch.empty(0).long(), nothing[:, 0], 1.0, 0.0)[0]) == 0
    assert ops.scale_columns_backward(nothing, nothing, weight)[1].tolist() == [0.0] * 8


# ---------------------------------------------------------------- for GPUs


@pytest.mark.promise
@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("shapes", "capabilities"),
    [
        pytest.param("8B", QUICK_CAPABILITIES, id="H100"),
        pytest.param("8B", OTHER_CAPABILITIES, id="others", marks=pytest.mark.slow),
        pytest.param("odd", QUICK_CAPABILITIES, id="odd sizes", marks=pytest.mark.slow),
        pytest.param("odd", OLD_CAPABILITIES, id="V100 and T4", marks=pytest.mark.slow),
    ],
)
def test_for_gpus_no_kernel_spills(
    shapes: str, capabilities: tuple[int, ...], tmp_path: Path
) -> None:
    """What models launch, compiled for each GPU by the ptxas that comes with triton."""
    script = [str(FOLDER / "compile_triton.py"), str(tmp_path), shapes]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *script, *map(str, capabilities)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads((tmp_path / "compiled.json").read_text())
    if "problem" in compiled:
        pytest.skip(compiled["problem"])
    assert {entry["capability"] for entry in compiled["kernels"]} == set(capabilities)
    names = {entry["kernel"] for entry in compiled["kernels"]}
    assert len(names) == 11
    assert len(compiled["kernels"]) >= len(names) * len(capabilities)
    for entry in compiled["kernels"]:
        assert entry["STACK"] == entry["LOCAL"] == 0, entry
        assert entry["shared"] <= MAX_SHARED_BYTES, entry
        # two programs fit on a multiprocessor
        assert entry["REG"] * entry["threads"] <= 2**16 / 2, entry
