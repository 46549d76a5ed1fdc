"""Every attention backend equals `reference`, forward and backward, and no document sees
another."""

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pairs import list_pairs
from tunesmith.core.errors import InputError
from tunesmith.core.types import PackLayout
from tunesmith.model.attention import (
    BACKENDS,
    AttentionConfig,
    attend,
    choose_backend,
    reference_attention,
)
from tunesmith.model.causal_lm import packed_attention_forward
from tunesmith.model.kernels import ops

Attention = Callable[[Tensor, Tensor, Tensor, PackLayout, AttentionConfig], Tensor]

# One token, neighbors of equal length, primes, and both sides of the C kernel's blocks of 6, 16,
# 64 and 96 tokens; with a window the last one starts at its second block.
LENGTHS = [
    (1,),
    (2, 1, 1, 3),
    (7, 5, 5, 5, 2),
    (6, 48, 49, 47),
    (64, 63, 65, 1),
    (97, 53, 130),
    (96, 95, 17, 290),
]
# Branches of one prefix, prefixes of prefixes, lone tokens, beginnings of every length modulo 6.
FORESTS = [
    ((3, 2, 1, 4), (-1, 0, 0, -1)),
    ((1, 1, 1, 9, 40), (-1, 0, 1, 2, 0)),
    ((115, 60, 33, 97, 20, 31), (-1, 0, 0, 2, 2, -1)),
    ((64, 16, 96, 130, 5, 7), (-1, 0, 1, 1, -1, 4)),
    ((98, 101, 3), (-1, 0, 1)),
]
RULES = {
    "plain": AttentionConfig(scale=0.3),
    "self only": AttentionConfig(scale=0.3, window=1),
    "window": AttentionConfig(scale=0.3, window=5),
    "window of a block": AttentionConfig(scale=0.1, window=64),
    "wide window": AttentionConfig(scale=0.1, window=1000),
    "soft cap": AttentionConfig(scale=0.5, softcap=2.0),
    "window and soft cap": AttentionConfig(scale=0.5, window=7, softcap=2.0),
}
HEADS = [(4, 4, 8), (6, 2, 8), (3, 1, 16)]  # query heads, key heads, head size


BLIND_CASES = list_pairs(
    ["reference", "sdpa", "dense_mask", "cpu_kernel"],
    list(RULES.values()),
    [torch.float64, torch.bfloat16],
)


def layout_of(lengths: tuple[int, ...]) -> PackLayout:
    return PackLayout((0, *itertools.accumulate(lengths[:-1])), lengths)


LAYOUTS = [layout_of(lengths) for lengths in LENGTHS]
LAYOUTS += [
    dataclasses.replace(layout_of(lengths), parents=parents) for lengths, parents in FORESTS
]


