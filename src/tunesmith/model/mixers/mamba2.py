"""Mamba2 over a PackLayout: the mixer of Granite 4 hybrids, Falcon-H1, Nemotron-H, Bamba.

In: hidden states of a pack. Out: the mixer's output. One projection of the input, a short
convolution and the recurrence (scan.py) with q = C, k = B and v = x, a norm with a gate or the gate
alone, the output projection. Every parameter keeps its stock name. transformers' training path with
mamba_ssm reads the weight of out_proj behind an adapter's back; this one has no such path.

Legend: T tokens, C channels of the convolution, H heads, E size of a head, P outputs of the
projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.types import PackLayout
from tunesmith.model.lora import project
from tunesmith.model.mixers.gated_delta import count_state_bytes, run_norm, run_scan
from tunesmith.model.mixers.scan import ScanInputs, ScanShape
from tunesmith.model.paged_cache import PagedKVCache


class Mamba2Mixer(nn.Module):
    """Falcon-H1 multiplies the input and the parts of the projection, and may have no norm."""

    mup_vector: Tensor | None  # [1, 1, P]

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.in_proj = stock.in_proj
        self.out_proj = stock.out_proj
        self.conv1d = stock.conv1d
        self.norm: nn.Module = stock.norm
        self.A_log: nn.Parameter = stock.A_log
        self.dt_bias: nn.Parameter = stock.dt_bias
        self.D: nn.Parameter = stock.D
        self.sizes: tuple[int, ...] = (stock.intermediate_size, stock.conv_dim, stock.num_heads)
        self.step_limits: tuple[float, float] = stock.time_step_limit
        self.shape = ScanShape(
            num_groups=stock.n_groups,
            heads_per_group=stock.num_heads // stock.n_groups,
            key_size=stock.ssm_state_size,
            value_size=stock.head_dim,
            is_delta_rule=False,
        )
        self.input_factor = float(getattr(stock, "ssm_in_multiplier", 1.0))
        factors = getattr(stock, "mup_vector", None)
        self.register_buffer("mup_vector", factors, persistent=False)

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
        x_TH = hidden_states[0]
        if self.input_factor != 1:
            x_TH = x_TH * self.input_factor
        (projected_TP,) = project(x_TH, [self.in_proj])
        if self.mup_vector is not None:
            projected_TP = projected_TP * self.mup_vector[0].to(projected_TP.dtype)
        gate, mixed_TC, step_TH = projected_TP.split(self.sizes, -1)
        dtype = torch.promote_types(mixed_TC.dtype, torch.float32)
        step_TH = F.softplus(step_TH.to(dtype) + self.dt_bias.to(dtype)).clamp(*self.step_limits)
        inputs = ScanInputs(
            mixed_TC=mixed_TC,
            weight_CK=self.conv1d.weight[:, 0],
            bias_C=self.conv1d.bias,
            decay_TH=-self.A_log.to(dtype).exp() * step_TH,
            beta_TH=step_TH,
            skip_H=self.D.to(dtype),
        )
        out = run_scan(self, inputs, self.shape, layout, kv_cache)
        if isinstance(self.norm, nn.Identity):
            out = out * F.silu(gate)
        else:
            out = run_norm(self.norm, out[None], gate[None])[0].to(mixed_TC.dtype)
        return project(out, [self.out_proj])[0][None]
