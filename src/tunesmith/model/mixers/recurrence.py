"""The recurrence of Gated DeltaNet and Mamba2 over the chunks of a pack, and its gradients.

    S_t = exp(g_t) S_(t-1) + k_t u_t        o_t = q_t S_t
    u_t = beta_t (v_t - exp(g_t) k_t S_(t-1))   delta rule (Gated DeltaNet)
    u_t = beta_t v_t                            otherwise (Mamba2)

In: q, k, v, decays g and strengths beta of a pack, fp32 or wider. Out: o. A segment starts with the
state at the end of its parent, a root with zeros. Inside a chunk, where a_i is the sum of g up to
token i and F_ij = exp(a_i - a_j) for j <= i, it is a product of triangular matrices:

    u = (1 + tril(beta k k^T F, -1))^-1 beta (v - exp(a) k S)      o = (q k^T F) u + exp(a) q S

From chunk to chunk it runs in waves (`cut_chunks`), and no chunk crosses a segment. Source: Yang et
al., Gated Delta Networks, arXiv 2412.06464, section 3.3; Dao and Gu, Mamba2, arXiv 2405.21060,
section 6. Legend: T tokens, G heads of q and k, R heads of v for each of them, D key size, E value
size, N chunks, n chunks of a wave, L tokens of a chunk, S segments, K taps of a convolution, E edge
tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import ops

CACHED_LAYOUTS = 16  # packs whose indices are kept: all layers and the backward need them
QKV = tuple[Tensor, Tensor, Tensor]  # q, k [T, G, D], v [T, G, R, E]


@dataclass(frozen=True, eq=False)
class Wave:
    """Neighboring chunks that are computed at once, since all that precede them have been."""

    chunks: slice
    # the chunk before each one on its path, as an index into the wave before, a slice if they are
    # its first ones in this order; None: there is none
    previous: Tensor | slice | None
    first_previous: int  # first chunk of the wave before


@dataclass(frozen=True, eq=False)
class ChunkedLayout:
    """The chunks of a pack, sorted by wave."""

    tokens_NL: Tensor  # 0 in the padding at the end of a segment
    padding: Tensor  # where that is, in the flattened chunks [N * L]
    slots_T: Tensor  # of each token in the flattened chunks [N * L]
    waves: tuple[Wave, ...]
    roots: Tensor  # segment of each chunk of the first wave
    last_chunks_S: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens [T, ...] in chunks [N, L, ...], with zeros as padding."""
        flat = x.index_select(0, self.tokens_NL.flatten())
        flat.index_fill_(0, self.padding, 0)
        return flat.unflatten(0, self.tokens_NL.shape)

    def join(self, x: Tensor) -> Tensor:
        """Return the chunks [N, L, ...] as tokens [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.slots_T)


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def cut_chunks(layout: PackLayout, chunk_size: int, device: torch.device) -> ChunkedLayout:
    """Cut every segment into chunks of `chunk_size` tokens, and sort them into waves: a chunk's
    depth is the number of chunks before it on its path."""
    spans: list[tuple[int, int]] = []  # first token and length of each chunk
    previous: list[int] = []
    depths: list[int] = []
    last_chunks: list[int] = []  # of each segment
    segments: list[int] = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        parent = layout.parents[segment] if layout.parents else -1
        before = last_chunks[parent] if parent >= 0 else -1
        for offset in range(0, length, chunk_size):
            spans.append((start + offset, min(chunk_size, length - offset)))
            previous.append(before)
            depths.append(depths[before] + 1 if before >= 0 else 0)
            segments.append(segment)
            before = len(spans) - 1
        last_chunks.append(before)
    order = _sort_by_depth(depths, previous)
    ranks = {chunk: rank for rank, chunk in enumerate(order)}
    waves = _list_waves(order, depths, previous, device)
    # on the host, with numpy: a GPU would have to wait for the number of tokens
    starts_N, lengths_N = np.array([spans[chunk] for chunk in order]).T
    offsets_L = np.arange(chunk_size)
    is_token_NL = offsets_L < lengths_N[:, None]
    tokens_NL = np.where(is_token_NL, starts_N[:, None] + offsets_L, 0)
    slots_T = np.empty(layout.num_tokens, np.int64)
    slots_T[tokens_NL[is_token_NL]] = np.flatnonzero(is_token_NL)
    num_roots = waves[0].chunks.stop
    return ChunkedLayout(
        tokens_NL=upload(tokens_NL, device),
        padding=upload(np.flatnonzero(~is_token_NL), device),
        slots_T=upload(slots_T, device),
        waves=waves,
        roots=upload([segments[chunk] for chunk in order[:num_roots]], device),
        last_chunks_S=upload([ranks[chunk] for chunk in last_chunks], device),
    )


def _sort_by_depth(depths: list[int], previous: list[int]) -> list[int]:
    """Return the chunks by depth. Of one depth, those that most chunks follow come first: in a
    plain pack, the chunks of a depth then follow the first ones of the depth before."""
    heights = [0] * len(depths)  # longest path that continues a chunk
    for chunk in reversed(range(len(depths))):
        if previous[chunk] >= 0:
            heights[previous[chunk]] = max(heights[previous[chunk]], heights[chunk] + 1)
    return sorted(range(len(depths)), key=lambda chunk: (depths[chunk], -heights[chunk]))


def _list_waves(
    order: list[int], depths: list[int], previous: list[int], device: torch.device
) -> tuple[Wave, ...]:
    waves: list[Wave] = []
    ranks: dict[int, int] = {}  # of the chunks of the wave before
    start = 0
    while start < len(order):
        depth = depths[order[start]]
        end = start
        while end < len(order) and depths[order[end]] == depth:
            end += 1
        chunks = order[start:end]
        first_previous = waves[-1].chunks.start if waves else 0
        waves.append(Wave(slice(start, end), None, first_previous))
        if depth:
            indices = [ranks[previous[chunk]] for chunk in chunks]
            is_first = indices == list(range(len(chunks)))
            index = slice(len(chunks)) if is_first else upload(indices, device)
            waves[-1] = Wave(slice(start, end), index, first_previous)
        ranks = {chunk: rank for rank, chunk in enumerate(chunks)}
        start = end
    return tuple(waves)


# ---------------------------------------------------------------- short convolutions


@dataclass(frozen=True, eq=False)
class Edges:
    """The tokens of a pack whose K taps are not simply the K tokens up to them."""

    tokens_E: Tensor
    taps_KE: Tensor  # the token that stands k before on the path; T if there is none


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def find_edges(layout: PackLayout, num_taps: int, device: torch.device) -> Edges:
    """Return the first `num_taps` - 1 tokens of every segment, with their taps."""
    reach = num_taps - 1
    tokens: list[int] = []
    taps: list[list[int]] = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        parent = layout.parents[segment] if layout.parents else -1
        first_tokens = list(range(start, start + min(length, reach)))
        line = [*_list_last_tokens(layout, parent, reach), *first_tokens]
        for offset, token in enumerate(first_tokens):
            tokens.append(token)
            taps.append(line[offset : offset + num_taps][::-1])
    taps_EK = upload(taps, device, torch.long).view(-1, num_taps)
    return Edges(upload(tokens, device, torch.long), taps_EK.t().contiguous())


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def list_taps(layout: PackLayout, num_taps: int) -> Tensor:
    """Return the token that stands k before each one on its path [T, K], -1 if there is none."""
    edges = find_edges(layout, num_taps, torch.device("cpu"))
    tokens_T = torch.arange(layout.num_tokens)
    taps_TK = tokens_T[:, None] - torch.arange(num_taps)
    taps_TK[edges.tokens_E] = edges.taps_KE.t()
    return taps_TK.masked_fill_(taps_TK == layout.num_tokens, -1)


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def find_tails(layout: PackLayout, count: int, device: torch.device) -> Tensor:
    """Return the last `count` tokens [S, count] on the path of each segment, T if there is none."""
    tails = [_list_last_tokens(layout, segment, count) for segment in range(len(layout.lengths))]
    return upload(tails, device, torch.long).view(len(tails), count)


def _list_last_tokens(layout: PackLayout, segment: int, count: int) -> list[int]:
    """Return the last `count` tokens of the path that ends with this segment, T where the path is
    shorter. Segment -1 is an empty path."""
    tokens: list[int] = []
    while segment >= 0 and len(tokens) < count:
        end = layout.starts[segment] + layout.lengths[segment]
        start = max(layout.starts[segment], end - (count - len(tokens)))
        tokens = [*range(start, end), *tokens]
        segment = layout.parents[segment] if layout.parents else -1
    return [layout.num_tokens] * (count - len(tokens)) + tokens


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The inputs in chunks, and what relates the tokens of a chunk to each other."""

    q: Tensor  # N G L D
    k: Tensor
    v: Tensor  # N G R L E
    beta: Tensor  # N G R L
    since_start: Tensor  # exp(a)
    until_end: Tensor  # exp(a at the end - a)
    fading: Tensor  # F [N, G, R, L, L]
    scores: Tensor  # q k^T F
    overlaps: Tensor | None  # k k^T F with the delta rule
    solution: Tensor | None  # the inverse matrix, with the delta rule

    def read_state(self, x: Tensor, state: Tensor) -> Tensor:
        """Return x S [n, G, R, L, E] of x [n, G, L, D] and states [n, G, D, R * E]."""
        return (x @ state).unflatten(-1, self.v.shape[2::2]).transpose(2, 3)

    def scale_state(self, state: Tensor, chunks: slice) -> Tensor:
        """Return states times the decay of whole chunks."""
        factors = self.since_start[chunks, :, None, :, -1:]  # n G 1 R 1
        return (state.unflatten(-1, self.v.shape[2::2]) * factors).flatten(-2)

    def solve(self, residual: Tensor, chunks: slice) -> Tensor:
        """Return u, from v or what the delta rule subtracts the state's prediction from."""
        weighted = self.beta[chunks, ..., None] * residual
        return weighted if self.solution is None else self.solution[chunks] @ weighted

    def end_state(self, u: Tensor, before: Tensor | None, chunks: slice) -> Tensor:
        """Return the states [n, G, D, R * E] at the ends of chunks."""
        keys = self.k[chunks].transpose(-1, -2)
        updates = _join_values(u * self.until_end[chunks, ..., None])
        if before is None:
            return keys @ updates
        return self.scale_state(before, chunks).add_(keys @ updates)


