"""Build the metadata of a GGUF: architecture, vocabulary, chat template.

In: a transformers folder and the run's renderer. Out: key -> value, as `model/gguf` reads it back.
Only families that our reader and llama.cpp support are written; others are refused by name. A GGUF
has only the name of a pre-tokenizer: the one that splits a probe text like the original.
Left out: SentencePiece vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, ModelSpec
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.export.request import FALLBACK_HINT, TOKENIZER_FILE, refuse_unless_bpe
from tunesmith.model.gguf.convert import ARCHITECTURES, LFM2, QWEN3_MOE
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.gguf.tokenizer import (
    CONTROL_TYPE,
    PRE_TOKENIZERS,
    UNUSED_TYPE,
    USER_DEFINED_TYPE,
    build_tokenizer,
)
from tunesmith.model.hub.families import count_experts, count_experts_per_token
from tunesmith.model.hub.validate import read_model_json

NORMAL_TYPE = 1
# in llama.cpp, whose files of other architectures may have a bias of attn_output
ARCHITECTURES_WITHOUT_BIAS = ("qwen3", QWEN3_MOE)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Digits, contractions, white space, scripts, marks and symbols: every pre-tokenizer splits this
# text differently.
PROBE_TEXT = (
    "It's 7 77 777 7777 77777, 3.14e-05; WE'LL they'd i'M\n\n\n  x\t\ty \r\n\r\n"
    "    def f(a_b):\n\treturn a[1:]  \n"
    "naïve e\u0301te\u0301 Zürich-West straße 日本語テキスト 한국어 "
    "русский ไทย हिन्दी العربية 12٣٤ ½ Ⅷ "
    '🤗👩\u200d👩\u200d👧 !!??...  //  <b>x</b> {"k": [1,2]} a\u00a0b \u3000c '
    "HTTPServer2Go foo123bar 1st 2nd   "
)


def build_architecture(config: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    """Return the sizes under llama.cpp's keys, and the RoPE divisors of Llama 3, else None.

    Raises InputError for a model that cannot be written.
    """
    name = find_architecture(spec)
    where = str(spec.path / "config.json")
    if spec.tensor_prefix:
        message = "cannot write a GGUF of the text part of a multimodal model"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if config.get("hidden_act", "silu") != "silu":
        message = f"a GGUF of {name} cannot express this model's hidden_act"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if config.get("use_sliding_window"):
        message = f"a GGUF of {name} cannot express this model's sliding window"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if name in ARCHITECTURES_WITHOUT_BIAS and config.get("attention_bias"):
        message = f"llama.cpp does not load a bias of o_proj in a {name}"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    rope, rope_factors = _build_rope(config["rope_parameters"], spec)
    sizes = {
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 0)),
        "vocab_size": spec.vocab_size,
        "rope.dimension_count": spec.head_dim,
        **rope,
    }
    if name == QWEN3_MOE:
        sizes |= _describe_experts(config, where)
    if name == LFM2:
        sizes |= _describe_convolutions(config, spec)
    return {f"{name}.{key}": value for key, value in sizes.items()}, rope_factors


def find_architecture(spec: ModelSpec) -> str:
    """Return llama.cpp's name for a model type. Raise InputError if we cannot write it."""
    names = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
    if spec.model_type not in names:
        message = f"cannot write a GGUF of {spec.model_type}; supported: {', '.join(names)}"
        raise InputError(message, where=str(spec.path), fix=FALLBACK_HINT)
    return names[spec.model_type]


def _describe_experts(config: Json, where: str) -> Json:
    """Return the sizes of experts in all layers, whose probabilities llama.cpp scales to a sum of
    1. Raise InputError for others."""
    is_mixed = bool(config["mlp_only_layers"]) or config["decoder_sparse_step"] != 1
    if is_mixed or not config["norm_topk_prob"]:
        problem = "layers without experts" if is_mixed else "norm_topk_prob: false"
        message = f"a GGUF of qwen3_moe cannot express {problem}"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    return {
        "expert_count": count_experts(config),
        "expert_used_count": count_experts_per_token(config),
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "feed_forward_length": config["intermediate_size"],
    }


def _describe_convolutions(config: Json, spec: ModelSpec) -> Json:
    """Return what LFM2 has besides attention. A layer without keys and values is a convolution."""
    if config.get("conv_bias"):
        message = "a GGUF of lfm2 cannot express the bias of convolutions"
        raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)
    if spec.num_heads * spec.head_dim != spec.hidden_size:
        message = (
            f"llama.cpp does not load an lfm2 with {spec.num_heads} heads of {spec.head_dim} in "
            f"hidden states of {spec.hidden_size}"
        )
        raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)
    heads = [spec.num_kv_heads if mixer == "attention" else 0 for mixer in spec.layer_mixers]
    return {
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "shortconv.l_cache": config["conv_L_cache"],
    }


