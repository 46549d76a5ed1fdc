"""Attention over stored keys equals plain attention over the full row."""

import itertools

import pytest
import torch
from torch import nn

from tiny_models import make_tiny_model
from tunesmith.core.types import PackLayout
from tunesmith.model.attention import AttentionConfig, apply_rotary_qk, reference_attention
from tunesmith.model.kernels import ops
from tunesmith.model.paged_cache import (
    BLOCK_TOKENS,
    BlockContent,
    CacheRow,
    PagedKVCache,
    _gather_rows,
    extend_contents,
)

HEADS, GROUPS, SIZE = 6, 2, 8
CONFIGS = {
    "plain": AttentionConfig(scale=0.3),
    "window": AttentionConfig(scale=0.3, window=4),
    "wide window": AttentionConfig(scale=0.3, window=500),
    "soft cap": AttentionConfig(scale=0.3, softcap=2.0),
    "both": AttentionConfig(scale=0.3, window=5, softcap=2.0),
    "sinks": AttentionConfig(scale=0.3, window=5, sinks_N=torch.linspace(-1, 2, HEADS)),
}

NEAR = {"rtol": 0.02, "atol": 0.01}  # a few roundings to bf16 of numbers of about 1


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


class Checked:
    """A cache of one layer whose outputs are compared with plain attention over the full rows."""

    def __init__(self, rows: Rows, config: AttentionConfig, *, slots: int = 3) -> None:
        self.rows, self.config, self.layer = rows, config, nn.Module()
        self.cache = PagedKVCache(slots, num_blocks=12)

    def add(self) -> CacheRow:
        return self.cache.add_row()

    def forward(
        self, parts: list[tuple[CacheRow, int, int]], backend: str = "reference"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the next tokens of cache rows, each a row of random numbers and how many; return the
        outputs and what they should be."""
        spans = [(index, row.length, row.length + count) for row, index, count in parts]
        cache_rows = [row for row, _, _ in parts]
        counts = [count for _, _, count in parts]
        is_step = max(counts) == 1 and all(row.length for row in cache_rows)
        self.cache.begin_forward(cache_rows, counts, torch.device("cpu"), is_step=is_step)
        tensors = packed([self.rows.part(*span) for span in spans])
        dtype = torch.bfloat16 if backend == "cpu_kernel" else torch.float64
        q, k, v = (x.to(dtype) for x in tensors[:3])
        out = self.cache.attend(self.layer, q, k, v, tensors[3], self.config, backend)
        assert out.dtype == dtype
        expected = torch.cat([self.rows.expected(*span, self.config) for span in spans])
        return out.double(), expected

    def check(self, parts: list[tuple[CacheRow, int, int]], backend: str = "reference") -> None:
        out, expected = self.forward(parts, backend)
        tolerance = NEAR if backend == "cpu_kernel" else {}
        torch.testing.assert_close(out, expected, **tolerance)

    def share(self, first: CacheRow, num_blocks: int) -> CacheRow:
        """Return a new row that begins with the blocks of another."""
        contents: list[BlockContent] = []
        extend_contents(contents, b"origin", range(num_blocks * BLOCK_TOKENS))
        for block, content in zip(first.blocks, contents, strict=False):
            self.cache.pool.publish(block, content)
        row = self.add()
        self.cache.start_with_prefix(row, contents)
        return row


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lengths", [(3, 9, 1), (7, 7, 7)], ids=["ragged", "equal"])
def test_rows_join_and_leave_at_any_time(config: AttentionConfig, lengths: tuple[int, ...]) -> None:
    checked = Checked(Rows(4), config)
    a, b, c = (checked.add() for _ in lengths)
    checked.check(
        [(row, index, n) for index, (row, n) in enumerate(zip((a, b, c), lengths, strict=True))]
    )
    for _ in range(3):
        checked.check([(a, 0, 1), (b, 1, 1), (c, 2, 1)])
    checked.cache.drop_row(a)
    checked.check([(c, 2, 1), (b, 1, 1)])
    d = checked.add()  # in the block that row a has left
    checked.check([(d, 3, 5)])
    for _ in range(BLOCK_TOKENS):  # every row begins a new block on the way
        checked.check([(b, 1, 1), (d, 3, 1), (c, 2, 1)])
    assert sorted(map(len, (row.blocks for row in (b, c, d)))) == [2, 2, 2]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_prompts_in_chunks_equal_whole_prompts(config: AttentionConfig, backend: str) -> None:
    checked = Checked(Rows(3), config)
    a, b, c = (checked.add() for _ in range(3))
    checked.check([(a, 0, 40)], backend)
    checked.check([(b, 1, 7), (a, 0, 60)], backend)
    checked.check([(a, 0, 1), (c, 2, 70), (b, 1, 13)], backend)
    for _ in range(3):
        checked.check([(b, 1, 1), (c, 2, 1), (a, 0, 1)], backend)
    assert [row.length for row in (a, b, c)] == [104, 23, 73]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prompts_that_end_at_one_place_may_begin_at_different_ones(config: AttentionConfig) -> None:
    checked = Checked(Rows(3), config)
    a, b, c = (checked.add() for _ in range(3))
    checked.check([(a, 0, 30), (c, 2, 10)])
    checked.check([(a, 0, 18), (b, 1, 48), (c, 2, 38)])
    assert [row.length for row in (a, b, c)] == [48, 48, 48]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rows_share_the_blocks_of_a_common_beginning(config: AttentionConfig) -> None:
    rows = Rows(3)
    for x in (rows.q, rows.k, rows.v):
        x[1:, :BLOCK_TOKENS] = x[0, :BLOCK_TOKENS]
    checked = Checked(rows, config)
    a = checked.add()
    checked.check([(a, 0, BLOCK_TOKENS + 6)])
    b, c = checked.share(a, 1), checked.share(a, 1)
    assert (b.length, b.blocks) == (BLOCK_TOKENS, a.blocks[:1])
    checked.check([(b, 1, 4), (c, 2, 1)])
    for _ in range(3):
        checked.check([(a, 0, 1), (b, 1, 1), (c, 2, 1)])
    checked.cache.drop_row(a)  # the block stays, since others hold it
    checked.check([(b, 1, 1), (c, 2, 1)])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_goes_on_with_a_copy_of_the_beginning_of_a_block(config: AttentionConfig) -> None:
    rows = Rows(2)
    for x in (rows.q, rows.k, rows.v):
        x[1, :20] = x[0, :20]
    checked = Checked(rows, config, slots=4)
    a = checked.add()
    checked.check([(a, 0, BLOCK_TOKENS)])
    checked.share(a, 1)  # published
    b = checked.add()
    assert checked.cache.reserve_with_copy(b, 30, a.blocks[0], 20)
    assert b.length == 20
    checked.check([(b, 1, 9), (a, 0, 1)])
    checked.check([(a, 0, 1), (b, 1, 1)])
    checked.check([(checked.share(a, 1), 0, 2)])  # the source is as it was


def test_nan_of_a_row_stays_in_it() -> None:
    """Also when its block is used again, and beside longer rows."""
    rows = Rows(3)
    rows.k[0, :] = torch.nan
    checked = Checked(rows, CONFIGS["plain"])
    a, b = checked.add(), checked.add()
    checked.forward([(a, 0, 50), (b, 1, 3)])
    out, expected = checked.forward([(a, 0, 1), (b, 1, 1)])
    torch.testing.assert_close(out[1], expected[1])
    assert bool(out[0].isnan().all())
    checked.cache.drop_row(a)
    c = checked.add()
    checked.check([(c, 2, 1), (b, 1, 1)])
    checked.check([(b, 1, 1), (c, 2, 1)])
    assert a.blocks == c.blocks


def test_nothing_is_reserved_beyond_the_blocks_of_a_row() -> None:
    checked = Checked(Rows(2), CONFIGS["plain"])
    a, b = checked.add(), checked.add()
    checked.check([(a, 0, BLOCK_TOKENS), (b, 1, 1)])
    assert checked.cache.pool.num_available == 10
    checked.check([(a, 0, 1), (b, 1, 1)])
    assert checked.cache.pool.num_available == 9
    assert not checked.cache.reserve(b, 11 * BLOCK_TOKENS)
    checked.cache.drop_row(a)
    assert checked.cache.pool.num_available == 11
    keys, _ = checked.cache._kv_buffers[checked.layer]
    assert keys.shape == (12, GROUPS, BLOCK_TOKENS, SIZE)


# ---------------------------------------------------------------- decode.c, prefixes in attention.c

needs_kernel = pytest.mark.skipif(
    not ops.has_attention(), reason="needs a C compiler and AVX512-BF16"
)


def narrow_rows(heads: int, groups: int, size: int) -> Rows:
    """Rows in bf16 with a shared prefix. The expected output is computed in fp64 from the same
    numbers."""
    rows, generator = Rows(4), torch.Generator().manual_seed(1)
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        x = torch.randn(4, 3 * BLOCK_TOKENS, count, size, generator=generator).bfloat16().double()
        x[:, :BLOCK_TOKENS] = x[:1, :BLOCK_TOKENS]
        setattr(rows, name, x)
    return rows


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
    config = AttentionConfig(size**-0.5, window, sinks_N=sinks)
    checked = Checked(narrow_rows(heads, groups, size), config, slots=4)
    a = checked.add()
    checked.check([(a, 3, BLOCK_TOKENS + 9)], "cpu_kernel")
    b, c, d = (checked.share(a, 1) if shared else checked.add() for _ in range(3))
    checked.check([(b, 0, 30), (c, 1, 5), (a, 3, 2), (d, 2, 70)], "cpu_kernel")
    checked.check([(b, 0, 40), (d, 2, 3)], "cpu_kernel")
    for _ in range(2):
        checked.check([(a, 3, 1), (c, 1, 1), (d, 2, 1), (b, 0, 1)], "cpu_kernel")
    checked.cache.drop_row(a)
    checked.check([(c, 1, 1), (d, 2, 1), (b, 0, 1)], "cpu_kernel")
    num_shared = BLOCK_TOKENS if shared else 0
    assert [row.length - num_shared for row in (b, c, d)] == [73, 8, 76]


@needs_kernel
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_has_the_same_bits_wherever_it_is_divided(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    length = 300
    q, k, v = (
        torch.randn(length, heads, 64, generator=generator).bfloat16() for heads in (3, 1, 1)
    )
    config = AttentionConfig(0.125, window)

    def attend_in_parts(*ends: int) -> torch.Tensor:
        cache = PagedKVCache(1, 8)
        row = cache.add_row()
        layer = nn.Module()
        outputs: list[torch.Tensor] = []
        for start, end in itertools.pairwise((0, *ends, length)):
            cache.begin_forward([row], [end - start], q.device)
            part = (x[start:end] for x in (q, k, v))
            layout = PackLayout((0,), (end - start,))
            outputs.append(cache.attend(layer, *part, layout, config, "cpu_kernel"))
        return torch.cat(outputs)

    whole = attend_in_parts()
    for ends in ((1,), (2,), (5,), (37,), (63,), (64,), (127, 190), (128, 255), (length - 1,)):
        assert torch.equal(attend_in_parts(*ends), whole), ends


@needs_kernel
def test_the_step_kernel_turns_what_it_reads() -> None:
    """64 more tokens: rotated keys are stored in new blocks."""
    rows, config = narrow_rows(6, 2, 64), AttentionConfig(0.125)
    layers, caches = (nn.Module(), nn.Module()), (PagedKVCache(2, 4), PagedKVCache(2, 4))
    angles_PD = torch.rand(3 * BLOCK_TOKENS, 32, generator=torch.Generator().manual_seed(2)) * 6
    cpu = torch.device("cpu")
    cache_rows = [[cache.add_row(), cache.add_row()] for cache in caches]
    for cache, layer, own in zip(caches, layers, cache_rows, strict=True):
        cache.begin_forward(own, [9, 50], cpu)
        q, k, v, layout = packed([rows.part(0, 0, 9), rows.part(1, 0, 50)])
        cache.attend(layer, *(x.bfloat16() for x in (q, k, v)), layout, config, "cpu_kernel")
    for _ in range(BLOCK_TOKENS):
        places, _ = (
            cache.begin_forward(own, [1, 1], cpu, is_step=True)
            for cache, own in zip(caches, cache_rows, strict=True)
        )
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
    for row, length in enumerate((9 + BLOCK_TOKENS, 50 + BLOCK_TOKENS)):
        keys, others = (
            _gather_rows(cache._kv_buffers[layer][0], torch.tensor([own[row].blocks]))[
                0, :, :length
            ]
            for cache, layer, own in zip(caches, layers, cache_rows, strict=True)
        )
        torch.testing.assert_close(keys, others, rtol=0.01, atol=0.01)


@needs_kernel
def test_the_decode_kernel_writes_a_single_position_per_row() -> None:
    checked = Checked(narrow_rows(3, 1, 64), AttentionConfig(0.125))
    a, b = checked.add(), checked.add()
    checked.check([(a, 0, 30), (b, 1, 5)], "cpu_kernel")
    buffers = checked.cache._kv_buffers[checked.layer]
    is_written = torch.zeros(12, BLOCK_TOKENS, dtype=torch.bool)
    is_written[a.blocks[0], :30] = True
    is_written[b.blocks[0], :5] = True
    for x in buffers:  # else the memory of an earlier test may hold what is written next
        x.transpose(1, 2)[~is_written] = 7
    before = [x.clone() for x in buffers]
    checked.check([(b, 1, 1), (a, 0, 1)], "cpu_kernel")
    for was, now in zip(before, buffers, strict=True):
        changed = (was.view(torch.int16) != now.view(torch.int16)).any(dim=-1).nonzero().tolist()
        assert changed == [[a.blocks[0], 0, 30], [b.blocks[0], 0, 5]]


@pytest.mark.parametrize(
    "family", ["llama", "gpt_oss", "deepseek_v2", "deepseek_v3", "gpt_neox", "gpt2"]
)
def test_the_bytes_of_a_token_are_those_of_the_buffers(family: str) -> None:
    """Generation reserves memory by this number; keys may be longer than `head_dim` says."""
    model = make_tiny_model(family, method=None)
    cache = PagedKVCache(slots=2, num_blocks=3)
    model.prefill([cache.add_row(), cache.add_row()], [(5, 6, 7), (8, 9)], cache)
    num_tokens = 3 * BLOCK_TOKENS
    num_bytes = sum(x.nbytes for buffers in cache._kv_buffers.values() for x in buffers)
    assert num_bytes == num_tokens * model.cache_bytes_per_token