def _split_values(x_TGRE: Tensor, chunks: ChunkedLayout) -> Tensor:
    """Return tokens in chunks [N, G, R, L, E], contiguous for the products."""
    return chunks.split(x_TGRE).permute(0, 2, 3, 1, 4).contiguous()


def _join_values(x: Tensor) -> Tensor:
    """Turn [n, G, R, L, E] into [n, G, L, R * E]."""
    return x.transpose(2, 3).flatten(-2)


def _prepare_chunks(
    qkv: QKV, decay_TGR: Tensor, beta_TGR: Tensor, chunks: ChunkedLayout, is_delta_rule: bool
) -> _Chunks:
    q, k = (chunks.split(x).transpose(1, 2).contiguous() for x in qkv[:2])
    v = _split_values(qkv[2], chunks)
    decay, beta = (chunks.split(x).permute(0, 2, 3, 1) for x in (decay_TGR, beta_TGR))
    log_decay = ops.cumsum(decay)
    chunk_size = q.shape[2]
    is_later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).triu(1)
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    fading = difference.masked_fill_(is_later, float("-inf")).exp_()
    overlaps = None
    solution = None
    if is_delta_rule:
        overlaps = (k @ k.transpose(-1, -2))[:, :, None] * fading
        identity = torch.eye(chunk_size, dtype=q.dtype, device=q.device)
        # reads what is below the diagonal
        solution = torch.linalg.solve_triangular(
            overlaps * beta[..., None], identity, upper=False, unitriangular=True
        )
    return _Chunks(
        q=q,
        k=k,
        v=v,
        beta=beta,
        since_start=log_decay.exp(),
        until_end=(log_decay[..., -1:] - log_decay).exp(),
        fading=fading,
        scores=(q @ k.transpose(-1, -2))[:, :, None] * fading,
        overlaps=overlaps,
        solution=solution,
    )


