"""The layers of a decoder for one more token per row, as one call of layers.c.

    layers = build_decode_layers(model, kv_cache)      None where layers.c does not apply
    hidden_BH = layers.run(tokens_B)                   in place of the decoder's forward

In: a model in bf16 on a CPU whose layers are plain pre-norm layers (Llama, Mistral, Qwen2, Qwen3),
with LoRA of its own or an AdapterBank, and the cache that its rows are stored in. Out: the bits of
the decoder's own forward, which is the reference and takes twice as long for a single row. The
weights must not change while these layers are used. Left out: prompts, DoRA outside of a bank,
4-bit weights, weights that are trained in full. Legend: B rows, H hidden, M blocks of the longest
row."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_long, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.attention import choose_backend, has_kernel
from tunesmith.model.bank_linear import BankLinear
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.frozen_weight import BlockedWeight, DenseWeight, FrozenWeight
from tunesmith.model.kernels import lora, matmul
from tunesmith.model.kernels.build import load_library
from tunesmith.model.kernels.lora import FactorsTable, PackedRows, pack_factors
from tunesmith.model.kernels.matmul import BlockedMatrix
from tunesmith.model.layers import Attention, Mlp, RMSNorm, halve_cos_sin
from tunesmith.model.lora import LoraLinear
from tunesmith.model.machine_errors import OutOfMemory
from tunesmith.model.paged_cache import PagedKVCache

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Projection(ctypes.Structure):
    """A linear, as layers.c reads it."""

    _fields_ = (
        *((name, c_void_p) for name in ("m", "bias")),
        *((name, c_long) for name in ("outputs", "layout", "entry")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, Projection) for name in PROJECTIONS),
        *((name, c_long) for name in ("heads", "kv_heads", "window", "is_gelu")),
        *((name, c_float) for name in ("attention_eps", "mlp_eps", "q_eps", "k_eps", "scale")),
    )


class Rows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("cosine", "sine", "places", "tables", "tiles", "order")),
        *((name, c_long) for name in ("rows", "size", "width", "columns", "num_tiles", "threads")),
    )


@dataclass(eq=False)
class DecodeLayers:
    """All layers of one model over one cache. Owned by the thread that runs the model."""

    model: PackedCausalLM
    kv_cache: PagedKVCache
    layers: ctypes.Array[Layer]
    head_dim: int
    tensors: list[Tensor]  # that the layers point to
    table: FactorsTable | None  # of the model's own adapter
    has_buffers: bool = False

    @torch.no_grad()
    def run(self, tokens_B: Tensor) -> Tensor | None:
        """Return hidden states [B, H] of the forward that the cache has begun, None if it is not
        one token for each of some rows, or an adapter runs in torch."""
        inputs = self.kv_cache.get_decode_inputs()
        rows = self._pack_rows(len(tokens_B))
        if inputs is None or rows is None or not self._set_buffers():
            return None
        positions_B, tables_BM = inputs
        decoder = self.model.decoder
        hidden_BH: Tensor = decoder.embed_tokens(tokens_B).contiguous()
        rotation = decoder.rotary_emb(hidden_BH[None], positions_B[None])
        cosine, sine = halve_cos_sin(*rotation, self.head_dim)
        shared = Rows(
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            places=positions_B.data_ptr(),
            tables=tables_BM.data_ptr(),
            tiles=ctypes.addressof(rows.tiles),
            order=ctypes.addressof(rows.order),
            rows=len(hidden_BH),
            size=hidden_BH.shape[1],
            width=self.head_dim,
            columns=tables_BM.shape[1],
            num_tiles=rows.num_tiles,
            threads=torch.get_num_threads(),
        )
        library = load_library()
        assert library is not None
        hidden = c_void_p(hidden_BH.data_ptr())
        layers = ctypes.byref(self.layers)
        if library.decode_layers(hidden, layers, ctypes.byref(shared), c_long(len(self.layers))):
            raise OutOfMemory("no memory for a step of generation", fix="free memory")
        return decoder.norm(hidden_BH)

    def _pack_rows(self, num_rows: int) -> PackedRows | None:
        """Return the rows by adapter, None if one of them has products in torch."""
        if self.table is not None:
            return PackedRows([(self.table, torch.arange(num_rows))])
        if self.model.row_adapters is None:
            return PackedRows([])
        self.model.row_adapters.keep_positions(None)
        rows = self.model.row_adapters.get(is_pruned=False)
        if rows is None:
            return PackedRows([])
        assert rows.num_rows == num_rows, "the bank has other rows than the step"
        has_torch = any(adapter.torch_factors for adapter, _ in rows.groups)
        return None if has_torch else rows.packed

    def _set_buffers(self) -> bool:
        """Let the layers point to their keys and values; return False before a first prompt."""
        if self.has_buffers:
            return True
        for layer, module in zip(self.layers, self.model.decoder.layers, strict=True):
            buffers = self.kv_cache.find_buffers(module.self_attn)
            if buffers is None:
                return False
            layer.keys, layer.values = (buffer.data_ptr() for buffer in buffers)
        self.has_buffers = True
        return True


def build_decode_layers(model: PackedCausalLM, kv_cache: PagedKVCache) -> DecodeLayers | None:
    """Return the layers of a model for layers.c, None if it does not apply to one of them."""
    decoder = model.decoder
    if type(decoder).__name__ not in DECODERS or not matmul.is_available():
        return None
    if model.dtype != torch.bfloat16 or model.device.type != "cpu" or model.shards is not None:
        return None
    if decoder.training or not all(_is_plain(layer, model) for layer in decoder.layers):
        return None
    builder = _Builder()
    layers = (Layer * len(decoder.layers))(*map(builder.build_layer, decoder.layers))
    if not builder.is_complete:
        return None
    head_dim = decoder.layers[0].self_attn.head_dim
    table = FactorsTable(builder.factors) if builder.has_adapter else None
    return DecodeLayers(model, kv_cache, layers, head_dim, builder.tensors, table)


def _is_plain(layer: Any, model: PackedCausalLM) -> bool:
    """Return whether a layer is norm, attention, norm, MLP, whose attention decode.c computes."""
    attention = layer.self_attn
    mlp = layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if not isinstance(attention, Attention) or not isinstance(mlp, Mlp):
        return False
    norms += [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    if not all(isinstance(norm, RMSNorm) for norm in norms):
        return False
    sample = torch.empty(1, 1, attention.head_dim, dtype=model.dtype)
    has_attention = has_kernel(sample, attention.attention_config)
    is_kernel = choose_backend(model.backend, sample) == "cpu_kernel"
    return has_attention and is_kernel


class _Builder:
    """Fills the structures of layers.c. `tensors` keeps alive what they point to."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.factors: list[lora.PackedFactors | None] = []
        self.is_complete = True  # no linear is left that layers.c cannot multiply with

    @property
    def has_adapter(self) -> bool:
        return any(factors is not None for factors in self.factors)

    def build_layer(self, layer: Any) -> Layer:
        attention: Attention = layer.self_attn
        config = attention.attention_config
        linears = {
            **{name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")},
            **{name: getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")},
        }
        projections = {name: self._build_projection(linear) for name, linear in linears.items()}
        norms = {
            "attention": layer.input_layernorm,
            "mlp": layer.post_attention_layernorm,
            "q": attention.q_norm,
            "k": attention.k_norm,
        }
        used_norms = {name: norm for name, norm in norms.items() if norm is not None}
        return Layer(
            **{
                f"{name}_norm": self._get_pointer(n.weight.float())
                for name, n in used_norms.items()
            },
            **{f"{name}_eps": norm.eps for name, norm in used_norms.items()},
            **projections,
            heads=projections["q"].outputs // attention.head_dim,
            kv_heads=projections["k"].outputs // attention.head_dim,
            window=config.window or 0,
            is_gelu=int(layer.mlp.is_gelu),
            scale=config.scale,
        )

    def _build_projection(self, module: Any) -> Projection:
        weight, layout = self._find_weight(module)
        if weight is None:
            self.is_complete = False
            return Projection()
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = bias.detach().to(torch.bfloat16)
        entry = -1
        if isinstance(module, BankLinear):
            entry = module.index
        elif isinstance(module, LoraLinear):
            entry = len(self.factors)
            self.factors.append(self._pack_adapter(module))
        outputs = len(module.lora_B) if isinstance(module, LoraLinear) else module.out_features
        return Projection(
            m=self._get_pointer(weight),
            bias=None if bias is None else self._get_pointer(bias),
            outputs=outputs,
            layout=layout,
            entry=entry,
        )

    def _find_weight(self, module: Any) -> tuple[Tensor | None, int]:
        frozen: FrozenWeight | None = None
        if type(module) is nn.Linear:
            frozen = DenseWeight(module.weight.detach())
        elif isinstance(module, BankLinear | LoraLinear):
            frozen = module.frozen
        if isinstance(frozen, BlockedWeight) and isinstance(frozen.forward_matrix, BlockedMatrix):
            return frozen.forward_matrix.blocks, matmul.PACKED
        if isinstance(frozen, DenseWeight) and matmul.is_supported(frozen.weight):
            return frozen.weight, matmul.COLUMNS_FIRST
        return None, 0

    def _pack_adapter(self, module: LoraLinear) -> lora.PackedFactors | None:
        if module.scale == 0:
            return None
        is_plain = module.lora_magnitude_vector is None and len(module.lora_A) <= lora.MAX_RANK
        if not is_plain or not lora.is_available():
            self.is_complete = False
            return None
        a_RI, b_OR = module.cast_factors(torch.bfloat16)
        return pack_factors(a_RI, b_OR, module.scale, None, None)

    def _get_pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()