def _build_rope(rope: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    rope_type = rope.get("rope_type", "default")
    theta = float(rope["rope_theta"])
    metadata: Json = {"rope.freq_base": theta}
    if rope.get("partial_rotary_factor", 1) == 1:
        if rope_type == "default":
            return metadata, None
        if rope_type == "linear":
            metadata["rope.scaling.type"] = "linear"
            metadata["rope.scaling.factor"] = float(rope["factor"])
            return metadata, None
        has_llama3_values = all(rope.get(key) == value for key, value in LLAMA3_ROPE.items())
        if rope_type == "llama3" and has_llama3_values:
            return metadata, _compute_llama3_divisors(theta, float(rope["factor"]), spec.head_dim)
    message = f"cannot write a GGUF with RoPE parameters {rope}"
    raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)


def _compute_llama3_divisors(theta: float, factor: float, head_dim: int) -> np.ndarray:
    """Return 1 for short wavelengths, `factor` for long ones, and values between for the rest."""
    low_freq_factor, high_freq_factor, original_length = LLAMA3_ROPE.values()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    position = original_length / wavelengths - low_freq_factor
    smooth = np.clip(position / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---------------------------------------------------------------- vocabulary


def build_vocabulary(folder: Path, renderer: Renderer, vocab_size: int) -> Json:
    """Return tokens, merges, pre-tokenizer, special tokens and chat templates.

    vocab_size: rows of the embedding, some without a token.
    """
    data = read_model_json(folder / TOKENIZER_FILE)
    config = read_model_json(folder / "tokenizer_config.json")
    added_tokens = _read_added_tokens(data, config, folder)
    texts = {index: text for text, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL_TYPE)
    for index, token in added_tokens.items():
        texts[index] = token["content"]
        types[index] = CONTROL_TYPE if token["special"] else USER_DEFINED_TYPE
    merges = data["model"]["merges"]
    metadata: Json = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [types.get(i, UNUSED_TYPE) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ],
        "tokenizer.ggml.add_bos_token": bool(renderer.tokenizer.bos_ids),
        **_collect_special_ids(renderer),
    }
    for name, template in renderer.templates.items():
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = template.source
    metadata["tokenizer.ggml.pre"] = _find_pre_tokenizer(folder / TOKENIZER_FILE, metadata)
    return metadata


def _read_added_tokens(data: Json, config: Json, folder: Path) -> dict[int, Json]:
    refuse_unless_bpe(data, folder / TOKENIZER_FILE)
    added = {token["id"]: token for token in data["added_tokens"]}
    added |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for token in added.values():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            message = f"a GGUF cannot express how {token['content']} strips the text around it"
            raise InputError(message, where=str(folder / TOKENIZER_FILE), fix=FALLBACK_HINT)
    return added


def _collect_special_ids(renderer: Renderer) -> Json:
    """Return the ids of special tokens.

    eos is the token that answers were trained to end with, since most engines stop at no other. Two
    more end tokens become eot and eom, the model's own EOS first.
    """
    tokenizer = renderer.tokenizer
    metadata: Json = {}
    for name, key in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token_id = tokenizer.token_to_id(tokenizer.special_tokens.get(key, ""))
        if token_id is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = token_id
    candidates = (*renderer.end_ids[:1], tokenizer.eos_id, *renderer.end_ids)
    end_ids = list(dict.fromkeys(index for index in candidates if index is not None))
    for name, token_id in zip(("eos", "eot", "eom"), end_ids, strict=False):
        metadata[f"tokenizer.ggml.{name}_token_id"] = token_id
    metadata["tokenizer.ggml.eos_token_ids"] = end_ids
    return metadata


def _find_pre_tokenizer(file: Path, metadata: Json) -> str:
    """Return the name of the pre-tokenizer that splits and encodes like the original.

    Raises InputError if there is none.
    """
    original = Tokenizer.from_file(str(file))
    pieces = _split_probe(original)
    ids = original.encode(PROBE_TEXT).ids
    for name in PRE_TOKENIZERS:
        rebuilt = build_tokenizer(GgufFile(file, metadata | {"tokenizer.ggml.pre": name}, ()))
        if _split_probe(rebuilt) == pieces and rebuilt.encode(PROBE_TEXT).ids == ids:
            return name
    message = f"unsupported pre-tokenizer; supported: {', '.join(PRE_TOKENIZERS)}"
    raise InputError(message, where=str(file), fix=FALLBACK_HINT)


def _split_probe(tokenizer: Tokenizer) -> Sequence[str]:
    text = PROBE_TEXT
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    if not tokenizer.pre_tokenizer:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
