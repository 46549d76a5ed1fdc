"""The tensors that a config.json promises, for a plan without weights: a 70B model's fit is asked before 140 GB come.

In: the config and its checked sizes. Out: headers as of weight files that are not there. The matrices are exact, and
what has the length of a vector (norms, biases) is one tensor a layer, under a thousandth of a model: its size is that
of the families listed. Left out: whether the sizes make sense (spec.py).
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.model.hub.validate import WEIGHT_BYTES, TensorHeader

# What transformers takes where config.json says nothing; everything else is hidden_size / num_attention_heads, or no.
HEAD_DIMS = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "ministral3": 128, "qwen3": 128, "seed_oss": 128}
HEAD_DIMS |= {"ernie4_5": 128, "glm": 128, "glm4": 128, "helium": 128}
TIED = {"cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "smollm3"}
NORMS = {"cohere": 1, "cohere2": 1, "gemma2": 4, "gemma3_text": 4, "glm4": 4, "olmo": 0}  # a layer; else 2
HEAD_NORMS = {"exaone4", "gemma3_text", "hunyuan_v1_dense", "qwen3"}  # q and k are normed head by head
WHOLE_NORMS = {"olmo2", "olmo3"}  # q and k are normed whole
BIASED = {"glm", "glm4", "qwen2", "seed_oss"}  # q, k and v have a bias unless the config says no
FUSED_MLP, FUSED_ATTENTION = {"glm", "glm4", "phi3"}, {"phi3"}
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Shape(NamedTuple):
    """The checked sizes of a config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int


def ties(config: dict[str, Any], model_type: str) -> bool:
    """The head is the embedding."""
    said = config.get("tie_word_embeddings")
    return model_type in TIED if said is None else bool(said)


def promised(config: dict[str, Any], model_type: str, shape: Shape, where: Path) -> dict[str, TensorHeader]:
    dtype = STORED.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    vectors = _vectors(config, model_type, shape)
    for layer in range(shape.layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.{name}.weight": size for name, size in _matrices(model_type, shape).items()}
        shapes[f"{place}.vectors"] = (vectors,)
    shapes["model.norm.weight"] = (shape.hidden if model_type != "olmo" else 0,)
    if not ties(config, model_type):
        shapes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    width = WEIGHT_BYTES[dtype]
    return {name: TensorHeader(where, dtype, size, 0, prod(size) * width) for name, size in shapes.items()}


def _matrices(model_type: str, shape: Shape) -> dict[str, tuple[int, int]]:
    h, f, q, kv = shape.hidden, shape.inner, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    apart = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h)}
    attention = {"qkv_proj": (q + 2 * kv, h)} if model_type in FUSED_ATTENTION else apart
    mlp = {"gate_up_proj": (2 * f, h)} if model_type in FUSED_MLP else {"gate_proj": (f, h), "up_proj": (f, h)}
    return {f"self_attn.{name}": size for name, size in (attention | {"o_proj": (h, q)}).items()} | {
        f"mlp.{name}": size for name, size in (mlp | {"down_proj": (h, f)}).items()
    }


def _vectors(config: dict[str, Any], model_type: str, shape: Shape) -> int:
    """Norms and biases of a layer, counted in numbers."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = NORMS.get(model_type, 2) * shape.hidden
    count += 2 * shape.head_dim if model_type in HEAD_NORMS else q + kv if model_type in WHOLE_NORMS else 0
    said = config.get("attention_bias")
    biased = model_type in BIASED if said is None or model_type == "qwen2" else bool(said)
    return count + (q + 2 * kv if biased else 0)