def random_inputs(
    tokens: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the gradient of the output."""
    queries, keys, size = heads
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (queries, keys, keys, queries)]
    q, k, v, dout = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return q, k, v, dout


def run(
    attention: Attention, inputs: tuple[Tensor, ...], layout: PackLayout, rule: AttentionConfig
) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = attention(q, k, v, layout, rule)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Return the error relative to the norm. The gradient of a single token's scores is 0, so norms
    far below 1 count as 1."""
    return float((ours.double() - truth).norm() / (truth.norm() + 1e-3 * truth.numel() ** 0.5))


def inside_stock_module(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    """Attend as transformers calls it: [1, heads, tokens, size]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = packed_attention_forward(
        nn.Module(),
        query,
        key,
        value,
        None,
        layout=layout,
        scaling=rule.scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
    )
    return out[0]


ATTENTIONS: dict[str, Attention] = {
    "sdpa": BACKENDS["sdpa"],
    "dense_mask": BACKENDS["dense_mask"],
    "cpu_kernel": BACKENDS["cpu_kernel"],  # in fp64 it takes `documents`
    "stock": inside_stock_module,
}


@pytest.mark.parametrize(
    ("name", "rule_name", "heads"), list_pairs(list(ATTENTIONS), list(RULES), HEADS)
)
def test_equals_reference_in_fp64(name: str, rule_name: str, heads: tuple[int, int, int]) -> None:
    attention, rule = ATTENTIONS[name], RULES[rule_name]
    for layout in LAYOUTS:
        inputs = random_inputs(layout.num_tokens, heads)
        ours, expected = (
            run(attention, inputs, layout, rule),
            run(reference_attention, inputs, layout, rule),
        )
        for actual, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("heads", "value_size", "dtype", "tolerance"),
    [((4, 4, 20), 16, torch.float64, 1e-12), ((2, 2, 192), 128, torch.bfloat16, 6e-3)],
    ids=["fp64", "kernel"],
)
def test_values_may_be_shorter_than_keys(
    heads: tuple[int, int, int], value_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Multi-head latent attention, inside of stock modules."""
    for layout in LAYOUTS[-4:]:
        q, k, v, dout = random_inputs(layout.num_tokens, heads, dtype)
        inputs = (q, k, v[..., :value_size], dout[..., :value_size])
        rule = AttentionConfig(scale=0.1, window=48)
        ours = run(inside_stock_module, inputs, layout, rule)
        exact = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
        for actual, truth in zip(ours, exact, strict=True):
            assert actual.shape == truth.shape
            assert relative_error(actual, truth) < tolerance


def test_reference_is_softmax_written_out() -> None:
    q, k, v, _ = random_inputs(5, (2, 1, 4))
    out = reference_attention(
        q, k, v, layout_of((2, 3)), AttentionConfig(scale=0.7, window=2, softcap=1.5)
    )
    for token, seen in {0: [0], 1: [0, 1], 2: [2], 3: [2, 3], 4: [3, 4]}.items():
        for head in range(2):
            scores = torch.stack(
                [1.5 * torch.tanh(0.7 * (q[token, head] @ k[j, 0]) / 1.5) for j in seen]
            )
            expected = (scores.softmax(0)[:, None] * v[seen, 0]).sum(0)
            torch.testing.assert_close(out[token, head], expected)


@pytest.mark.parametrize(("name", "rule", "dtype"), BLIND_CASES)
def test_documents_are_blind(name: str, rule: AttentionConfig, dtype: torch.dtype) -> None:
    """Changing other documents leaves outputs bitwise equal; their gradient is exactly zero."""
    layout = layout_of((70, 20, 20, 1))
    q, k, v, dout = random_inputs(layout.num_tokens, (4, 2, 64), dtype)
    is_inside = torch.zeros(layout.num_tokens, dtype=torch.bool)
    is_inside[70:90] = True
    other_q, other_k, other_v = (torch.where(is_inside[:, None, None], x, -x) for x in (q, k, v))
    out, *gradients = run(BACKENDS[name], (q, k, v, dout * is_inside[:, None, None]), layout, rule)
    assert torch.equal(
        BACKENDS[name](other_q, other_k, other_v, layout, rule)[is_inside], out[is_inside]
    )
    for gradient in gradients:
        assert not gradient[~is_inside].any()
    assert gradients[2][is_inside].any()


def test_reference_of_a_forest_is_each_document_alone() -> None:
    """Three documents with two shared prefixes; gradients of shared tokens are sums over the
    documents."""
    layout = PackLayout((0, 5, 8, 12, 13), (5, 3, 4, 1, 6), (-1, 0, 0, 2, 2))
    inputs, rule = random_inputs(19, (4, 2, 8)), AttentionConfig(scale=0.7, window=9)
    out, *gradients = run(reference_attention, inputs, layout, rule)
    summed = [torch.zeros_like(x) for x in gradients]
    seen = torch.zeros(19)
    for leaf in (1, 3, 4):
        rows = torch.cat(
            [
                torch.arange(19)[layout.starts[i] :][: layout.lengths[i]]
                for i in layout.get_path(leaf)
            ]
        )
        q, k, v, dout = (x[rows] for x in inputs)
        dout = (
            dout * (seen[rows] == 0)[:, None, None]
        )  # the output of a shared token is one, whoever owns it
        alone, *parts = run(reference_attention, (q, k, v, dout), layout_of((len(rows),)), rule)
        torch.testing.assert_close(out[rows], alone, rtol=1e-12, atol=1e-12)
        for total, part in zip(summed, parts, strict=True):
            total.index_add_(0, rows, part)
        seen[rows] = 1
    for actual, other in zip(gradients, summed, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "rule", "dtype"), BLIND_CASES)
def test_branches_are_blind(name: str, rule: AttentionConfig, dtype: torch.dtype) -> None:
    """A branch and its gradients depend, bitwise, only on the segments that it continues."""
    layout = PackLayout((0, 37, 60, 90), (37, 23, 30, 12), (-1, 0, 0, -1))
    q, k, v, dout = random_inputs(layout.num_tokens, (4, 2, 64), dtype)
    is_inside = torch.zeros(layout.num_tokens, dtype=torch.bool)
    is_inside[60:90] = True
    sees = is_inside.clone()
    sees[:37] = True
    other_q, other_k, other_v = (torch.where(sees[:, None, None], x, -x) for x in (q, k, v))
    out, *gradients = run(BACKENDS[name], (q, k, v, dout * is_inside[:, None, None]), layout, rule)
    assert torch.equal(
        BACKENDS[name](other_q, other_k, other_v, layout, rule)[is_inside], out[is_inside]
    )
    assert not gradients[0][~is_inside].any()
    for gradient in gradients:
        assert not gradient[~sees].any()
    assert gradients[2][:37].any() == (rule.window is None or rule.window > 1)


# ---------------------------------------------------------------- the C kernel

needs_kernel = pytest.mark.skipif(
    not ops.has_attention(), reason="needs a compiler and AVX512-BF16"
)


@needs_kernel
@pytest.mark.parametrize(
    "heads", [(4, 4, 64), (9, 3, 64), (4, 1, 128), (2, 1, 256), (2, 2, 192)], ids=str
)
@pytest.mark.parametrize("rule", [RULES[name] for name in RULES if "soft" not in name])
def test_kernel_is_as_near_the_truth_as_torch(
    rule: AttentionConfig, heads: tuple[int, int, int]
) -> None:
    """Against fp64 on the same bf16 inputs: the kernel rounds weights to bf16, so its error is
    above that of `sdpa`."""
    rule = AttentionConfig(scale=rule.scale * 0.2, window=rule.window)
    for layout in LAYOUTS:
        inputs = random_inputs(layout.num_tokens, heads, torch.bfloat16)
        exact = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
        ours = run(BACKENDS["cpu_kernel"], inputs, layout, rule)
        for name, actual, truth in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
            assert relative_error(actual, truth) < 4e-3, (name, layout)


@needs_kernel
def test_kernel_keeps_large_scores_apart() -> None:
    """Scores of hundreds: the softmax is of differences to the largest."""
    layout = layout_of((61,))
    inputs = random_inputs(61, (2, 1, 64), torch.bfloat16)
    rule = AttentionConfig(scale=20.0)
    exact = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
    ours = run(BACKENDS["cpu_kernel"], inputs, layout, rule)
    for actual, truth in zip(ours[:1] + ours[3:], exact[:1] + exact[3:], strict=True):
        assert relative_error(actual, truth) < 4e-3


@needs_kernel
def test_kernel_does_not_depend_on_its_neighbors_or_threads() -> None:
    rule, inputs = (
        RULES["window of a block"],
        random_inputs(130 + 41 + 9, (6, 2, 64), torch.bfloat16),
    )
    together = run(BACKENDS["cpu_kernel"], inputs, layout_of((130, 41, 9)), rule)
    alone = run(BACKENDS["cpu_kernel"], tuple(x[130:171] for x in inputs), layout_of((41,)), rule)
    for actual, other in zip(together, alone, strict=True):
        assert torch.equal(actual[130:171], other)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = run(BACKENDS["cpu_kernel"], inputs, layout_of((130, 41, 9)), rule)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(actual, other) for actual, other in zip(together, again, strict=True))


