"""Rebuild the original tokenizer.json from the tokenizer inside a GGUF file.

In: a `GgufFile`. Out: tokenizer.json, tokenizer_config.json and chat_template.jinja in a folder. A
GGUF holds the vocabulary and the merges; how text is split before merging is only a name,
`tokenizer.ggml.pre`. A wrong split trains on ids that the model never saw: transformers ignores
that of SmolLM2, and 516 of 4,000 texts got other ids. So PRE_TOKENIZERS lists only names whose
split was compared with real tokenizers, and other names are refused. The vocabulary of Gemma 3 is
left to transformers. Left out: other SentencePiece and Unigram vocabularies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers.integrations.gguf import (
    convert_gguf_tokenizer,  # pyright: ignore[reportPrivateImportUsage]
)

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.hub.validate import TEMPLATES_DIR

# with a name: another template, such as for tools
TEMPLATE_KEY = re.compile(r"tokenizer\.chat_template(?:\.(\w+))?")
CONTROL_TYPE = 3
USER_DEFINED_TYPE = 4
UNUSED_TYPE = 5
PADDING_TOKEN = re.compile(r"\[PAD\d+\]")
MAX_TOKEN_CHARS = 1024
USE_SAFETENSORS_FIX = "use the model's safetensors folder, which has a tokenizer.json"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates. Raise InputError if they
    cannot be rebuilt."""
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(_build_config(file), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    for key in file.metadata:
        match = TEMPLATE_KEY.fullmatch(key)
        if match is None:
            continue
        path = folder / "chat_template.jinja"
        if match[1]:
            path = folder / TEMPLATES_DIR / f"{match[1]}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(file.get(key, str, ""), encoding="utf-8", newline="")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """Return a byte-level BPE tokenizer with the vocabulary, merges, added tokens and pre-tokenizer
    of the file."""
    model = file.require("tokenizer.ggml.model", str)
    if model == "llama" and file.get("general.architecture", str, "") == "gemma3":
        return _build_gemma3(file)
    if model != "gpt2":
        message = (
            f"tokenizer.ggml.model is {model!r}; only gpt2, and llama of Gemma 3, can be rebuilt"
        )
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    name = file.get("tokenizer.ggml.pre", str, "(missing)")
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        message = f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre); supported: {supported}"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    tokenizer = Tokenizer(_build_bpe(file, ignore_merges=name == "llama-bpe"))
    set_pre_tokenizer(tokenizer, name)
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in _list_tokens(file):
        if token_type == CONTROL_TYPE:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED_TYPE:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    _add_bos_processor(tokenizer, file)
    return tokenizer


def _build_gemma3(file: GgufFile) -> Tokenizer:
    """Return Gemma's tokenizer; the file has no merges, and the order of the tokens says them."""
    types = dict(_list_tokens(file))
    if len(types) != len(file.get_strings("tokenizer.ggml.tokens")):
        raise InputError("a token is repeated in the vocabulary", where=str(file.path))
    if max(map(len, types)) > MAX_TOKEN_CHARS:  # each is cut at each of its characters
        raise InputError(f"a token has over {MAX_TOKEN_CHARS} characters", where=str(file.path))
    content = {
        "tokenizer_type": "llama",
        "tokens": list(types),
        "token_type": list(types.values()),
        "unk_token_id": find_special_id(file, "unknown"),
    }
    tokenizer, _ = convert_gguf_tokenizer("gemma3", content)
    _add_bos_processor(tokenizer, file)
    return tokenizer


def _build_bpe(file: GgufFile, *, ignore_merges: bool) -> BPE:
    vocabulary: dict[str, int] = {}
    for index, (token, token_type) in enumerate(_list_tokens(file)):
        if token_type == UNUSED_TYPE and PADDING_TOKEN.fullmatch(token):
            continue
        if token in vocabulary:
            message = f"the token {token!r:.80} is repeated in the vocabulary"
            raise InputError(message, where=str(file.path))
        vocabulary[token] = index
    merges: list[tuple[str, str]] = []
    for merge in file.get_strings("tokenizer.ggml.merges"):
        first, separator, second = merge.partition(" ")
        if not separator or " " in second or first + second not in vocabulary:
            message = f"the merge {merge!r} does not match the vocabulary"
            raise InputError(message, where=str(file.path))
        merges.append((first, second))
    return BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)


def _list_tokens(file: GgufFile) -> list[tuple[str, int]]:
    """Return (token, type) in the order of the ids."""
    tokens = file.get_strings("tokenizer.ggml.tokens")
    token_types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(token_types) != len(tokens):
        message = f"{len(tokens)} tokens but {len(token_types)} token types"
        raise InputError(message, where=str(file.path))
    return list(zip(tokens, token_types, strict=True))


def _add_bos_processor(tokenizer: Tokenizer, file: GgufFile) -> None:
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = byte_level
    if not _should_add_bos(file):
        return
    bos = find_special_token(file, "bos")
    if bos is None:
        raise InputError("the tokenizer adds a bos token but names none", where=str(file.path))
    index = file.require("tokenizer.ggml.bos_token_id", int)
    bos_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    tokenizer.post_processor = processors.Sequence([byte_level, bos_processor])


def _should_add_bos(file: GgufFile) -> bool:
    # llama.cpp adds one for a Llama 3 vocabulary unless the file says otherwise
    is_llama3 = file.get("tokenizer.ggml.pre", str, "") == "llama-bpe"
    return file.get("tokenizer.ggml.add_bos_token", bool, is_llama3)


def find_special_id(file: GgufFile, name: str) -> int | None:
    """Return the id of the bos, eos, eot, eom, unknown or padding token, None if the file names
    none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    index = file.require(key, int)
    size = len(file.get_strings("tokenizer.ggml.tokens"))
    if not 0 <= index < size:
        message = f"{key} {index} is outside the vocabulary of {size}"
        raise InputError(message, where=str(file.path))
    return index


def find_special_token(file: GgufFile, name: str) -> str | None:
    """Return the text of the token that `find_special_id` returns."""
    index = find_special_id(file, name)
    return None if index is None else file.get_strings("tokenizer.ggml.tokens")[index]


def _build_config(file: GgufFile) -> dict[str, Any]:
    architecture = file.require("general.architecture", str)
    eos = find_special_token(file, "eos")
    special_tokens = {
        "bos_token": find_special_token(file, "bos"),
        # a chat model's answer ends with its end of turn, if the file names one
        "eos_token": find_special_token(file, "eot") or eos,
        "unk_token": find_special_token(file, "unknown"),
        "pad_token": find_special_token(file, "padding") or eos,
    }
    config: dict[str, Any] = {
        # the class that loads tokenizer.json unchanged; GPT2Tokenizer and others rebuild the split
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _should_add_bos(file),
        "model_max_length": file.get_count(f"{architecture}.context_length"),
    }
    for name, token in special_tokens.items():
        if token is not None:
            config[name] = token
    return config


# ---------------------------------------------------------------- how text is split before merging


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-bpe": _split_by(LLAMA3_SPLIT),
    "qwen2": _split_by(QWEN2_SPLIT),
}


def set_pre_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Let a tokenizer split text as `tokenizer.ggml.pre` says."""
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