def run_chunks(
    qkv: QKV,
    decay_TGR: Tensor,
    beta_TGR: Tensor,
    chunks: ChunkedLayout,
    is_delta_rule: bool,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs [T, G, R, E] and the states [n, G, D, R * E] at the ends of the chunks of
    each wave. Not differentiable: `run_chunks_backward` has the gradients.

    `initial_state` [S, G, D, R * E] is where the roots start; zeros by default."""
    x = _prepare_chunks(qkv, decay_TGR, beta_TGR, chunks, is_delta_rule)
    out = torch.empty_like(x.v)
    states: list[Tensor] = []
    for wave in chunks.waves:
        here = wave.chunks
        residual = x.v[here]
        before = None
        if wave.previous is not None:
            before = states[-1][wave.previous]
        elif initial_state is not None:
            before = initial_state[chunks.roots]
        if before is not None and is_delta_rule:
            predicted = x.read_state(x.k[here], before)
            residual = residual - predicted.mul(x.since_start[here, ..., None])
        u = x.solve(residual, here)
        torch.matmul(x.scores[here], u, out=out[here])
        if before is not None:
            read = x.read_state(x.q[here], before)
            out[here].addcmul_(read, x.since_start[here, ..., None])
        states.append(x.end_state(u, before, here))
    return chunks.join(out.permute(0, 3, 1, 2, 4)), states


def step_rows(
    qkv: QKV, decay_BGR: Tensor, beta_BGR: Tensor, state: Tensor, is_delta_rule: bool
) -> Tensor:
    """Apply the recurrence to one token per row; returns [B, G, R, E] and updates the state."""
    q, k, v = qkv
    state.unflatten(-1, v.shape[2:]).mul_(decay_BGR.exp()[:, :, None, :, None])
    if is_delta_rule:
        v = v - (k[:, :, None] @ state).view(v.shape)
    update = (beta_BGR[..., None] * v).flatten(-2)
    state.add_(k[..., None] * update[:, :, None])
    return (q[:, :, None] @ state).view(v.shape)


# ---------------------------------------------------------------- gradients


@dataclass(frozen=True, eq=False)
class _WaveTrace:
    """The states before the chunks of a wave, and what q and k read from them; None for roots."""

    before: Tensor | None
    read: Tensor | None  # n G R L E
    predicted: Tensor | None


def _recompute_waves(
    x: _Chunks, chunks: ChunkedLayout, is_delta_rule: bool
) -> tuple[list[_WaveTrace], Tensor, Tensor]:
    """Run the recurrence again without its outputs. Returns a trace per wave, and for all chunks
    the residuals and u [N, G, R, L, E]."""
    traces: list[_WaveTrace] = []
    residuals = x.v.clone() if is_delta_rule else x.v
    u = torch.empty_like(x.v)
    state = None
    for index, wave in enumerate(chunks.waves):
        here = wave.chunks
        before = None
        read = None
        predicted = None
        if wave.previous is not None and state is not None:
            before = state[wave.previous]
            read = x.read_state(x.q[here], before)
            if is_delta_rule:
                predicted = x.read_state(x.k[here], before)
                residuals[here] -= predicted * x.since_start[here, ..., None]
        u[here] = x.solve(residuals[here], here)
        traces.append(_WaveTrace(before, read, predicted))
        if index + 1 < len(chunks.waves):
            state = x.end_state(u[here], before, here)
    return traces, residuals, u


def run_chunks_backward(
    dout_TGRE: Tensor,
    qkv: QKV,
    decay_TGR: Tensor,
    beta_TGR: Tensor,
    chunks: ChunkedLayout,
    is_delta_rule: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, decay and beta from that of the outputs."""
    x = _prepare_chunks(qkv, decay_TGR, beta_TGR, chunks, is_delta_rule)
    traces, residuals, u = _recompute_waves(x, chunks, is_delta_rule)
    grads = _ChunkGrads(x, u, _split_values(dout_TGRE, chunks))
    dafter = None  # of the states at the ends of a wave's chunks
    for wave, trace in zip(reversed(chunks.waves), reversed(traces), strict=True):
        dbefore = grads.add_wave(wave.chunks, trace, dafter)
        dafter = None
        if dbefore is not None and wave.previous is not None:
            num_previous = wave.chunks.start - wave.first_previous
            dafter = dbefore.new_zeros(num_previous, *dbefore.shape[1:])
            if isinstance(wave.previous, slice):
                dafter[wave.previous] = dbefore
            else:
                dafter.index_add_(0, wave.previous, dbefore)
    grads.add_inside(residuals)
    ddecay = ops.cumsum(grads.dlog_decay.flip(-1)).flip(-1)
    dq, dk = (chunks.join(grad.transpose(1, 2)) for grad in (grads.dq, grads.dk))
    dv = chunks.join(grads.dresidual.permute(0, 3, 1, 2, 4))
    ddecay, dbeta = (chunks.join(grad.permute(0, 3, 1, 2)) for grad in (ddecay, grads.dbeta))
    return dq, dk, dv, ddecay, dbeta


class _ChunkGrads:
    """The gradients of a pack's chunks, summed up wave by wave from the last one."""

    def __init__(self, x: _Chunks, u: Tensor, dout: Tensor) -> None:
        self.x = x
        self.u = u
        self.dout = dout
        self.du = x.scores.transpose(-1, -2) @ dout
        self.dweighted = self.du if x.solution is None else torch.empty_like(self.du)
        self.dresidual = torch.empty_like(self.du)
        self.dq = torch.zeros_like(x.q)
        self.dk = torch.zeros_like(x.k)
        self.dbeta = torch.zeros_like(x.beta)
        self.dlog_decay = torch.zeros_like(x.beta)  # of a, before it becomes that of g

    def add_wave(self, here: slice, trace: _WaveTrace, dafter: Tensor | None) -> Tensor | None:
        """Add what passes through the states of a wave, and return the gradient of the states
        before it, None if there are none. The waves after it come first."""
        x = self.x
        if dafter is not None:
            self._add_end_state(here, trace, dafter)
        if x.solution is not None:
            self.dweighted[here] = x.solution[here].transpose(-1, -2) @ self.du[here]
        self.dresidual[here] = x.beta[here, ..., None] * self.dweighted[here]
        if trace.before is None or trace.read is None:
            return None
        states_DE = trace.before.transpose(-1, -2)
        dread = x.since_start[here, ..., None] * self.dout[here]
        self.dlog_decay[here] += (dread * trace.read).sum(-1)
        dread = _join_values(dread)
        self.dq[here] += dread @ states_DE
        dbefore = x.q[here].transpose(-1, -2) @ dread
        if trace.predicted is not None:
            dpredicted = -x.since_start[here, ..., None] * self.dresidual[here]
            self.dlog_decay[here] += (dpredicted * trace.predicted).sum(-1)
            dpredicted = _join_values(dpredicted)
            self.dk[here] += dpredicted @ states_DE
            dbefore += x.k[here].transpose(-1, -2) @ dpredicted
        return dbefore if dafter is None else dbefore.add_(x.scale_state(dafter, here))

    def _add_end_state(self, here: slice, trace: _WaveTrace, dafter: Tensor) -> None:
        x = self.x
        updates = self.u[here] * x.until_end[here, ..., None]
        self.dk[here] += _join_values(updates) @ dafter.transpose(-1, -2)
        dupdates = x.read_state(x.k[here], dafter)
        dlog = (dupdates * updates).sum(-1)  # of the decay from each token to the end
        self.du[here] += dupdates * x.until_end[here, ..., None]
        dend = dlog.sum(-1)
        if trace.before is not None:
            products = (dafter * trace.before).unflatten(-1, x.v.shape[2::2])
            dend = dend + products.sum((2, 4)) * x.since_start[here, ..., -1]
        self.dlog_decay[here] -= dlog
        self.dlog_decay[here, ..., -1] += dend

    def add_inside(self, residuals: Tensor) -> None:
        """Add what passes between the tokens of each chunk."""
        x = self.x
        dscores = self.dout @ self.u.transpose(-1, -2)
        self._add_fading(dscores * x.scores)
        dproducts = (dscores * x.fading).sum(2)
        self.dq += dproducts @ x.k
        self.dk += dproducts.transpose(-1, -2) @ x.q
        self.dbeta += (self.dweighted * residuals).sum(-1)
        if x.overlaps is None:
            return
        dsystem = (self.dweighted @ self.u.transpose(-1, -2)).tril_(-1).neg_()
        doverlaps = dsystem * x.beta[..., None]
        self.dbeta += (dsystem * x.overlaps).sum(-1)
        self._add_fading(doverlaps * x.overlaps)
        dproducts = (doverlaps * x.fading).sum(2)
        self.dk += (dproducts + dproducts.transpose(-1, -2)) @ x.k

    def _add_fading(self, dlog_fading: Tensor) -> None:
        self.dlog_decay += dlog_fading.sum(-1)
        self.dlog_decay -= dlog_fading.sum(-2)
