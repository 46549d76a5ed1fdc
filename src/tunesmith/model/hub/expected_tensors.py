"""The tensors that a config.json promises, for a plan without weights: a 70B model's fit is asked
before 140 GB come.

In: the config and its checked sizes. Out: headers as of weight files that are not there. The
matrices are exact, and what has the length of a vector (norms, biases) is one tensor a layer, under
a thousandth of a model: its size is that of the families listed. Left out: whether the sizes make
sense (spec.py)."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.model.hub.validate import DTYPE_BYTES, TensorHeader

# What transformers takes where config.json says nothing; everything else is hidden_size /
# num_attention_heads, or no.
HEAD_DIMS = {
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "ministral3": 128,
    "qwen3": 128,
    "seed_oss": 128,
}
HEAD_DIMS |= {"ernie4_5": 128, "glm": 128, "glm4": 128, "helium": 128}
TIED_MODEL_TYPES = {"cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "smollm3"}
NORMS_PER_LAYER = {
    "cohere": 1,
    "cohere2": 1,
    "gemma2": 4,
    "gemma3_text": 4,
    "glm4": 4,
    "olmo": 0,
}  # a layer; else 2
HEAD_QK_NORM_TYPES = {
    "exaone4",
    "gemma3_text",
    "hunyuan_v1_dense",
    "qwen3",
}  # q and k are normed head by head
FULL_QK_NORM_TYPES = {"olmo2", "olmo3"}  # q and k are normed whole
QKV_BIAS_TYPES = {
    "glm",
    "glm4",
    "qwen2",
    "seed_oss",
}  # q, k and v have a bias unless the config says no
FUSED_MLP_TYPES, FUSED_QKV_TYPES = {"glm", "glm4", "phi3"}, {"phi3"}
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


def has_tied_head(config: dict[str, Any], model_type: str) -> bool:
    """The head is the embedding."""
    configured = config.get("tie_word_embeddings")
    return model_type in TIED_MODEL_TYPES if configured is None else bool(configured)


def build_expected_headers(
    config: dict[str, Any], model_type: str, dimensions: ModelDimensions, path: Path
) -> dict[str, TensorHeader]:
    dtype = STORED_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (dimensions.vocab_size, dimensions.hidden_size)
    }
    vector_values = _count_vector_values(config, model_type, dimensions)
    for layer in range(dimensions.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.{name}.weight": tensor_shape
            for name, tensor_shape in _list_matrix_shapes(model_type, dimensions).items()
        }
        shapes[f"{prefix}.vectors"] = (vector_values,)
    shapes["model.norm.weight"] = (dimensions.hidden_size if model_type != "olmo" else 0,)
    if not has_tied_head(config, model_type):
        shapes["lm_head.weight"] = (dimensions.vocab_size, dimensions.hidden_size)
    dtype_bytes = DTYPE_BYTES[dtype]
    return {
        name: TensorHeader(path, dtype, tensor_shape, 0, prod(tensor_shape) * dtype_bytes)
        for name, tensor_shape in shapes.items()
    }


def _list_matrix_shapes(model_type: str, dimensions: ModelDimensions) -> dict[str, tuple[int, int]]:
    h, f, q, kv = (
        dimensions.hidden_size,
        dimensions.intermediate_size,
        dimensions.num_heads * dimensions.head_dim,
        dimensions.num_kv_heads * dimensions.head_dim,
    )
    separate = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h)}
    attention = {"qkv_proj": (q + 2 * kv, h)} if model_type in FUSED_QKV_TYPES else separate
    mlp = (
        {"gate_up_proj": (2 * f, h)}
        if model_type in FUSED_MLP_TYPES
        else {"gate_proj": (f, h), "up_proj": (f, h)}
    )
    return {
        f"self_attn.{name}": matrix_shape
        for name, matrix_shape in (attention | {"o_proj": (h, q)}).items()
    } | {
        f"mlp.{name}": matrix_shape for name, matrix_shape in (mlp | {"down_proj": (h, f)}).items()
    }


def _count_vector_values(
    config: dict[str, Any], model_type: str, dimensions: ModelDimensions
) -> int:
    """Norms and biases of a layer, counted in numbers."""
    q, kv = (
        dimensions.num_heads * dimensions.head_dim,
        dimensions.num_kv_heads * dimensions.head_dim,
    )
    count = NORMS_PER_LAYER.get(model_type, 2) * dimensions.hidden_size
    count += (
        2 * dimensions.head_dim
        if model_type in HEAD_QK_NORM_TYPES
        else q + kv
        if model_type in FULL_QK_NORM_TYPES
        else 0
    )
    configured = config.get("attention_bias")
    has_bias = (
        model_type in QKV_BIAS_TYPES
        if configured is None or model_type == "qwen2"
        else bool(configured)
    )
    return count + (q + 2 * kv if has_bias else 0)
