"""Gated DeltaNet over a PackLayout: the linear attention of Qwen3.5, Qwen3-Next and OLMo Hybrid.

In: hidden states of a pack. Out: the mixer's output. Projections of the input, a short convolution
and the gated delta rule (scan.py), a gated norm, the output projection. The three families differ
in their projections only. Every parameter keeps its stock name. Generation keeps the last inputs of
the convolution and the state of each row in the cache.

Legend: T tokens, C channels of the convolution, H heads of v, D key size, E value size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.types import PackLayout
from tunesmith.model.lora import project
from tunesmith.model.mixers.convolution import count_history_bytes
from tunesmith.model.mixers.scan import ScanInputs, ScanShape, continue_rows, scan_pack
from tunesmith.model.paged_cache import PagedKVCache


class GatedDeltaNet(nn.Module):
    """The mixer of Qwen3.5, dense and with experts."""

    input_names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    output_name = "out_proj"
    norm_name = "norm"

    def __init__(self, stock: Any) -> None:
        super().__init__()
        for name in (*self.input_names, self.norm_name, self.output_name):
            setattr(self, name, getattr(stock, name))
        self.conv1d: nn.Conv1d = stock.conv1d
        self.A_log: nn.Parameter = stock.A_log
        self.dt_bias: nn.Parameter = stock.dt_bias
        self.shape = ScanShape(
            num_groups=stock.num_k_heads,
            heads_per_group=stock.num_v_heads // stock.num_k_heads,
            key_size=stock.head_k_dim,
            value_size=stock.head_v_dim,
            is_delta_rule=True,
        )
        # OLMo Hybrid: strengths up to 2 make the state change sign
        self.beta_factor = 2.0 if getattr(stock, "allow_neg_eigval", False) else 1.0

    def count_state_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that a row of generation keeps."""
        return count_state_bytes(self.conv1d, self.shape, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: PackLayout,
        kv_cache: PagedKVCache | None = None,
        **_others: object,
    ) -> Tensor:
        mixed_TC, gate, b_TH, a_TH = self.project_inputs(hidden_states[0])
        dtype = torch.promote_types(mixed_TC.dtype, torch.float32)
        rate_TH = F.softplus(a_TH.to(dtype) + self.dt_bias.to(dtype))
        inputs = ScanInputs(
            mixed_TC=mixed_TC,
            weight_CK=self.conv1d.weight[:, 0],
            bias_C=self.conv1d.bias,
            decay_TH=-self.A_log.to(dtype).exp() * rate_TH,
            beta_TH=b_TH.to(dtype).sigmoid() * self.beta_factor,
            skip_H=None,
        )
        out = run_scan(self, inputs, self.shape, layout, kv_cache)
        out = out.unflatten(-1, (-1, self.shape.value_size)).flatten(0, 1)
        normed = run_norm(getattr(self, self.norm_name), out, gate.reshape(out.shape))
        normed_TV = normed.to(mixed_TC.dtype).view(len(mixed_TC), -1)
        return project(normed_TV, [getattr(self, self.output_name)])[0][None]

    def project_inputs(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the inputs of the convolution [T, C], the gate of the norm [T, H * E], and what
        gives strength and decay [T, H]."""
        mixed_TC, gate, b_TH, a_TH = project(x_TH, [getattr(self, n) for n in self.input_names])
        return mixed_TC, gate, b_TH, a_TH


class Qwen3NextDeltaNet(GatedDeltaNet):
    """The mixer of Qwen3-Next: the outputs of two projections are interleaved by key head."""

    input_names = ("in_proj_qkvz", "in_proj_ba")

    def project_inputs(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        qkvz, ba = project(x_TH, [getattr(self, n) for n in self.input_names])
        shape = self.shape
        values = shape.heads_per_group * shape.value_size
        sizes = (shape.key_size, shape.key_size, values, values)
        q, k, v, gate = qkvz.unflatten(-1, (shape.num_groups, -1)).split(sizes, -1)
        b, a = ba.unflatten(-1, (shape.num_groups, -1)).chunk(2, -1)
        mixed_TC = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], -1)
        # a view would keep all of the projection until the backward
        return mixed_TC, gate.contiguous(), b.flatten(1), a.flatten(1)


class OlmoHybridDeltaNet(GatedDeltaNet):
    """The mixer of OLMo Hybrid: a projection for each input."""

    input_names = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    output_name = "o_proj"
    norm_name = "o_norm"

    def project_inputs(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, gate, b_TH, a_TH = project(x_TH, [getattr(self, n) for n in self.input_names])
        return torch.cat([q, k, v], -1), gate, b_TH, a_TH


# ---------------------------------------------------------------- what Mamba2 shares


def run_scan(
    mixer: nn.Module,
    inputs: ScanInputs,
    shape: ScanShape,
    layout: PackLayout,
    kv_cache: PagedKVCache | None,
) -> Tensor:
    """Return the outputs [T, H * E] of a pack, or of the rows that the cache extends."""
    if kv_cache is None:
        return scan_pack(inputs, shape, layout)
    out, states = continue_rows(inputs, shape, layout, kv_cache.get_states(mixer))
    kv_cache.put_states(mixer, states)
    return out


def run_norm(norm: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """Apply a stock norm, which saves its inputs only, and nothing below the first adapter."""
    if not x.requires_grad:
        return norm(x, gate)
    return checkpoint(norm, x, gate, use_reentrant=False, preserve_rng_state=False)


def count_state_bytes(convolution: nn.Conv1d, shape: ScanShape, dtype: torch.dtype) -> int:
    """Return the bytes of the last inputs of a convolution, in `dtype`, and of a state."""
    state_size = torch.promote_types(dtype, torch.float32).itemsize
    history_bytes = count_history_bytes(convolution, dtype)
    return history_bytes + shape.count_state_values() * state_size
