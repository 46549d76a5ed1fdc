"""Tiny GGUF files in the layout of llama.cpp's converter, and the config of the same model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 96, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "ĠĠ ĠĠ", "Ċ ĠĠĠĠ", "1 2", "h e"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def list_tokens() -> list[str]:
    """Return control tokens, the byte-level alphabet, merges, a user token and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [
        *SPECIALS,
        *alphabet,
        *("".join(merge.split(" ")) for merge in MERGES),
        "<think>",
        "[PAD265]",
    ]


def random_weights(architecture: str, *, tied: bool = True) -> dict[str, np.ndarray]:
    """Return weights by transformers name: multiples of 1/16, which bf16 represents exactly."""
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (len(list_tokens()), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(list_tokens()), HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, rows in (
            ("q", HEADS * HEAD_DIM),
            ("k", KV_HEADS * HEAD_DIM),
            ("v", KV_HEADS * HEAD_DIM),
        ):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if architecture == "qwen2":
                shapes[f"{block}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        for name, shape in (
            ("gate", (INNER, HIDDEN)),
            ("up", (INNER, HIDDEN)),
            ("down", (HIDDEN, INNER)),
        ):
            shapes[f"{block}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{name}.weight"] = (HIDDEN,)
        if architecture == "gemma3":
            for name in ("pre_feedforward", "post_feedforward"):
                shapes[f"{block}.{name}_layernorm.weight"] = (HIDDEN,)
        if architecture in ("qwen3", "gemma3"):
            shapes |= {f"{block}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    return {
        name: (random.integers(-16, 17, shape) / 16).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_gemma3_tokens() -> dict[str, Any]:
    """Return a SentencePiece vocabulary: control tokens, bytes, pieces, and a token of the user."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["h", "e", "\u2581", "he", "  ", "\u2581he", "<think>"]
    return {
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.key_length": HEAD_DIM,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [3] * 3 + [6] * 256 + [1] * 6 + [4],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": True,
    }


def make_metadata(architecture: str) -> dict[str, Any]:
    others = make_gemma3_tokens() if architecture == "gemma3" else {}
    return {
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 100000.0,
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if architecture == "qwen2" else "smollm",
        "tokenizer.ggml.tokens": list_tokens(),
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (256 + len(MERGES)) + [4, 5],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **others,
    }


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    tied: bool = True,
    quantize: str = "F16",
    extra: dict[str, np.ndarray] | None = None,
    bad: str = "",
    **changed: Any,
) -> Path:
    """Write a GGUF of `architecture` and return its path.

    tensors: those of `random_weights`, and `extra` by their GGUF names
    bad: the transformers name of a weight that begins with NaN
    changed: metadata to replace (`__` for a dot); None omits an entry
    """
    writer = gguf.GGUFWriter(path, architecture)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    for name, values in random_weights(architecture, tied=tied).items():
        if name == bad:
            values[0, 0] = np.nan
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = HEADS if "q_proj" in name else KV_HEADS
            values = (
                values.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
            )
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        kind = gguf.GGMLQuantizationType[quantize if values.ndim > 1 else "F32"]
        writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    content = make_metadata(architecture) | {
        key.replace("__", "."): value for key, value in changed.items()
    }
    for key, value in content.items():
        _add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "vocab_size": len(list_tokens()),
    "tie_word_embeddings": True,
}
