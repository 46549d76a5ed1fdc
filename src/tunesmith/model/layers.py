"""The modules that stand in for a transformers model's own: norm, attention and MLP, with the stock model as oracle.

`replace_layers` swaps them in the module tree, in plain sight, where the stock class is one of those listed; what it
does not know stays stock. Preflight then shows that the whole forward equals the stock one.
Legend: T tokens, H hidden, D head size, F MLP width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.types import Layout
from tunesmith.model.attention import Rule, attend
from tunesmith.model.kernels import ops
from tunesmith.model.kv_cache import RowCache
from tunesmith.model.lora import Group, prepared, project
from tunesmith.model.new_embeddings import rows_of


class Norm(nn.Module):
    """RMSNorm; `offset` is 1 where the checkpoint stores weight - 1 (Gemma)."""

    def __init__(self, stock: Any, *, offset: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = stock.weight
        self.eps = float(stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.offset:
            return ops.rms_norm(x, self.weight, self.eps)
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # the sum would be rounded in bf16
        return ops.rms_norm(x, self.weight.to(wide) + self.offset, self.eps)


class Attention(nn.Module):
    """Self-attention over a Layout: projections, optional norms of q and k, rotation, attend, output projection.
    `rows` (a RowCache) also stores k and v, and attends to what it holds. Without a layout it cannot be called."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.head_dim: int = stock.head_dim
        self.rule = Rule(
            scale=float(stock.scaling),
            window=getattr(stock, "sliding_window", getattr(stock.config, "sliding_window", None)),
            softcap=getattr(stock, "attn_logit_softcapping", None),
        )
        self.prunes = False  # the last layer's: its output is needed at the `kept` positions only

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        layout: Layout,
        backend: str = "auto",
        rows: RowCache | None = None,
        kept: Tensor | None = None,
        **_others: object,
    ) -> tuple[Tensor, None]:
        projected = project(hidden_states[0], [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        angles = half_angles(*position_embeddings)
        if rows is None:
            out_TND = attend(q, k, v, layout, self.rule, backend, angles)
        else:
            out_TND = rows.attend(self, q, k, v, layout, self.rule, backend, angles)
        if self.prunes and kept is not None:
            out_TND = out_TND.index_select(0, kept)
        (y_TH,) = project(out_TND.flatten(-2), [self.o_proj])
        return y_TH[None], None


def half_angles(cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """The stock [1, T, D] tables repeat each half; ours are [T, D/2] in fp32 or wider."""
    half = cosine.shape[-1] // 2
    wide = torch.promote_types(cosine.dtype, torch.float32)
    return cosine[0, :, :half].to(wide).contiguous(), sine[0, :, :half].to(wide).contiguous()


class _GatedMlp(torch.autograd.Function):
    """down(activation(gate x) * up x). Saves x, gate and up, with `again` x alone; what else the backward needs is
    computed anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Group, last: Group, gelu: bool, again: bool, *_parameters: Tensor | None
    ) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        (gate, up), inner = first.forward(x_NH)
        (y,), inner_last = last.forward(ops.gated(gate, up, gelu))
        ctx.first, ctx.last, ctx.gelu, ctx.shape, ctx.of_last = first, last, gelu, x.shape, len(inner_last)
        ctx.again = again
        ctx.save_for_backward(x_NH, *inner_last, *(() if again else (gate, up, *inner)))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first: Group = ctx.first
        last: Group = ctx.last
        x_NH, *saved = ctx.saved_tensors
        inner_last, rest = saved[: ctx.of_last], saved[ctx.of_last :]
        if ctx.again:
            outputs, inner = first.forward(x_NH)
            rest = [*outputs, *inner]
        gate, up, *inner = rest
        dy = [gradients[0].reshape(len(x_NH), -1)]
        dy, dz, outer = last.outputs_backward(dy, inner_last)
        dproduct = last.input_gradient(dy, dz)
        *dboth, product_NF = ops.gated_backward(gate, up, dproduct, ctx.gelu)
        of_last = last.parameter_gradients(product_NF, dy, dz, outer)
        dboth, dz, outer = first.outputs_backward(dboth, inner)
        dx = first.input_gradient(dboth, dz).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return (dx, None, None, None, None, *first.parameter_gradients(x_NH, dboth, dz, outer), *of_last)


class Mlp(nn.Module):
    def __init__(self, stock: Any, *, gelu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = stock.gate_proj, stock.up_proj, stock.down_proj
        self.gelu, self.again = gelu, False

    def forward(self, x: Tensor) -> Tensor:
        first, last = prepared([self.gate_proj, self.up_proj], x.dtype), prepared([self.down_proj], x.dtype)
        return _GatedMlp.apply(x, first, last, self.gelu, self.again, *first.parameters, *last.parameters)


class LastLayer(nn.Module):
    """A pre-norm decoder layer whose output is computed at the `kept` positions only: nothing above it needs the rest.
    Keys and values are still of all tokens."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = stock.self_attn, stock.mlp
        self.input_layernorm, self.post_attention_layernorm = stock.input_layernorm, stock.post_attention_layernorm
        self.residual_multiplier = float(getattr(stock, "residual_multiplier", 1.0))
        self.self_attn.prunes = True

    def forward(self, hidden_states: Tensor, kept: Tensor | None = None, **kwargs: Any) -> Tensor:
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), kept=kept, **kwargs)
        residual = hidden_states if kept is None else hidden_states.index_select(1, kept)
        residual = torch.add(residual, out, alpha=self.residual_multiplier)
        out = self.mlp(self.post_attention_layernorm(residual))
        return torch.add(residual, out, alpha=self.residual_multiplier)


def prune_last(layers: nn.ModuleList) -> bool:
    """Makes the last decoder layer a LastLayer where its stock form is known to be the plain pre-norm one."""
    last = layers[-1]
    known = type(last).__name__ in PRUNED and isinstance(last.self_attn, Attention)
    if known:
        layers[-1] = LastLayer(last)
    return known


def keep_less(layers: Sequence[Any], activations: str) -> None:
    """What the backward finds of the forward. keep: all; selective: not gate and up, which are computed anew;
    recompute: the inputs of the layers, each of which runs again with the same Layout. The last layer's backward comes
    first, so what it keeps is gone before others need the room."""
    for layer in layers:
        if activations == "selective" and isinstance(mlp := getattr(layer, "mlp", None), Mlp):
            mlp.again = True
    for layer in layers[:-1] if activations == "recompute" else []:
        layer.gradient_checkpointing = True  # transformers' own switch; it runs with gradients in training mode only
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


class Embedding(nn.Module):
    """The stock embedding, its output in the compute dtype: the stream's dtype decides what every product runs in.
    Rows of new tokens may be trained."""

    def __init__(self, stock: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.stock, self.weight, self.dtype = stock, stock.weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        new = rows_of(self.stock)
        if new is None:
            return self.stock(ids).to(self.dtype)
        new.put(self.weight)
        out: Tensor = self.stock(ids)
        if torch.is_grad_enabled():
            out = new.looked_up(ids, out, getattr(self.stock, "embed_scale", 1.0))
        return out.to(self.dtype)


# ---------------------------------------------------------------- which stock modules are replaced

PRE_NORM_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite")
NORM_OFFSETS = {f"{family}RMSNorm": 0.0 for family in PRE_NORM_FAMILIES} | {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
}
FAMILIES = (*PRE_NORM_FAMILIES, "Gemma", "Gemma2", "Gemma3")
PRUNED = tuple(f"{family}DecoderLayer" for family in PRE_NORM_FAMILIES)
ATTENTIONS = tuple(f"{family}Attention" for family in FAMILIES)
MLPS = tuple(f"{family}MLP" for family in FAMILIES)
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


def stand_in(stock: Any) -> nn.Module | None:
    """tunesmith's module for a stock one, or None where the stock one stays."""
    name = type(stock).__name__
    if name in NORM_OFFSETS:
        return Norm(stock, offset=NORM_OFFSETS[name])
    if name in ATTENTIONS:
        return Attention(stock)
    if name in MLPS:
        config = stock.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        return Mlp(stock, gelu=ACTIVATIONS[activation]) if activation in ACTIVATIONS else None
    return None


def replace_layers(network: nn.Module) -> int:
    """Puts tunesmith's modules in the place of the stock ones they equal, children first; returns how many."""
    replaced = 0
    for parent in reversed(list(network.modules())):
        for name, child in list(parent.named_children()):
            replacement = stand_in(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                replaced += 1
    return replaced
