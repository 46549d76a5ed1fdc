"""The modules that stand in for a transformers model's own: norm, attention and MLP, with the stock
model as oracle.

`replace_layers` swaps them in the module tree, in plain sight, where the stock class is one of
those listed; what it does not know stays stock. Preflight then shows that the whole forward equals
the stock one. Legend: T tokens, H hidden, D head size, F MLP width."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.core.types import PackLayout
from tunesmith.model.attention import AttentionConfig, attend
from tunesmith.model.kernels import ops
from tunesmith.model.kv_cache import RaggedKVCache
from tunesmith.model.lora import LinearGroup, prepare_group, project
from tunesmith.model.new_embeddings import get_new_rows


class RMSNorm(nn.Module):
    """RMSNorm; `offset` is 1 where the checkpoint stores weight - 1 (Gemma)."""

    def __init__(self, stock: Any, *, offset: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = stock.weight
        self.eps = float(
            stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps
        )
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.offset:
            return ops.rms_norm(x, self.weight, self.eps)
        accum_dtype = torch.promote_types(
            self.weight.dtype, torch.float32
        )  # the sum would be rounded in bf16
        return ops.rms_norm(x, self.weight.to(accum_dtype) + self.offset, self.eps)


class Attention(nn.Module):
    """Self-attention over a Layout: projections, optional norms of q and k, rotation, attend,
    output projection. `rows` (a RowCache) also stores k and v, and attends to what it holds.
    Without a layout it cannot be called."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            stock.q_proj,
            stock.k_proj,
            stock.v_proj,
            stock.o_proj,
        )
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.head_dim: int = stock.head_dim
        self.attention_config = AttentionConfig(
            scale=float(stock.scaling),
            window=getattr(stock, "sliding_window", getattr(stock.config, "sliding_window", None)),
            softcap=getattr(stock, "attn_logit_softcapping", None),
        )
        # the last layer's: its output is needed at the `kept` positions only
        self.should_prune = False

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        layout: PackLayout,
        backend: str = "auto",
        kv_cache: RaggedKVCache | None = None,
        positions_to_keep: Tensor | None = None,
        **_others: object,
    ) -> tuple[Tensor, None]:
        projected = project(hidden_states[0], [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos_sin = halve_cos_sin(*position_embeddings)
        if kv_cache is None:
            out_TND = attend(q, k, v, layout, self.attention_config, backend, cos_sin)
        else:
            out_TND = kv_cache.attend(
                self, q, k, v, layout, self.attention_config, backend, cos_sin
            )
        if self.should_prune and positions_to_keep is not None:
            out_TND = out_TND.index_select(0, positions_to_keep)
        (y_TH,) = project(out_TND.flatten(-2), [self.o_proj])
        return y_TH[None], None


def halve_cos_sin(cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """The stock [1, T, D] tables repeat each half; ours are [T, D/2] in fp32 or wider."""
    half = cosine.shape[-1] // 2
    accum_dtype = torch.promote_types(cosine.dtype, torch.float32)
    return cosine[0, :, :half].to(accum_dtype).contiguous(), sine[0, :, :half].to(
        accum_dtype
    ).contiguous()


class _GatedMlp(torch.autograd.Function):
    """down(activation(gate x) * up x). Saves x, gate and up, with `again` x alone; what else the
    backward needs is computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: LinearGroup,
        down: LinearGroup,
        is_gelu: bool,
        should_recompute: bool,
        *_parameters: Tensor | None,
    ) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        (gate, up), inner = gate_up.forward(x_NH)
        (y,), down_inner = down.forward(ops.gated_activation(gate, up, is_gelu))
        ctx.first, ctx.last, ctx.gelu, ctx.shape, ctx.of_last = (
            gate_up,
            down,
            is_gelu,
            x.shape,
            len(down_inner),
        )
        ctx.again = should_recompute
        ctx.save_for_backward(x_NH, *down_inner, *(() if should_recompute else (gate, up, *inner)))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up: LinearGroup = ctx.first
        down: LinearGroup = ctx.last
        x_NH, *saved = ctx.saved_tensors
        down_inner, rest = saved[: ctx.of_last], saved[ctx.of_last :]
        if ctx.again:
            outputs, inner = gate_up.forward(x_NH)
            rest = [*outputs, *inner]
        gate, up, *inner = rest
        dy = [gradients[0].reshape(len(x_NH), -1)]
        dy, dz, outer = down.outputs_backward(dy, down_inner)
        dproduct = down.compute_input_grad(dy, dz)
        *dboth, product_NF = ops.gated_activation_backward(gate, up, dproduct, ctx.gelu)
        down_grads = down.compute_parameter_grads(product_NF, dy, dz, outer)
        dboth, dz, outer = gate_up.outputs_backward(dboth, inner)
        dx = (
            gate_up.compute_input_grad(dboth, dz).view(ctx.shape)
            if ctx.needs_input_grad[0]
            else None
        )
        return (
            dx,
            None,
            None,
            None,
            None,
            *gate_up.compute_parameter_grads(x_NH, dboth, dz, outer),
            *down_grads,
        )


class Mlp(nn.Module):
    def __init__(self, stock: Any, *, is_gelu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            stock.gate_proj,
            stock.up_proj,
            stock.down_proj,
        )
        self.is_gelu, self.should_recompute = is_gelu, False

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = (
            prepare_group([self.gate_proj, self.up_proj], x.dtype),
            prepare_group([self.down_proj], x.dtype),
        )
        return _GatedMlp.apply(
            x,
            gate_up,
            down,
            self.is_gelu,
            self.should_recompute,
            *gate_up.parameters,
            *down.parameters,
        )


class PrunedLastLayer(nn.Module):
    """A pre-norm decoder layer whose output is computed at the `kept` positions only: nothing above
    it needs the rest. Keys and values are still of all tokens."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = stock.self_attn, stock.mlp
        self.input_layernorm, self.post_attention_layernorm = (
            stock.input_layernorm,
            stock.post_attention_layernorm,
        )
        self.residual_multiplier = float(getattr(stock, "residual_multiplier", 1.0))
        self.self_attn.should_prune = True

    def forward(
        self, hidden_states: Tensor, positions_to_keep: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        out, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            positions_to_keep=positions_to_keep,
            **kwargs,
        )
        residual = (
            hidden_states
            if positions_to_keep is None
            else hidden_states.index_select(1, positions_to_keep)
        )
        residual = torch.add(residual, out, alpha=self.residual_multiplier)
        out = self.mlp(self.post_attention_layernorm(residual))
        return torch.add(residual, out, alpha=self.residual_multiplier)


def prune_last_layer(layers: nn.ModuleList) -> bool:
    """Makes the last decoder layer a LastLayer where its stock form is known to be the plain
    pre-norm one."""
    last = layers[-1]
    is_prunable = type(last).__name__ in PRUNABLE_LAYERS and isinstance(last.self_attn, Attention)
    if is_prunable:
        layers[-1] = PrunedLastLayer(last)
    return is_prunable


def apply_gradient_checkpointing(layers: Sequence[Any], activations: str) -> None:
    """What the backward finds of the forward. keep: all; selective: not gate and up, which are
    computed anew; recompute: the inputs of the layers, each of which runs again with the same
    Layout. The last layer's backward comes first, so what it keeps is gone before others need the
    room."""
    for layer in layers:
        if activations == "selective" and isinstance(mlp := getattr(layer, "mlp", None), Mlp):
            mlp.should_recompute = True
    for layer in layers[:-1] if activations == "recompute" else []:
        # transformers' own switch; it runs with gradients in training mode only
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


class Embedding(nn.Module):
    """The stock embedding, its output in the compute dtype: the stream's dtype decides what every
    product runs in. Rows of new tokens may be trained."""

    def __init__(self, stock: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.stock, self.weight, self.dtype = stock, stock.weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        new_rows = get_new_rows(self.stock)
        if new_rows is None:
            return self.stock(ids).to(self.dtype)
        new_rows.write_into(self.weight)
        out: Tensor = self.stock(ids)
        if torch.is_grad_enabled():
            out = new_rows.insert_rows(ids, out, getattr(self.stock, "embed_scale", 1.0))
        return out.to(self.dtype)


# ---------------------------------------------------------------- which stock modules are replaced

PRE_NORM_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite")
NORM_OFFSETS = {f"{family}RMSNorm": 0.0 for family in PRE_NORM_FAMILIES} | {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
}
FAMILIES = (*PRE_NORM_FAMILIES, "Gemma", "Gemma2", "Gemma3")
PRUNABLE_LAYERS = tuple(f"{family}DecoderLayer" for family in PRE_NORM_FAMILIES)
ATTENTION_CLASSES = tuple(f"{family}Attention" for family in FAMILIES)
MLP_CLASSES = tuple(f"{family}MLP" for family in FAMILIES)
IS_GELU = {"silu": False, "gelu_pytorch_tanh": True}


def build_replacement(stock: Any) -> nn.Module | None:
    """tunesmith's module for a stock one, or None where the stock one stays."""
    name = type(stock).__name__
    if name in NORM_OFFSETS:
        return RMSNorm(stock, offset=NORM_OFFSETS[name])
    if name in ATTENTION_CLASSES:
        return Attention(stock)
    if name in MLP_CLASSES:
        config = stock.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        return Mlp(stock, is_gelu=IS_GELU[activation]) if activation in IS_GELU else None
    return None


def replace_layers(network: nn.Module) -> int:
    """Puts tunesmith's modules in the place of the stock ones they equal, children first; returns
    how many."""
    num_replaced = 0
    for parent in reversed(list(network.modules())):
        for name, child in list(parent.named_children()):
            replacement = build_replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                num_replaced += 1
    return num_replaced
