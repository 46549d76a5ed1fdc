"""The gated delta rule through flash-linear-attention: the layout of its arguments.

Its kernels need a GPU; its own reference of one token after the other stands in for them."""

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from scan_reference import make_inputs, make_layout
from tunesmith.core.types import PackLayout
from tunesmith.model.mixers import fla_rule
from tunesmith.model.mixers.scan import ScanInputs, ScanShape, scan_pack

pytestmark = pytest.mark.skipif(find_spec("fla") is None, reason="fla-core is not installed")
SHAPE = ScanShape(2, 3, key_size=4, value_size=5, is_delta_rule=True)
FORESTS = {
    "plain": [(-1, 9), (-1, 70), (-1, 1)],
    "branches": [(-1, 9), (0, 5), (1, 2), (1, 7), (0, 3), (-1, 6), (5, 4)],
}


def normalize(x: Tensor) -> Tensor:
    """As the package's kernel does."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def run_naive(**arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Run the package's reference on each sequence by itself."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    ends = arguments["cu_seqlens"].tolist()
    assert arguments["cu_seqlens_cpu"].tolist() == ends
    q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
    assert len(q) == len(v) == 1
    assert q.shape[1] == ends[-1]
    assert arguments["use_qk_l2norm_in_kernel"]
    q, k = (normalize(x).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for index, (start, end) in enumerate(itertools.pairwise(ends)):
        initial = arguments["initial_state"]
        out, state = naive_recurrent_gated_delta_rule(
            *(x[:, start:end] for x in (q, k, v, beta, g)),
            initial_state=None if initial is None else initial[index : index + 1],
            output_final_state=True,
        )
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states) if arguments["output_final_state"] else None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Let the package's reference stand in for its kernels; returns what they are called with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no GPU here
        from fla.ops import gated_delta_rule
    calls: list[dict[str, Any]] = []

    def run(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(arguments)
        return run_naive(**arguments)

    monkeypatch.setattr(gated_delta_rule, "chunk_gated_delta_rule", run)
    fla_rule._load_kernels.cache_clear()
    yield calls
    fla_rule._load_kernels.cache_clear()


def differentiate(inputs: ScanInputs, layout: PackLayout) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in vars(inputs).values() if x is not None]
    out = scan_pack(inputs, SHAPE, layout)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_a_call_per_depth_equals_our_scan(
    forest: list[tuple[int, int]],
    package: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = make_layout(forest)
    inputs = dataclasses.replace(make_inputs(layout.num_tokens, SHAPE), skip_H=None)
    values = {name: x if x is None else x.float() for name, x in vars(inputs).items()}
    inputs = ScanInputs(**values)
    expected = differentiate(inputs, layout)
    assert not package
    monkeypatch.setattr(fla_rule, "is_supported", lambda *_: True)
    ours = differentiate(inputs, layout)
    depths = max(len(layout.get_path(i)) for i in range(len(forest)))
    assert len(package) == 2 * depths
    for actual, wanted in zip(ours, expected, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_kernels_take_these_arguments(package: list[dict[str, Any]]) -> None:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule

    layout = make_layout(FORESTS["plain"])
    inputs = make_inputs(layout.num_tokens, SHAPE)
    qkv = SHAPE.split_channels(inputs.mixed_TC.float())
    scalars = (SHAPE.split_heads(x.float()) for x in (inputs.decay_TH, inputs.beta_TH))
    fla_rule.run_delta_rule(qkv, *scalars, layout)
    accepted = inspect.signature(chunk_gated_delta_rule).parameters
    assert set(package[0]) <= set(accepted)


def test_other_inputs_take_the_torch_path() -> None:
    assert not fla_rule.is_supported(torch.zeros(1, dtype=torch.bfloat16), SHAPE)


@pytest.mark.parametrize(
    ("version", "is_used"), [("0.6.0", True), ("0.10", True), ("0.4.1", False)]
)
def test_an_older_package_is_not_used(
    version: str, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla_rule.importlib.metadata, "version", lambda _name: version)
    assert fla_rule.has_package.__wrapped__() is is_used
