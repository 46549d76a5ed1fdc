"""What a GGUF says about a model beside its weights: sizes, vocabulary, template, as one dict of
metadata.

In: the folder that plain transformers loads, and the run's renderer. Out: key -> value, as
`model/gguf.py` reads it back. Only families that our reader and llama.cpp know are written, others
are refused by name. How text is cut before merging is only a name in a GGUF; here it is found by
trying: the cut whose pieces equal the tokenizer's own. Left out: SentencePiece vocabularies,
mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, ModelSpec
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.gguf.convert import ARCHITECTURES
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.gguf.tokenizer import (
    CONTROL_TYPE,
    PRE_TOKENIZERS,
    UNUSED_TYPE,
    USER_DEFINED_TYPE,
    build_tokenizer,
)
from tunesmith.model.hub.validate import read_json

NORMAL = 1
FALLBACK_HINT = "export to merged, which keeps the model's own files"
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Runs of digits, contractions in both cases, white space of all kinds, scripts, marks, signs: every
# known cut differs.
PROBE_TEXT = (
    "It's 7 77 777 7777 77777, 3.14e-05; WE'LL they'd i'M\n\n\n  x\t\ty \r\n\r\n    def f(a_b):\n\treturn a[1:]  \n"
    "naïve e\u0301te\u0301 Zürich-West straße 日本語テキスト 한국어 русский ไทย हिन्दी العربية 12٣٤ ½ Ⅷ "
    "🤗👩\u200d👩\u200d👧 !!??...  //  <b>x</b> {\"k\": [1,2]} a\u00a0b \u3000c HTTPServer2Go foo123bar 1st 2nd   "
)  # fmt: skip


def build_architecture(config: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    """The sizes under llama.cpp's keys, and the rope divisors of Llama 3. InputError for what no
    GGUF here can say."""
    name = spec.model_type
    if name not in ARCHITECTURES:
        families = ", ".join(ARCHITECTURES)
        raise InputError(
            f"cannot write a GGUF of {name}; known: {families}",
            where=str(spec.path),
            fix=FALLBACK_HINT,
        )
    unsupported = {
        "hidden_act": config.get("hidden_act") != "silu",
        "sliding window": config.get("use_sliding_window"),
    }
    if features := [feature for feature, is_unsupported in unsupported.items() if is_unsupported]:
        message = f"a GGUF of {name} cannot say this model's {features[0]}"
        raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)
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
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": spec.vocab_size,
        "rope.dimension_count": spec.head_dim,
        **rope,
    }
    return {f"{name}.{key}": value for key, value in sizes.items()}, rope_factors


def _build_rope(rope: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    rope_type, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    metadata = {"rope.freq_base": theta}
    if rope.get("partial_rotary_factor", 1) == 1:
        if rope_type == "default":
            return metadata, None
        if rope_type == "linear":
            return metadata | {
                "rope.scaling.type": "linear",
                "rope.scaling.factor": float(rope["factor"]),
            }, None
        if rope_type == "llama3" and all(
            rope.get(key) == value for key, value in LLAMA3_ROPE.items()
        ):
            return metadata, _compute_llama3_divisors(theta, float(rope["factor"]), spec.head_dim)
    raise InputError(
        f"cannot write a GGUF with rope {rope}",
        where=str(spec.path / "config.json"),
        fix=FALLBACK_HINT,
    )


def _compute_llama3_divisors(theta: float, factor: float, head_dim: int) -> np.ndarray:
    """1 for short wavelengths, `factor` for long ones, and something between on the way."""
    low_freq_factor, high_freq_factor, original_length = LLAMA3_ROPE.values()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip(
        (original_length / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor),
        0,
        1,
    )
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---------------------------------------------------------------- vocabulary


def build_vocabulary(folder: Path, renderer: Renderer, vocab_size: int) -> Json:
    """Tokens, merges, cut, special tokens and templates. `size`: rows of the embedding, some
    without a token."""
    data, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    added = _read_added_tokens(data, config, folder)
    texts = {index: text for text, index in data["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    token_types = {
        index: CONTROL_TYPE if token["special"] else USER_DEFINED_TYPE
        for index, token in added.items()
    }
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        "tokenizer.ggml.token_type": [
            token_types.get(index, NORMAL if index in texts else UNUSED_TYPE)
            for index in range(vocab_size)
        ],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in data["model"]["merges"]
        ],
        "tokenizer.ggml.add_bos_token": bool(renderer.tokenizer.bos_ids),
        **_collect_special_ids(renderer),
    }
    for name, template in renderer.templates.items():
        metadata["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = (
            template.source
        )
    return metadata | {
        "tokenizer.ggml.pre": _find_pre_tokenizer(folder / "tokenizer.json", metadata)
    }


def _read_added_tokens(data: Json, config: Json, folder: Path) -> dict[int, Json]:
    if data["model"].get("type") != "BPE" or not data["model"].get("merges"):
        message = "only tokenizers of byte-level BPE can be written as GGUF"
        raise InputError(message, where=str(folder / "tokenizer.json"), fix=FALLBACK_HINT)
    added = {token["id"]: token for token in data["added_tokens"]}
    added |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for token in added.values():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            message = f"a GGUF cannot say how {token['content']} treats the text around it"
            raise InputError(message, where=str(folder / "tokenizer.json"), fix=FALLBACK_HINT)
    return added


def _collect_special_ids(renderer: Renderer) -> Json:
    """eos is the token that answers were trained to end with: most engines look at no other. The
    further ones take the two places that are left, the end of texts first."""
    tokenizer = renderer.tokenizer
    end_ids = list(
        dict.fromkeys(
            token_id
            for token_id in (*renderer.end_ids[:1], tokenizer.eos_id, *renderer.end_ids)
            if token_id is not None
        )
    )
    names = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids: dict[str, int | None] = {
        name: tokenizer.token_to_id(tokenizer.special_tokens.get(key, ""))
        for name, key in names.items()
    }
    ids |= dict(zip_longest(("eos", "eot", "eom"), end_ids[:3]))
    metadata: Json = {
        f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None
    }
    return metadata | {"tokenizer.ggml.eos_token_ids": end_ids}


def _find_pre_tokenizer(file: Path, metadata: Json) -> str:
    """The name of the cut that does what the tokenizer does. InputError if none is known, or if ids
    would differ."""
    original = Tokenizer.from_file(str(file))
    pieces = _split_probe(original)
    for name in PRE_TOKENIZERS:
        rebuilt = build_tokenizer(GgufFile(file, metadata | {"tokenizer.ggml.pre": name}, ()))
        if (
            _split_probe(rebuilt) == pieces
            and rebuilt.encode(PROBE_TEXT).ids == original.encode(PROBE_TEXT).ids
        ):
            return name
    message = (
        f"its way to cut text has no name that is known here; known: {', '.join(PRE_TOKENIZERS)}"
    )
    raise InputError(message, where=str(file), fix=FALLBACK_HINT)


def _split_probe(tokenizer: Tokenizer) -> Sequence[str]:
    text = tokenizer.normalizer.normalize_str(PROBE_TEXT) if tokenizer.normalizer else PROBE_TEXT
    return (
        [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if tokenizer.pre_tokenizer
        else [text]
    )
