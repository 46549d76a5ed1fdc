"""What a GGUF says about a model beside its weights: sizes, vocabulary, template, as one dict of metadata.

In: the folder that plain transformers loads, and the run's renderer. Out: key -> value, as `model/gguf.py` reads it
back. Only families that our reader and llama.cpp know are written, others are refused by name. How text is cut before
merging is only a name in a GGUF; here it is found by trying: the cut whose pieces equal the tokenizer's own. Left out:
SentencePiece vocabularies, mixtures of experts.
"""

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
from tunesmith.model.gguf.tokenizer import CONTROL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, build_tokenizer
from tunesmith.model.hub.validate import read_json

NORMAL = 1
ANOTHER = "export to merged, which keeps the model's own files"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Runs of digits, contractions in both cases, white space of all kinds, scripts, marks, signs: every known cut differs.
PROBE = (
    "It's 7 77 777 7777 77777, 3.14e-05; WE'LL they'd i'M\n\n\n  x\t\ty \r\n\r\n    def f(a_b):\n\treturn a[1:]  \n"
    "naïve e\u0301te\u0301 Zürich-West straße 日本語テキスト 한국어 русский ไทย हिन्दी العربية 12٣٤ ½ Ⅷ "
    "🤗👩\u200d👩\u200d👧 !!??...  //  <b>x</b> {\"k\": [1,2]} a\u00a0b \u3000c HTTPServer2Go foo123bar 1st 2nd   "
)  # fmt: skip


def architecture(config: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    """The sizes under llama.cpp's keys, and the rope divisors of Llama 3. InputError for what no GGUF here can say."""
    name = spec.model_type
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"cannot write a GGUF of {name}; known: {known}", where=str(spec.path), fix=ANOTHER)
    odd = {"hidden_act": config.get("hidden_act") != "silu", "sliding window": config.get("use_sliding_window")}
    if found := [what for what, is_odd in odd.items() if is_odd]:
        what = f"a GGUF of {name} cannot say this model's {found[0]}"
        raise InputError(what, where=str(spec.path / "config.json"), fix=ANOTHER)
    rope, factors = _rope(config["rope_parameters"], spec)
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
    return {f"{name}.{key}": value for key, value in sizes.items()}, factors


def _rope(rope: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    base = {"rope.freq_base": theta}
    if rope.get("partial_rotary_factor", 1) == 1:
        if kind == "default":
            return base, None
        if kind == "linear":
            return base | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, None
        if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3_ROPE.items()):
            return base, _llama3_divisors(theta, float(rope["factor"]), spec.head_dim)
    raise InputError(f"cannot write a GGUF with rope {rope}", where=str(spec.path / "config.json"), fix=ANOTHER)


def _llama3_divisors(theta: float, factor: float, head_dim: int) -> np.ndarray:
    """1 for short wavelengths, `factor` for long ones, and something between on the way."""
    low, high, original = LLAMA3_ROPE.values()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---------------------------------------------------------------- vocabulary


def vocabulary(folder: Path, renderer: Renderer, size: int) -> Json:
    """Tokens, merges, cut, special tokens and templates. `size`: rows of the embedding, some without a token."""
    data, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    added = _added_tokens(data, config, folder)
    texts = {index: text for text, index in data["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    kinds = {index: CONTROL if token["special"] else USER_DEFINED for index, token in added.items()}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [texts.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": [kinds.get(i, NORMAL if i in texts else UNUSED) for i in range(size)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": bool(renderer.tokenizer.bos),
        **_special_ids(renderer),
    }
    for name, template in renderer.templates.items():
        metadata["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = template.source
    return metadata | {"tokenizer.ggml.pre": _cut(folder / "tokenizer.json", metadata)}


def _added_tokens(data: Json, config: Json, folder: Path) -> dict[int, Json]:
    if data["model"].get("type") != "BPE" or not data["model"].get("merges"):
        what = "only tokenizers of byte-level BPE can be written as GGUF"
        raise InputError(what, where=str(folder / "tokenizer.json"), fix=ANOTHER)
    added = {token["id"]: token for token in data["added_tokens"]}
    added |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for token in added.values():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            what = f"a GGUF cannot say how {token['content']} treats the text around it"
            raise InputError(what, where=str(folder / "tokenizer.json"), fix=ANOTHER)
    return added


def _special_ids(renderer: Renderer) -> Json:
    """eos is the token that answers were trained to end with: most engines look at no other. The further ones take
    the two places that are left, the end of texts first."""
    tokenizer = renderer.tokenizer
    ends = list(dict.fromkeys(i for i in (*renderer.end_ids[:1], tokenizer.eos_id, *renderer.end_ids) if i is not None))
    names = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids: dict[str, int | None] = {name: tokenizer.id(tokenizer.named.get(key, "")) for name, key in names.items()}
    ids |= dict(zip_longest(("eos", "eot", "eom"), ends[:3]))
    found: Json = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    return found | {"tokenizer.ggml.eos_token_ids": ends}


def _cut(file: Path, metadata: Json) -> str:
    """The name of the cut that does what the tokenizer does. InputError if none is known, or if ids would differ."""
    original = Tokenizer.from_file(str(file))
    pieces = _pieces(original)
    for name in PRE_TOKENIZERS:
        rebuilt = build_tokenizer(GgufFile(file, metadata | {"tokenizer.ggml.pre": name}, ()))
        if _pieces(rebuilt) == pieces and rebuilt.encode(PROBE).ids == original.encode(PROBE).ids:
            return name
    what = f"its way to cut text has no name that is known here; known: {', '.join(PRE_TOKENIZERS)}"
    raise InputError(what, where=str(file), fix=ANOTHER)


def _pieces(tokenizer: Tokenizer) -> Sequence[str]:
    text = tokenizer.normalizer.normalize_str(PROBE) if tokenizer.normalizer else PROBE
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] if tokenizer.pre_tokenizer else [text]
