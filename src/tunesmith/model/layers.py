"""Our norm, attention, MLP, last layer and embedding, which replace modules of a transformers
model. The stock model is their oracle.

`replace_layers` swaps them into the module tree if the stock class is listed; other modules stay
stock. Preflight then checks that the whole forward equals the stock one. Legend: N rows, T tokens,
H hidden, D head size, F MLP width."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.core.token_shard import TokenShard
from tunesmith.core.types import PackLayout
from tunesmith.model.attention import AttentionConfig, attend
from tunesmith.model.experts import Experts, is_stock_experts
from tunesmith.model.kernels import ops
from tunesmith.model.lora import AnyGroup, LinearGroup, prepare_group, project
from tunesmith.model.mixers.convolution import ShortConvolution
from tunesmith.model.mixers.gated_delta import (
    GatedDeltaNet,
    OlmoHybridDeltaNet,
    Qwen3NextDeltaNet,
)
from tunesmith.model.mixers.mamba2 import Mamba2Mixer
from tunesmith.model.new_embeddings import get_new_rows
from tunesmith.model.paged_cache import PagedKVCache


class RMSNorm(nn.Module):
    """RMSNorm; `offset` is 1 if the checkpoint stores weight - 1 (Gemma)."""

    def __init__(self, stock: Any, *, offset: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = stock.weight
        eps = stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps
        self.eps = float(eps)
        self.offset = offset

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, returns_sum: bool = False
    ) -> Any:
        """Return the norm of x; with `returns_sum`, the norm of residual + x, or of x, and what it
        is the norm of."""
        if returns_sum:
            return ops.add_rms_norm(x, residual, self._get_factors(), self.eps)
        return ops.rms_norm(x, self._get_factors(), self.eps)

    def _get_factors(self) -> Tensor:
        if not self.offset:
            return self.weight
        # the sum would be rounded in bf16
        accum_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(accum_dtype) + self.offset


class Attention(nn.Module):
    """Self-attention over a PackLayout: projections, optional norms of q and k, rotary embedding,
    attention, output projection.

    With `kv_cache`, k and v are also stored, and q attends to everything stored."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.q_proj = stock.q_proj
        self.k_proj = stock.k_proj
        self.v_proj = stock.v_proj
        self.o_proj = stock.o_proj
        self.q_norm = getattr(stock, "q_norm", None)
        self.k_norm = getattr(stock, "k_norm", None)
        self.head_dim: int = stock.head_dim
        class_name = type(stock).__name__
        source = stock.config if class_name in CONFIG_WINDOW_CLASSES else stock
        window = getattr(source, "sliding_window", None)
        softcap = stock.attn_logit_softcapping if class_name in CAPPED_CLASSES else None
        self.sinks: nn.Parameter | None = getattr(stock, "sinks", None)
        scale = float(stock.scaling)
        self.attention_config = AttentionConfig(scale, window, softcap, self.sinks)
        # set in the last layer, which computes its output at `positions_to_keep` only
        self.should_prune = False

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        layout: PackLayout,
        backend: str = "auto",
        kv_cache: PagedKVCache | None = None,
        positions_to_keep: Tensor | None = None,
        shard: TokenShard | None = None,
        **_others: object,
    ) -> tuple[Tensor, None]:
        projected = project(hidden_states.squeeze(0), [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        cos_sin = halve_cos_sin(*position_embeddings, self.head_dim)
        config = self.attention_config
        if kv_cache is None:
            out_TND = attend(q, k, v, layout, config, backend, cos_sin, shard)
        else:
            out_TND = kv_cache.attend(self, q, k, v, layout, config, backend, cos_sin)
        if self.should_prune and positions_to_keep is not None:
            out_TND = out_TND.index_select(0, positions_to_keep)
        (y_TH,) = project(out_TND.flatten(-2), [self.o_proj])
        return y_TH[None], None


# the tables of the forward in work, one for each kind of layer
@functools.lru_cache(maxsize=2)
def halve_cos_sin(cosine: Tensor, sine: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Convert the stock tables [1, T, D], which repeat each half, to [T, D/2] in fp32 or wider.
    Those of gpt-oss have one half."""
    half = head_dim // 2
    accum_dtype = torch.promote_types(cosine.dtype, torch.float32)
    cosine_half = cosine[0, :, :half].to(accum_dtype).contiguous()
    sine_half = sine[0, :, :half].to(accum_dtype).contiguous()
    return cosine_half, sine_half


class _GatedMlp(torch.autograd.Function):
    """down(activation(gate x) * up x).

    Saves gate and up, and x if gradients are computed from it; with `should_recompute` x alone. The
    backward recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: AnyGroup,
        down: AnyGroup,
        is_gelu: bool,
        should_recompute: bool,
        *_parameters: Tensor | None,
    ) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        (gate, up), inner = gate_up.forward(x_NH)
        (y,), down_inner = down.forward(ops.gated_activation(gate, up, is_gelu))
        ctx.gate_up = gate_up
        ctx.down = down
        ctx.is_gelu = is_gelu
        ctx.should_recompute = should_recompute
        ctx.shape = x.shape
        ctx.num_down_inner = len(down_inner)
        gate_up_saved = () if should_recompute else (gate, up, *inner)
        has_use_of_x = should_recompute or gate_up.needs_input
        ctx.save_for_backward(x_NH if has_use_of_x else None, *down_inner, *gate_up_saved)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up: LinearGroup = ctx.gate_up
        down: LinearGroup = ctx.down
        x_NH, *saved = ctx.saved_tensors
        down_inner = saved[: ctx.num_down_inner]
        gate_up_saved = saved[ctx.num_down_inner :]
        if ctx.should_recompute:
            outputs, inner = gate_up.forward(x_NH)
            gate_up_saved = [*outputs, *inner]
        gate, up, *inner = gate_up_saved
        dy = [gradients[0].reshape(-1, ctx.shape[-1])]
        dy, dz, outer = down.outputs_backward(dy, down_inner)
        dproduct = down.compute_input_grad(dy, dz)
        *dgate_up, product_NF = ops.gated_activation_backward(gate, up, dproduct, ctx.is_gelu)
        down_grads = down.compute_parameter_grads(product_NF, dy, dz, outer)
        dgate_up, dz, outer = gate_up.outputs_backward(dgate_up, inner)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gate_up.compute_input_grad(dgate_up, dz).view(ctx.shape)
        gate_up_grads = gate_up.compute_parameter_grads(x_NH, dgate_up, dz, outer)
        return (dx, None, None, None, None, *gate_up_grads, *down_grads)


class Mlp(nn.Module):
    """A gated MLP as one node of the autograd graph."""

    def __init__(self, stock: Any, *, is_gelu: bool) -> None:
        super().__init__()
        self.gate_proj = stock.gate_proj
        self.up_proj = stock.up_proj
        self.down_proj = stock.down_proj
        self.is_gelu = is_gelu
        self.should_recompute = False

    def forward(self, x: Tensor) -> Tensor:
        gate_up = prepare_group([self.gate_proj, self.up_proj], x.dtype)
        down = prepare_group([self.down_proj], x.dtype)
        parameters = (*gate_up.parameters, *down.parameters)
        return _GatedMlp.apply(x, gate_up, down, self.is_gelu, self.should_recompute, *parameters)


class PreNormLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer that adds its residuals in the kernels of its norms."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.self_attn = stock.self_attn
        self.mlp = stock.mlp
        self.input_layernorm = stock.input_layernorm
        self.post_attention_layernorm = stock.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed, residual = self.input_layernorm(hidden_states, returns_sum=True)
        out, _ = self.self_attn(hidden_states=normed, **kwargs)
        normed, residual = self.post_attention_layernorm(out, residual, returns_sum=True)
        return residual + self.mlp(normed)


def add_residuals_in_norms(layers: nn.ModuleList) -> None:
    """Replace plain pre-norm layers by PreNormLayers, in place."""
    for index, layer in enumerate(layers):
        has_multiplier = getattr(layer, "residual_multiplier", 1.0) != 1.0
        is_plain = type(layer).__name__ in PRUNABLE_LAYERS and not has_multiplier
        if is_plain and isinstance(layer.input_layernorm, RMSNorm):
            layers[index] = PreNormLayer(layer)


class PrunedLastLayer(nn.Module):
    """A pre-norm decoder layer whose output is computed at `positions_to_keep` only, since nothing
    above it needs the rest. Keys and values still cover all tokens."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.self_attn = stock.self_attn
        self.mlp = stock.mlp
        self.input_layernorm = stock.input_layernorm
        self.post_attention_layernorm = stock.post_attention_layernorm
        self.residual_multiplier = float(getattr(stock, "residual_multiplier", 1.0))
        self.self_attn.should_prune = True

    def forward(
        self, hidden_states: Tensor, positions_to_keep: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        out, _ = self.self_attn(hidden_states=normed, positions_to_keep=positions_to_keep, **kwargs)
        residual = hidden_states
        if positions_to_keep is not None:
            residual = hidden_states.index_select(1, positions_to_keep)
        residual = torch.add(residual, out, alpha=self.residual_multiplier)
        out = self.mlp(self.post_attention_layernorm(residual))
        return torch.add(residual, out, alpha=self.residual_multiplier)


def prune_last_layer(layers: nn.ModuleList) -> bool:
    """Replace the last decoder layer by a PrunedLastLayer. Return False if its class is not a plain
    pre-norm layer."""
    last = layers[-1]
    is_prunable = type(last).__name__ in PRUNABLE_LAYERS and isinstance(last.self_attn, Attention)
    if is_prunable:
        layers[-1] = PrunedLastLayer(last)
    return is_prunable


def apply_gradient_checkpointing(layers: Sequence[Any], mode: str) -> None:
    """Choose the activations that the forward keeps for the backward.

    none: all. selective: all but gate and up of MLPs and experts, which are recomputed. full: the
    inputs of the layers, each of which runs again with the same PackLayout. The last layer is not
    recomputed: its backward comes first, so its activations are freed before others need memory."""
    if mode == "selective":
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, Mlp | Experts):
                    module.should_recompute = True
    if mode == "full":
        for layer in layers[:-1]:
            # transformers' own switch; active in training mode only
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


class Embedding(nn.Module):
    """The stock embedding with its output in the compute dtype, which decides the dtype of every
    later product. Rows of new tokens may be trainable."""

    def __init__(self, stock: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.stock = stock
        self.weight = stock.weight
        self.dtype = dtype

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

# Gemma3Attention of transformers 5.24 takes the cap from the config, too, and does not apply it
CAPPED_CLASSES = ("Gemma2Attention",)
# the others have the window that they apply, and Llama's ignores what the config says
CONFIG_WINDOW_CLASSES = ("MistralAttention", "MixtralAttention")

PRE_NORM_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "Qwen3Moe", "Mixtral")
OFFSET_NORM_FAMILIES = ("Gemma", "Gemma2", "Gemma3")
# their norms and MLPs only
EXPERT_FAMILIES = (
    *("DeepseekV3", "Dots1", "Ernie4_5_Moe", "Glm4Moe", "Glm4MoeLite", "HunYuanMoEV1", "Olmoe"),
    "Qwen2Moe",
)
# their norms only
NORMED_EXPERT_FAMILIES = ("FlexOlmo", "GraniteMoe", "GraniteMoeShared", "MiniMaxM2")
HYBRID_FAMILIES = (
    *("Lfm2", "Lfm2Moe", "Lfm3", "OlmoHybrid"),
    *("GraniteMoeHybrid", "FalconH1", "NemotronH"),
)
OFFSET_HYBRID_FAMILIES = ("Qwen3_5", "Qwen3_5Moe", "Qwen3Next")
FAMILIES = (*PRE_NORM_FAMILIES, *OFFSET_NORM_FAMILIES)
NORM_OFFSETS = {
    **{f"{family}RMSNorm": 0.0 for family in PRE_NORM_FAMILIES},
    **{f"{family}RMSNorm": 1.0 for family in OFFSET_NORM_FAMILIES},
    **{f"{family}RMSNorm": 0.0 for family in (*EXPERT_FAMILIES, *NORMED_EXPERT_FAMILIES)},
    **{f"{family}RMSNorm": 0.0 for family in HYBRID_FAMILIES},
    **{f"{family}RMSNorm": 1.0 for family in OFFSET_HYBRID_FAMILIES},
    "GptOssRMSNorm": 0.0,
}
PRUNABLE_LAYERS = tuple(f"{family}DecoderLayer" for family in PRE_NORM_FAMILIES)
ATTENTION_CLASSES = (*(f"{family}Attention" for family in FAMILIES), "GptOssAttention")
MLP_CLASSES = (
    *(f"{family}MLP" for family in (*FAMILIES, *EXPERT_FAMILIES)),
    *("Qwen3NextMLP", "Qwen3_5MoeMLP"),  # shared experts
    *("Qwen3_5MLP", "OlmoHybridMLP"),
)
IS_GELU = {"SiLUActivation": False, "SiLU": False, "GELUTanh": True}
MIXERS = (GatedDeltaNet, Mamba2Mixer, ShortConvolution)  # all that carry a state
MIXER_CLASSES = {
    "Qwen3_5GatedDeltaNet": GatedDeltaNet,
    "Qwen3_5MoeGatedDeltaNet": GatedDeltaNet,
    "Qwen3NextGatedDeltaNet": Qwen3NextDeltaNet,
    "OlmoHybridGatedDeltaNet": OlmoHybridDeltaNet,
    "GraniteMoeHybridMambaLayer": Mamba2Mixer,
    "FalconH1Mixer": Mamba2Mixer,
    "NemotronHMamba2Mixer": Mamba2Mixer,
    "Lfm2ShortConv": ShortConvolution,
    "Lfm2MoeShortConv": ShortConvolution,
    "Lfm3ShortConv": ShortConvolution,
}


def build_replacement(stock: Any) -> nn.Module | None:
    """Return our module for a stock one, None if there is no equivalent."""
    name = type(stock).__name__
    if name in NORM_OFFSETS:
        return RMSNorm(stock, offset=NORM_OFFSETS[name])
    if name in ATTENTION_CLASSES:
        return Attention(stock)
    if name in MLP_CLASSES:
        activation = type(stock.act_fn).__name__
        return Mlp(stock, is_gelu=IS_GELU[activation]) if activation in IS_GELU else None
    if is_stock_experts(stock):
        return Experts(stock)
    if name in MIXER_CLASSES:
        return MIXER_CLASSES[name](stock)
    return None


def replace_layers(network: nn.Module) -> int:
    """Replace stock modules by our equivalents in place, children first. Return how many."""
    num_replaced = 0
    for parent in reversed(list(network.modules())):
        for name, child in list(parent.named_children()):
            replacement = build_replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                num_replaced += 1
    return num_replaced