def _make_forest(rng: random.Random) -> PackLayout:
    """Return segments around the kernel's blocks of 6, 16, 64 and 96 tokens; most continue one."""
    lengths = rng.choices([1, 2, 5, 6, 7, 15, 16, 17, 33, 63, 64, 65, 95, 97], k=rng.randint(2, 8))
    parents = [-1]
    for segment in range(1, len(lengths)):
        parents.append(-1 if rng.random() < 0.25 else rng.randrange(segment))
    return dataclasses.replace(layout_of(tuple(lengths)), parents=tuple(parents))


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_a_path_of_segments_has_the_bits_of_one(seed: int) -> None:
    rng = random.Random(seed)
    layout = _make_forest(rng)
    kv_heads = rng.choice([1, 2])
    heads = (kv_heads * rng.choice([1, 3, 7, 8]), kv_heads, rng.choice([64, 128, 192, 256]))
    inputs = random_inputs(layout.num_tokens, heads, torch.bfloat16)[:3]
    rule = AttentionConfig(scale=0.1, window=rng.choice([None, 1, 7, 17, 64, 100]))
    out = BACKENDS["cpu_kernel"](*inputs, layout, rule)
    for segment in range(len(layout.lengths)):
        spans = [
            torch.arange(layout.starts[i], layout.starts[i] + layout.lengths[i])
            for i in layout.get_path(segment)
        ]
        tokens = torch.cat(spans)
        path = tuple(x[tokens] for x in inputs)
        undivided = BACKENDS["cpu_kernel"](*path, layout_of((len(tokens),)), rule)
        assert torch.equal(out[tokens], undivided), (segment, layout)


