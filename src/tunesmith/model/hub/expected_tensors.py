"""The tensors that a config.json implies, so that a 70B model can be planned before it is
downloaded.

In: the config and its checked sizes. Out: headers of weight files that do not exist yet. Matrices
are exact. Vectors, under a thousandth of the model, are sized by the tables below: norms of the
hidden states, of q and of k, and one tensor for the others of a layer. Left out: whether the
sizes make sense (spec.py)."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.model.hub.validate import DTYPE_BYTES, TensorHeader

# Defaults of transformers where config.json is silent. Other model types: head_dim is hidden_size /
# num_attention_heads, the head is not tied, two norms per layer, no bias.
# fmt: off
HEAD_DIMS = {
    "cwm": 128, "ernie4_5": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256, "glm": 128,
    "glm4": 128, "helium": 128, "ministral3": 128, "qwen3": 128, "seed_oss": 128,
    "vaultgemma": 256,
}
TIED_MODEL_TYPES = {
    "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4",
    "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gpt2", "lfm2", "lfm2_moe", "lfm3",
    "mistral3", "smollm3", "starcoder2", "vaultgemma",
}
NORMS_PER_LAYER = {
    "cohere": 1, "cohere2": 1, "gemma2": 4, "gemma3_text": 4, "glm4": 4, "olmo": 0,
}
# fmt: on
# q and k are normalized per head, or over all heads
HEAD_QK_NORM_TYPES = {"apertus", "exaone4", "gemma3_text", "hunyuan_v1_dense", "qwen3"}
FULL_QK_NORM_TYPES = {"olmo2", "olmo3"}
QKV_BIAS_TYPES = {"glm", "glm4", "qwen2", "seed_oss"}  # unless the config turns the bias off
UNGATED_MLP_TYPES = {"apertus", "arcee"}  # up_proj and down_proj, no gate_proj
FUSED_MLP_TYPES = {"glm", "glm4", "phi3"}
FUSED_QKV_TYPES = {"phi3"}
STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class ModelDimensions(NamedTuple):
    """The checked sizes of a config."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def has_tied_head(config: dict[str, Any], model_type: str) -> bool:
    """Return whether the head shares the embedding's weight."""
    configured = config.get("tie_word_embeddings")
    return model_type in TIED_MODEL_TYPES if configured is None else bool(configured)


def build_expected_headers(
    config: dict[str, Any], model_type: str, dimensions: ModelDimensions, path: Path
) -> dict[str, TensorHeader]:
    """Return tensor name -> header of the weights that a config.json implies."""
    embedding_shape = (dimensions.vocab_size, dimensions.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding_shape}
    matrix_shapes = _list_matrix_shapes(model_type, dimensions)
    norm_shapes = _list_norm_shapes(model_type, dimensions)
    vector_values = _count_vector_values(config, model_type, dimensions)
    for layer in range(dimensions.num_layers):
        for name, shape in (matrix_shapes | norm_shapes).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        shapes[f"model.layers.{layer}.vectors"] = (vector_values,)
    shapes["model.norm.weight"] = (0 if model_type == "olmo" else dimensions.hidden_size,)
    if not has_tied_head(config, model_type):
        shapes["lm_head.weight"] = embedding_shape
    dtype = STORED_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    headers: dict[str, TensorHeader] = {}
    for name, shape in shapes.items():
        headers[name] = TensorHeader(path, dtype, shape, 0, prod(shape) * DTYPE_BYTES[dtype])
    return headers


def _list_matrix_shapes(model_type: str, dimensions: ModelDimensions) -> dict[str, tuple[int, int]]:
    """Return name -> shape [O, I] of the matrices of a layer."""
    hidden = dimensions.hidden_size
    mlp_width = dimensions.intermediate_size
    q_size = dimensions.q_size
    kv_size = dimensions.kv_size
    shapes: dict[str, tuple[int, int]] = {}
    if model_type in FUSED_QKV_TYPES:
        shapes["self_attn.qkv_proj"] = (q_size + 2 * kv_size, hidden)
    else:
        shapes["self_attn.q_proj"] = (q_size, hidden)
        shapes["self_attn.k_proj"] = (kv_size, hidden)
        shapes["self_attn.v_proj"] = (kv_size, hidden)
    shapes["self_attn.o_proj"] = (hidden, q_size)
    if model_type in FUSED_MLP_TYPES:
        shapes["mlp.gate_up_proj"] = (2 * mlp_width, hidden)
    else:
        if model_type not in UNGATED_MLP_TYPES:
            shapes["mlp.gate_proj"] = (mlp_width, hidden)
        shapes["mlp.up_proj"] = (mlp_width, hidden)
    shapes["mlp.down_proj"] = (hidden, mlp_width)
    return shapes


def _list_norm_shapes(model_type: str, dimensions: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the norms of a layer; those of the hidden states are numbered."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(NORMS_PER_LAYER.get(model_type, 2)):
        shapes[f"norm_{index}"] = (dimensions.hidden_size,)
    if model_type in HEAD_QK_NORM_TYPES:
        shapes["self_attn.q_norm"] = (dimensions.head_dim,)
        shapes["self_attn.k_norm"] = (dimensions.head_dim,)
    elif model_type in FULL_QK_NORM_TYPES:
        shapes["self_attn.q_norm"] = (dimensions.q_size,)
        shapes["self_attn.k_norm"] = (dimensions.kv_size,)
    if model_type == "bitnet":
        shapes["self_attn.attn_sub_norm"] = (dimensions.hidden_size,)
        shapes["mlp.ffn_sub_norm"] = (dimensions.intermediate_size,)
    return shapes


def _count_vector_values(
    config: dict[str, Any], model_type: str, dimensions: ModelDimensions
) -> int:
    """Return how many values the other vectors of a layer have, biases mostly."""
    count = 0
    if model_type == "apertus":  # two parameters and two constants of the activation
        count += 4
    has_bias = config.get("attention_bias")
    if has_bias is None or model_type == "qwen2":
        has_bias = model_type in QKV_BIAS_TYPES
    if has_bias:
        count += dimensions.q_size + 2 * dimensions.kv_size
    return count
