"""The causal convolution of a few taps, channel by channel, and the mixer that is nothing else.

    y_t = sum_k w_(K-1-k) x_(t-k) + b, where t - k counts back along the path of the token

In: inputs [T, C] and a PackLayout. Out: outputs [T, C]. All but the first tokens of a segment read
the tokens before them, so the pack is convolved as a whole and those rows are then replaced; no
value of another document remains in them. Products and sums are fp32 or wider. Generation passes
the last K - 1 inputs of each row, which stand before its tokens like a parent segment.

Legend: T tokens, B rows of generation, C channels, K taps, E edge tokens, H hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.types import PackLayout
from tunesmith.model.lora import project
from tunesmith.model.mixers.recurrence import Edges, find_edges, find_tails
from tunesmith.model.paged_cache import PagedKVCache


def gather_rows(x_TC: Tensor, index: Tensor) -> Tensor:
    """Return rows of x, zeros for the index T."""
    rows = x_TC[index.clamp(max=len(x_TC) - 1)]
    return rows.masked_fill((index == len(x_TC))[..., None], 0)


def convolve(x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, edges: Edges) -> Tensor:
    """Return the convolution in fp32 or wider. `convolve_backward` has its gradient."""
    dtype = torch.promote_types(x_TC.dtype, torch.float32)
    x_TC = x_TC.to(dtype)
    taps_KC = weight_CK.to(dtype).flip(1).t().contiguous()  # by how far each looks back
    y_TC = x_TC * taps_KC[0]
    for k in range(1, len(taps_KC)):
        y_TC[k:].addcmul_(x_TC[:-k], taps_KC[k])
    rows_KEC = gather_rows(x_TC, edges.taps_KE)
    y_TC[edges.tokens_E] = (rows_KEC * taps_KC[:, None]).sum(0)
    return y_TC if bias_C is None else y_TC.add_(bias_C.to(dtype))


def convolve_backward(dy_TC: Tensor, weight_CK: Tensor, edges: Edges) -> Tensor:
    """Return the gradient of x in the dtype of dy, which is fp32 or wider."""
    taps_KC = weight_CK.to(dy_TC.dtype).flip(1).t().contiguous()
    num_tokens = len(dy_TC)
    dy_EC = dy_TC[edges.tokens_E]
    inner_TC = dy_TC.index_fill(0, edges.tokens_E, 0)
    dx_TC = dy_TC.new_zeros(num_tokens + 1, dy_TC.shape[1])  # the last row takes what has no tap
    for k, taps_C in enumerate(taps_KC):
        dx_TC[: max(num_tokens - k, 0)].addcmul_(inner_TC[k:], taps_C)
        dx_TC.index_add_(0, edges.taps_KE[k], dy_EC * taps_C)
    return dx_TC[:num_tokens]


def compute_weight_grad(dy_TC: Tensor, x_TC: Tensor, num_taps: int, edges: Edges) -> Tensor:
    """Return the gradient of the weight [C, K] in the dtype of dy."""
    x_TC = x_TC.to(dy_TC.dtype)
    dy_EC = dy_TC[edges.tokens_E]
    inner_TC = dy_TC.index_fill(0, edges.tokens_E, 0)
    dtaps_KC = (dy_EC * gather_rows(x_TC, edges.taps_KE)).sum(1)
    for k in range(num_taps):
        before_TC = x_TC[: max(len(x_TC) - k, 0)]
        dtaps_KC[k] += torch.einsum("tc,tc->c", inner_TC[k:], before_TC)
    return dtaps_KC.flip(0).t()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, edges: Edges
    ) -> Tensor:
        ctx.edges = edges
        ctx.save_for_backward(x_TC, weight_CK)
        return convolve(x_TC, weight_CK, bias_C, edges).to(x_TC.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, weight_CK = ctx.saved_tensors
        dy_TC = gradients[0].to(torch.promote_types(gradients[0].dtype, torch.float32))
        dx_TC = convolve_backward(dy_TC, weight_CK, ctx.edges).to(x_TC.dtype)
        dweight_CK = None
        if ctx.needs_input_grad[1]:
            dweight_CK = compute_weight_grad(dy_TC, x_TC, weight_CK.shape[1], ctx.edges)
            dweight_CK = dweight_CK.to(weight_CK.dtype)
        dbias_C = dy_TC.sum(0) if ctx.needs_input_grad[2] else None
        return dx_TC, dweight_CK, dbias_C, None


def convolve_pack(
    x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, layout: PackLayout
) -> Tensor:
    """Return the convolution along every path of a pack, differentiable."""
    edges = find_edges(layout, weight_CK.shape[1], x_TC.device)
    return _Convolution.apply(x_TC, weight_CK, bias_C, edges)


def continue_convolution(
    x_TC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    layout: PackLayout,
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the convolution of new tokens of B rows in fp32 or wider, and the last K - 1 inputs
    [B, K - 1, C] of each row.

    Segment b of `layout` has the new tokens of row b; `history` has the inputs before them, None if
    the rows start here."""
    num_tokens = len(x_TC)
    num_rows = len(layout.lengths)
    num_taps = weight_CK.shape[1]
    if history is not None and num_taps > 1:
        x_TC = torch.cat([history.flatten(0, 1).to(x_TC.dtype), x_TC])
        layout = _add_history(layout, num_taps - 1)
    y_TC = convolve(x_TC, weight_CK, bias_C, find_edges(layout, num_taps, x_TC.device))
    tails = find_tails(layout, num_taps - 1, x_TC.device)[-num_rows:]
    return y_TC[len(x_TC) - num_tokens :], gather_rows(x_TC, tails)


