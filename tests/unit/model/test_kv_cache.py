"""Attention over stored keys equals plain attention over the full row."""

import pytest
import torch
from torch import nn

from tiny_models import make_tiny_model
from tunesmith.core.types import PackLayout
from tunesmith.model.attention import AttentionConfig, apply_rotary_qk, reference_attention
from tunesmith.model.kernels import ops
from tunesmith.model.kv_cache import BLOCK_TOKENS, RaggedKVCache

HEADS, GROUPS, SIZE = 6, 2, 8
CONFIGS = {
    "plain": AttentionConfig(scale=0.3),
    "window": AttentionConfig(scale=0.3, window=4),
    "wide window": AttentionConfig(scale=0.3, window=500),
    "soft cap": AttentionConfig(scale=0.3, softcap=2.0),
    "both": AttentionConfig(scale=0.3, window=5, softcap=2.0),
    "sinks": AttentionConfig(scale=0.3, window=5, sinks_N=torch.linspace(-1, 2, HEADS)),
}


class Rows:
    """Rows of random q, k and v; the cache holds the first `lengths` of them. Also the expected
    output of a full row."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, 2 * BLOCK_TOKENS)
        self.q = torch.randn(*shape, HEADS, SIZE, generator=generator, dtype=torch.float64)
        self.k = torch.randn(*shape, GROUPS, SIZE, generator=generator, dtype=torch.float64)
        self.v = torch.randn(*shape, GROUPS, SIZE, generator=generator, dtype=torch.float64)

    def part(self, row: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        return self.q[row, start:end], self.k[row, start:end], self.v[row, start:end]

    def expected(self, row: int, start: int, end: int, config: AttentionConfig) -> torch.Tensor:
        return reference_attention(*self.part(row, 0, end), PackLayout((0,), (end,)), config)[
            start:end
        ]


def packed(
    parts: list[tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackLayout]:
    lengths = tuple(len(q) for q, _, _ in parts)
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q, k, v, PackLayout(starts, lengths)


def extend(
    cache: RaggedKVCache, layer: nn.Module, rows: Rows, order: list[int], config: AttentionConfig
) -> None:
    """Run one decode step of all rows and check it against plain attention."""
    places = cache.begin_decode(torch.device("cpu")).tolist()
    out = cache.attend(
        layer,
        *packed([rows.part(r, n, n + 1) for r, n in zip(order, places, strict=True)]),
        config,
        "auto",
    )
    expected = [rows.expected(r, n, n + 1, config) for r, n in zip(order, places, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lengths", [(3, 9, 1), (7, 7, 7)], ids=["ragged", "equal"])
def test_rows_join_and_leave_at_any_time(config: AttentionConfig, lengths: tuple[int, ...]) -> None:
    rows, layer, cache = Rows(4), nn.Module(), RaggedKVCache(slots=3)
    cache.begin_prefill(lengths)
    out = cache.attend(
        layer, *packed([rows.part(r, 0, n) for r, n in enumerate(lengths)]), config, "reference"
    )
    torch.testing.assert_close(
        out, torch.cat([rows.expected(r, 0, n, config) for r, n in enumerate(lengths)])
    )
    for _ in range(3):
        extend(cache, layer, rows, [0, 1, 2], config)
    cache.drop_row(0)  # row 2 moves into its place
    extend(cache, layer, rows, [2, 1], config)
    cache.begin_prefill([5])
    cache.attend(layer, *packed([rows.part(3, 0, 5)]), config, "reference")
    for _ in range(BLOCK_TOKENS):  # the stores grow on the way
        extend(cache, layer, rows, [2, 1, 3], config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_shared_beginning_stands_before_every_row(config: AttentionConfig) -> None:
    rows, layer, cache = Rows(2), nn.Module(), RaggedKVCache(slots=2)
    for x in (rows.q, rows.k, rows.v):
        x[1, :6] = x[0, :6]
    cache.begin_prefill([6])
    cache.attend(layer, *packed([rows.part(0, 0, 6)]), config, "reference")
    cache.share_prefix()
    assert (cache.lengths, cache.prefix_length) == ([], 6)
    cache.begin_prefill([4, 1])
    out = cache.attend(
        layer, *packed([rows.part(0, 6, 10), rows.part(1, 6, 7)]), config, "reference"
    )
    torch.testing.assert_close(
        out, torch.cat([rows.expected(0, 6, 10, config), rows.expected(1, 6, 7, config)])
    )
    for _ in range(3):
        extend(cache, layer, rows, [0, 1], config)


def test_stores_grow_to_what_the_longest_row_needs_and_no_further() -> None:
    rows, layer, cache = Rows(1), nn.Module(), RaggedKVCache(1, max_length=BLOCK_TOKENS + 2)
    cache.begin_prefill([BLOCK_TOKENS])
    cache.attend(layer, *packed([rows.part(0, 0, BLOCK_TOKENS)]), CONFIGS["plain"], "reference")
    for _ in range(3):  # and one that was not foreseen
        extend(cache, layer, rows, [0], CONFIGS["plain"])
        assert cache._kv_buffers[layer][0].shape[2] == 2 * BLOCK_TOKENS


# ---------------------------------------------------------------- decode.c, prefixes in attention.c

needs_kernel = pytest.mark.skipif(
    not ops.has_attention(), reason="needs a C compiler and AVX512-BF16"
)
SHARED = 21


def narrow_rows(heads: int, groups: int, size: int) -> Rows:
    """Rows in bf16 with a shared prefix. The expected output is computed in fp64 from the same
    numbers."""
    rows, generator = Rows(4), torch.Generator().manual_seed(1)
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        x = torch.randn(4, 3 * BLOCK_TOKENS, count, size, generator=generator).bfloat16().double()
        x[:, :SHARED] = x[:1, :SHARED]
        setattr(rows, name, x)
    return rows


NEAR = {"rtol": 0.02, "atol": 0.01}  # a few roundings to bf16 of numbers of about 1


@needs_kernel
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "after a shared beginning"])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(3, 1, 64), (4, 4, 64), (10, 2, 128), (2, 1, 256)]
)
def test_the_kernels_equal_plain_attention(
    heads: int, groups: int, size: int, window: int | None, shared: bool, has_sinks: bool
) -> None:
    sinks = torch.linspace(-2, 3, heads) if has_sinks else None
    rows, layer, cache, config = (
        narrow_rows(heads, groups, size),
        nn.Module(),
        RaggedKVCache(3),
        AttentionConfig(size**-0.5, window, sinks_N=sinks),
    )
    begin = SHARED if shared else 0

    def attended(parts: list[tuple[int, int, int]]) -> torch.Tensor:
        q, k, v, layout = packed([rows.part(*part) for part in parts])
        return cache.attend(layer, *(x.bfloat16() for x in (q, k, v)), layout, config, "cpu_kernel")

    if shared:
        cache.begin_prefill([SHARED])
        attended([(0, 0, SHARED)])
        cache.share_prefix()
    lengths = [30, 5, 70]
    cache.begin_prefill(lengths)
    parts = [(row, begin, begin + length) for row, length in enumerate(lengths)]
    expected = torch.cat([rows.expected(*part, config) for part in parts])
    torch.testing.assert_close(attended(parts).double(), expected, **NEAR)
    for order in (
        [0, 1, 2],
        [0, 1, 2],
        [2, 1],
    ):  # row 0 leaves, and the last row moves into its place
        if len(order) < len(cache.lengths):
            cache.drop_row(0)
        places = cache.begin_decode(torch.device("cpu")).tolist()
        parts = [(row, position, position + 1) for row, position in zip(order, places, strict=True)]
        out, expected = attended(parts), torch.cat([rows.expected(*part, config) for part in parts])
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, **NEAR)


@needs_kernel
def test_the_step_kernel_turns_what_it_reads() -> None:
    """64 more tokens: rotated keys are stored in growing buffers."""
    rows, config = narrow_rows(6, 2, 64), AttentionConfig(0.125)
    layers, caches = (nn.Module(), nn.Module()), (RaggedKVCache(2), RaggedKVCache(2))
    angles_PD = torch.rand(3 * BLOCK_TOKENS, 32, generator=torch.Generator().manual_seed(2)) * 6
    for cache, layer in zip(caches, layers, strict=True):
        cache.begin_prefill([9, 50])
        q, k, v, layout = packed([rows.part(0, 0, 9), rows.part(1, 0, 50)])
        cache.attend(layer, *(x.bfloat16() for x in (q, k, v)), layout, config, "cpu_kernel")
    for _ in range(BLOCK_TOKENS):
        places, _ = (cache.begin_decode(torch.device("cpu")) for cache in caches)
        cos_sin = angles_PD[places].cos(), angles_PD[places].sin()
        q, k, v, layout = packed(
            [rows.part(row, position, position + 1) for row, position in enumerate(places.tolist())]
        )
        q, k, v = (x.bfloat16() for x in (q, k, v))
        actual = caches[0].attend(layers[0], q, k, v, layout, config, "cpu_kernel", cos_sin)
        other = caches[1].attend(
            layers[1], *apply_rotary_qk(q, k, cos_sin), v, layout, config, "cpu_kernel"
        )
        torch.testing.assert_close(actual, other, **NEAR)
    keys, others = caches[0]._kv_buffers[layers[0]][0], caches[1]._kv_buffers[layers[1]][0]
    torch.testing.assert_close(keys, others, rtol=0.01, atol=0.01)


@needs_kernel
def test_the_decode_kernel_writes_a_single_position_per_row() -> None:
    rows, layer, cache = narrow_rows(3, 1, 64), nn.Module(), RaggedKVCache(3)
    cache.begin_prefill([30, 5])
    q, k, v, layout = packed([rows.part(0, 0, 30), rows.part(1, 0, 5)])
    cache.attend(
        layer, *(x.bfloat16() for x in (q, k, v)), layout, AttentionConfig(0.125), "cpu_kernel"
    )
    before = [x.clone() for x in cache._kv_buffers[layer]]
    cache.begin_decode(torch.device("cpu"))
    q, k, v, layout = packed([rows.part(0, 30, 31), rows.part(1, 5, 6)])
    cache.attend(
        layer, *(x.bfloat16() for x in (q, k, v)), layout, AttentionConfig(0.125), "cpu_kernel"
    )
    for was, now in zip(before, cache._kv_buffers[layer], strict=True):
        changed = (was != now).any(dim=-1).nonzero().tolist()
        assert changed == [[0, 0, 30], [1, 0, 5]]


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v2", "deepseek_v3", "gpt_neox"])
def test_the_bytes_of_a_token_are_those_of_the_buffers(family: str) -> None:
    """Generation reserves memory by this number; keys may be longer than `head_dim` says."""
    model = make_tiny_model(family, method=None)
    cache = RaggedKVCache(slots=2)
    model.prefill([(5, 6, 7), (8, 9)], cache)
    num_tokens = 2 * BLOCK_TOKENS
    num_bytes = sum(x.nbytes for buffers in cache._kv_buffers.values() for x in buffers)
    assert num_bytes == num_tokens * model.cache_bytes_per_token
