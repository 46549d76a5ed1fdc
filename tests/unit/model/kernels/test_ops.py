"""Each kernel equals its torch reference, propagates NaN, and is optional.

The C kernels are tested here, and with `-m gpu` those in Triton on a GPU; test_triton_ops.py runs
the same tests in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.model.kernels import build, ops

# Triton's interpreter, which truncates to bf16
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    build.load_library() is None and not IS_INTERPRETED, reason="needs a C compiler"
)
# of a result in bf16, with something to spare for the fp32 behind it
BF16_ROUNDING = 2.0**-7 if IS_INTERPRETED else 2.0**-8
NAN, INF = float("nan"), float("inf")


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Return random bf16 values."""
    return (draw(*shape, seed=seed) * spread).bfloat16()


def draw(*shape: int, seed: int) -> Tensor:
    """Return the same random numbers on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device())


@pytest.fixture(autouse=True)
def _default_device(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def differentiated(
    function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_rounded(ours: Tensor, exact: Tensor, cancels: float = 0.0) -> None:
    """Check equality up to one rounding; `cancels` is the size of intermediate values that
    cancel."""
    torch.testing.assert_close(
        ours.double(), exact, rtol=BF16_ROUNDING, atol=1e-6 + cancels * 2.0**-20
    )


# ---------------------------------------------------------------- values


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 48), (2, 3, 576), (4, 1025)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, dy, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2).float()
    ours = differentiated(lambda x, w: ops.rms_norm(x, w, 1e-5), [x, weight], dy)
    exact = differentiated(
        lambda x, w: ops.rms_norm(x, w, 1e-5), [x.double(), weight.double()], dy.double()
    )
    assert [y.dtype for y in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for actual, other in zip(ours, exact, strict=True):
        assert_rounded(actual, other, cancels=10 * float(exact[1].abs().max()))


@needs_kernels
def test_rms_norm_of_a_transposed_input() -> None:
    x, weight = random(6, 4), torch.ones(6)
    ours = differentiated(lambda x: ops.rms_norm(x.t(), weight, 1e-5), [x], random(4, 6, seed=1))
    exact = differentiated(
        lambda x: ops.rms_norm(x.t(), weight, 1e-5), [x.double()], random(4, 6, seed=1).double()
    )
    for actual, other in zip(ours, exact, strict=True):
        assert_rounded(actual, other, cancels=10)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 8), (7, 2, 64), (3, 2, 18)], ids=str)
def test_rotate(shape: tuple[int, int, int]) -> None:
    angles = draw(shape[0], shape[2] // 2, seed=5) * 3
    x, dy = random(*shape), random(*shape, seed=1)
    ours = differentiated(lambda x: ops.apply_rotary(x, angles.cos(), angles.sin()), [x], dy)
    wide = angles.cos().double(), angles.sin().double()
    exact = differentiated(lambda x: ops.apply_rotary(x, *wide), [x.double()], dy.double())
    for actual, other in zip(ours, exact, strict=True):
        assert_rounded(actual, other, cancels=10)
    turned, length = ours[0].double(), x.double().norm(dim=-1)
    torch.testing.assert_close(turned.norm(dim=-1), length, rtol=1e-2, atol=0)


@needs_kernels
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("count", [1, 31, 1023, 1024, 1025, 5000])
def test_gated(count: int, gelu: bool) -> None:
    gate, up, dy = random(count, spread=4), random(count, seed=1), random(count, seed=2)
    gate[: min(count, 4)] = torch.tensor([0.0, -60.0, 60.0, -1e4])[: min(count, 4)]
    exact = ops.gated_activation_backward(gate.double(), up.double(), dy.double(), gelu)
    ours = ops.gated_activation_backward(gate, up, dy, gelu)
    for actual, other in zip(
        (ops.gated_activation(gate, up, gelu), *ours), (exact[2], *exact), strict=True
    ):
        assert_rounded(actual, other, cancels=100)


@needs_kernels
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.4, 0.0), (1.0, 9.0), (0.4, 3.0)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (5, 97), (3, 4099)])
def test_cross_entropy(rows: int, vocabulary: int, scale: float, cap: float) -> None:
    logits, targets = random(rows, vocabulary, spread=5), torch.arange(rows) % vocabulary
    weights = torch.linspace(0, 1.5, rows)
    exact_losses, exact = ops.cross_entropy(logits.double(), targets, weights.double(), scale, cap)
    losses, gradient = ops.cross_entropy(logits.clone(), targets, weights, scale, cap)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    assert_rounded(gradient, exact, cancels=10)
    assert not gradient[0].any()  # weight 0


@needs_kernels
def test_cross_entropy_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-300.0, 1.0, 2.0], [3e38, -3e38, 0.0]]).bfloat16()
    targets, weights = torch.tensor([0, 2, 1]), torch.ones(3)
    exact_losses, exact = ops.cross_entropy(logits.double(), targets, weights.double(), 1.0, 0.0)
    losses, gradient = ops.cross_entropy(logits.clone(), targets, weights, 1.0, 0.0)
    torch.testing.assert_close(losses[:2].double(), exact_losses[:2], rtol=1e-5, atol=1e-5)
    assert losses[2] > 1e38
    assert_rounded(gradient, exact)


@pytest.mark.skipif(IS_INTERPRETED, reason="on a GPU, the loss is NaN: test_triton_ops.py")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_is_an_error(
    dtype: torch.dtype, target: int, device: str
) -> None:
    """The kernel writes at the target, so an invalid target would write out of bounds."""
    if device == "cuda":
        pytest.skip("its loss is NaN: test_triton_ops.py")
    logits, targets = torch.zeros(2, 5, dtype=dtype), torch.tensor([0, target])
    with pytest.raises((IndexError, RuntimeError)):
        ops.cross_entropy(logits, targets, torch.ones(2), 1.0, 0.0)
    with pytest.raises((IndexError, RuntimeError)):
        ops.kl_divergence(logits, logits, targets, 1.0, 0.0)


@needs_kernels
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.4, 0.0), (1.0, 9.0), (0.4, 3.0)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (5, 97), (3, 4099)])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_divergence(rows: int, vocabulary: int, scale: float, cap: float, spread: float) -> None:
    """Also for nearly equal logits, where the KL is far smaller than the terms that it is the
    difference of."""
    base, targets = random(rows, vocabulary, spread=5), torch.arange(rows) % vocabulary
    tuned = (base.float() + random(rows, vocabulary, seed=1, spread=spread).float()).bfloat16()
    exact = ops.kl_divergence(base.double(), tuned.double(), targets, scale, cap)
    ours = ops.kl_divergence(base, tuned, targets, scale, cap)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-4, atol=3e-6)
    assert ours[2].tolist() == exact[2].tolist()


@needs_kernels
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_divergence_hides_no_nan(poison: float) -> None:
    base, targets = random(3, 97), torch.tensor([0, 1, 2])
    tuned = base.clone()
    tuned[1, 50] = poison
    for actual, other in ((base, tuned), (tuned, base)):
        losses, kl, _ = ops.kl_divergence(actual, other, targets, 1.0, 0.0)
        assert not torch.isfinite(kl[1])
        assert torch.isfinite(kl[[0, 2]]).all()
    assert not torch.isfinite(ops.kl_divergence(base, tuned, targets, 1.0, 0.0)[0][1]), losses


# ---------------------------------------------------------------- what is not a number stays none


@needs_kernels
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_rms_norm_hides_no_nan(poison: float) -> None:
    x, dy, weight = random(3, 48), random(3, 48, seed=1), torch.ones(48)
    x[1, 20] = poison
    y, dx = differentiated(lambda x: ops.rms_norm(x, weight, 1e-5), [x], dy)
    assert not torch.isfinite(y[1, 20])
    assert not torch.isfinite(dx[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()
    assert torch.isfinite(dx[[0, 2]]).all()
    dy[2, 5] = poison
    _, dx = differentiated(lambda x: ops.rms_norm(x, weight, 1e-5), [random(3, 48)], dy)
    assert not torch.isfinite(dx[2]).any()


@needs_kernels
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_hides_no_nan(poison: float, gelu: bool) -> None:
    places = torch.arange(0, 1100, 37)
    for which in range(3):
        inputs = [random(1100, seed=seed) for seed in range(3)]
        inputs[which][places] = poison
        gate, up, dy = inputs
        ours, exact = (
            (
                ops.gated_activation(*pair, gelu),
                *ops.gated_activation_backward(*pair, dy.to(pair[0].dtype), gelu),
            )
            for pair in ((gate, up), (gate.double(), up.double()))
        )
        for actual, other in zip(ours, exact, strict=True):
            if (
                poison != poison
            ):  # an infinite gate may be 0 in one and NaN in the other, by the order of products
                assert torch.equal(actual.isnan(), other.isnan())
            healthy = torch.ones(1100, dtype=torch.bool)
            healthy[places] = False
            assert torch.isfinite(actual[healthy]).all()


@needs_kernels
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("cap", [0.0, 9.0])
def test_cross_entropy_hides_no_nan(poison: float, cap: float) -> None:
    logits = random(3, 97)
    logits[1, 60] = poison
    losses, gradient = ops.cross_entropy(logits, torch.tensor([1, 2, 3]), torch.ones(3), 1.0, cap)
    assert torch.isfinite(losses[[0, 2]]).all()
    assert torch.isfinite(gradient[[0, 2]]).all()
    if poison != poison or not cap:  # a cap makes a finite logit of an infinite one
        assert not torch.isfinite(losses[1])
        assert not torch.isfinite(gradient[1]).any()


@needs_kernels
def test_rotate_hides_no_nan() -> None:
    x, angles = random(2, 1, 8), torch.rand(2, 4)
    x[0, 0, 1] = NAN
    y = ops.apply_rotary(x, angles.cos(), angles.sin())
    assert y.isnan().nonzero().tolist() == [[0, 0, 1], [0, 0, 5]]


# ---------------------------------------------------------------- compiling

USE_THEM = """
import torch
from tunesmith.model.kernels import ops
x = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
y = ops.rms_norm(x, torch.ones(4), 1e-5)
inverse_rms = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
assert torch.equal(y, (x.float() * inverse_rms).bfloat16())
print(ops.is_supported(x), ops.has_attention())
"""


@pytest.mark.promise
def test_without_a_compiler_the_reference_is_used(tmp_path: Path) -> None:
    environment = os.environ | {
        "CC": "no-such-compiler",
        "PATH": "",
        "TUNESMITH_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", USE_THEM],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]
    assert not any(tmp_path.iterdir())


def test_a_compiler_that_fails_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    assert build.load_kernels.__wrapped__().library is None
    assert not any((tmp_path / "kernels").iterdir())


@pytest.mark.promise
@needs_kernels
def test_two_may_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes: the folder sees no difference."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: build.load_kernels.__wrapped__(), range(2)))
    assert None not in [kernels.library for kernels in results]
    (compiled,) = (tmp_path / "kernels").glob("*.so")
    before = compiled.stat().st_mtime_ns
    assert build.load_kernels.__wrapped__().library is not None
    assert compiled.stat().st_mtime_ns == before, "compiled again"
