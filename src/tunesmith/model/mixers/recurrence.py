"""The recurrence of Gated DeltaNet and Mamba2 over the chunks of a pack, and its gradients.

    S_t = exp(g_t) S_(t-1) + k_t u_t        o_t = q_t S_t
    u_t = beta_t (v_t - exp(g_t) k_t S_(t-1))   delta rule (Gated DeltaNet)
    u_t = beta_t v_t                            otherwise (Mamba2)

In: q, k, v, decays g and strengths beta of a pack, fp32 or wider. Out: o. A segment starts with the
state at the end of its parent, a root with zeros. Inside a chunk, where a_i is the sum of g up to
token i and F_ij = exp(a_i - a_j) for j <= i, it is a product of triangular matrices:

    u = (1 + tril(beta k k^T F, -1))^-1 beta (v - exp(a) k S)      o = (q k^T F) u + exp(a) q S

From chunk to chunk it runs in waves (chunks.py). Source: Yang et al., Gated Delta Networks, arXiv
2412.06464, section 3.3; Dao and Gu, Mamba2, arXiv 2405.21060, section 6. Legend: T tokens, G heads
of q and k, R heads of v for each of them, D key size, E value size, N chunks, n chunks of a wave, L
tokens of a chunk, S segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model.kernels import ops
from tunesmith.model.mixers.chunks import ChunkedLayout

QKV = tuple[Tensor, Tensor, Tensor]  # q, k [T, G, D], v [T, G, R, E]


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