@needs_kernel
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
def test_kernel_hides_no_nan(which: int, poison: float) -> None:
    """Token 20 of 70 is NaN: the same values as in the reference are not finite; the other document
    is finite."""
    layout, rule = layout_of((70, 30)), RULES["plain"]
    inputs = random_inputs(100, (2, 1, 64), torch.bfloat16)
    before = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
    inputs[which][20, 0, 3] += 1
    after = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
    inputs[which][20, 0, 3] = poison
    ours, expected = (
        run(BACKENDS["cpu_kernel"], inputs, layout, rule),
        run(reference_attention, inputs, layout, rule),
    )
    assert any(not torch.isfinite(x).all() for x in expected)
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        healthy = torch.isfinite(ours[i]) & ~torch.isfinite(expected[i]) & (before[i] != after[i])
        assert not healthy.any(), f"{name}: {int(healthy.sum())} values look healthy"
        assert torch.isfinite(ours[i][70:]).all(), f"{name}: the other document is poisoned"


@pytest.mark.parametrize("backend", ["cpu_kernel", "sdpa", "dense_mask", "reference"])
@pytest.mark.parametrize("heads", [(6, 2, 64), (2, 1, 128), (2, 1, 192), (3, 1, 48)], ids=str)
def test_attend_turns_by_the_angles(backend: str, heads: tuple[int, int, int]) -> None:
    """Against rotation and attention in fp64, with documents of unsorted lengths; without rotation
    the outputs differ."""
    layout, rule = layout_of((70, 1, 131, 64)), AttentionConfig(scale=0.1, window=90)
    inputs = random_inputs(layout.num_tokens, heads, torch.bfloat16)
    positions = torch.cat([torch.arange(length) for length in layout.lengths])[:, None]
    angles = positions * torch.arange(1, heads[2] // 2 + 1) / heads[2]
    cosine, sine = angles.cos(), angles.sin()

    def turning(
        q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
    ) -> Tensor:
        wide = q.dtype == torch.float64
        return attend(q, k, v, layout, rule, "reference" if wide else backend, (cosine, sine))

    exact = run(turning, tuple(x.double() for x in inputs), layout, rule)
    ours = run(turning, inputs, layout, rule)
    for name, actual, truth in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert relative_error(actual, truth) < 8e-3, name
    assert relative_error(attend(*inputs[:3], layout, rule, backend), exact[0]) > 0.1


@needs_kernel
def test_kernel_turns_as_the_rotation_alone_does() -> None:
    layout, rule = layout_of((70, 131)), RULES["window of a block"]
    q, k, v, _ = random_inputs(layout.num_tokens, (4, 2, 128), torch.bfloat16)
    angles = torch.rand(layout.num_tokens, 64).cos(), torch.rand(layout.num_tokens, 64).sin()
    alone = attend(
        ops.apply_rotary(q, *angles), ops.apply_rotary(k, *angles), v, layout, rule, "cpu_kernel"
    )
    assert (
        relative_error(attend(q, k, v, layout, rule, "cpu_kernel", angles), alone.double()) < 1e-4
    )


# ---------------------------------------------------------------- choice and refusal


def test_choice_of_a_backend() -> None:
    assert choose_backend("dense_mask", torch.zeros(1)) == "dense_mask"
    assert choose_backend("auto", torch.zeros(1)) == "cpu_kernel"


def test_kernel_takes_documents_for_what_it_cannot_do() -> None:
    layout, inputs = layout_of((9, 4)), random_inputs(13, (2, 1, 48), torch.bfloat16)
    for rule in (RULES["plain"], RULES["soft cap"]):
        ours, torchs = (
            BACKENDS[name](*inputs[:3], layout, rule) for name in ("cpu_kernel", "sdpa")
        )
        assert torch.equal(ours, torchs)


def test_a_layout_of_another_length_is_an_error() -> None:
    q, k, v, _ = random_inputs(5, (2, 1, 8))
    with pytest.raises(AssertionError, match="6 tokens"):
        attend(q, k, v, layout_of((6,)), RULES["plain"])


@pytest.mark.parametrize(
    ("extra", "named"), [({"head_mask": torch.zeros(2)}, "head_mask"), ({}, "a mask")]
)
def test_stock_modules_may_not_pass_what_packs_ignore(extra: dict[str, Tensor], named: str) -> None:
    q = torch.zeros(1, 2, 3, 8)
    mask = None if extra else torch.zeros(1, 1, 3, 3)
    with pytest.raises(InputError, match=named):
        packed_attention_forward(nn.Module(), q, q, q, mask, layout=layout_of((3,)), **extra)  # type: ignore[arg-type]


def test_integers_are_caps_and_scales_too() -> None:
    """A config.json may say 2 for 2.0; ignoring it would silently change the model."""
    q, k, v, _ = random_inputs(6, (2, 2, 8))
    exact = reference_attention(q, k, v, layout_of((6,)), AttentionConfig(scale=1.0, softcap=2.0))
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = packed_attention_forward(
        nn.Module(), query, key, value, None, layout=layout_of((6,)), scaling=1, softcap=2
    )
    torch.testing.assert_close(out[0], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "sdpa", "dense_mask"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_cuda_backends_are_near_the_truth(name: str, rule: AttentionConfig) -> None:
    for layout in LAYOUTS:
        inputs = random_inputs(layout.num_tokens, (4, 2, 64), torch.bfloat16)
        exact = run(reference_attention, tuple(x.double() for x in inputs), layout, rule)
        ours = run(BACKENDS[name], tuple(x.cuda() for x in inputs), layout, rule)
        for actual, truth in zip(ours, exact, strict=True):
            assert relative_error(actual.cpu(), truth) < 1e-2, layout