def _add_history(layout: PackLayout, length: int) -> PackLayout:
    """Return a layout in which every segment continues `length` tokens of its own."""
    assert not layout.parents, "rows of generation are roots"
    count = len(layout.lengths)
    return PackLayout(
        starts=(
            *range(0, count * length, length),
            *(start + count * length for start in layout.starts),
        ),
        lengths=(*(length,) * count, *layout.lengths),
        parents=(*(-1,) * count, *range(count)),
    )


def count_history_bytes(convolution: nn.Conv1d, dtype: torch.dtype) -> int:
    """Return the bytes of the last K - 1 inputs, which a row of generation keeps."""
    num_channels, _, num_taps = convolution.weight.shape
    return num_channels * (num_taps - 1) * dtype.itemsize


class ShortConvolution(nn.Module):
    """The mixer of LFM2: out_proj(c * convolution(b * x)), where b, c and x come from one
    projection.

    In training only the projection's output is saved; the rest runs again in the backward."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.in_proj = stock.in_proj
        self.out_proj = stock.out_proj
        self.conv = stock.conv

    def count_state_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that a row of generation keeps."""
        return count_history_bytes(self.conv, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: PackLayout,
        kv_cache: PagedKVCache | None = None,
        **_others: object,
    ) -> Tensor:
        (bcx,) = project(hidden_states[0], [self.in_proj])
        if kv_cache is not None:
            y_TH = self._continue_rows(bcx, layout, kv_cache)
        elif not bcx.requires_grad:  # below the first adapter, where a checkpoint would save it
            y_TH = self._mix(bcx, layout)
        else:
            y_TH = checkpoint(self._mix, bcx, layout, use_reentrant=False, preserve_rng_state=False)
        return project(y_TH, [self.out_proj])[0][None]

    def _mix(self, bcx: Tensor, layout: PackLayout) -> Tensor:
        b, c, x = bcx.chunk(3, dim=-1)
        return c * convolve_pack(b * x, self.conv.weight[:, 0], self.conv.bias, layout)

    def _continue_rows(self, bcx: Tensor, layout: PackLayout, kv_cache: PagedKVCache) -> Tensor:
        b, c, x = bcx.chunk(3, dim=-1)
        states = kv_cache.get_states(self)
        history = states[0] if states else None
        weight_CK = self.conv.weight[:, 0]
        y_TH, history = continue_convolution(b * x, weight_CK, self.conv.bias, layout, history)
        kv_cache.put_states(self, (history,))
        return c * y_TH.to(c.dtype)
