"""The tokenizer inside a GGUF file, rebuilt as the tokenizer.json that the original model had.

In: a `GgufFile`. Out: tokenizer.json, tokenizer_config.json and chat_template.jinja in a folder. A
GGUF holds the vocabulary and the merges; how text is cut before merging is only a name,
`tokenizer.ggml.pre`. A wrong cut trains on ids that the model never saw. So each name in
PRE_TOKENIZERS is one whose cut was compared with real tokenizers, and an unknown name is refused.
Left out: SentencePiece and Unigram vocabularies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.hub.validate import TEMPLATES_DIR

TEMPLATE_KEY = re.compile(
    r"tokenizer\.chat_template(?:\.(\w+))?"
)  # with a name: another one, such as for tools
CONTROL_TYPE, USER_DEFINED_TYPE, UNUSED_TYPE = 3, 4, 5
PADDING_TOKEN = re.compile(r"\[PAD\d+\]")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja. InputError for what
    cannot be rebuilt."""
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(_build_config(file), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    for key in file.metadata:
        if match := TEMPLATE_KEY.fullmatch(key):
            path = (
                folder / TEMPLATES_DIR / f"{match[1]}.jinja"
                if match[1]
                else folder / "chat_template.jinja"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_text(file.get(key, str, ""), encoding="utf-8", newline="")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """A byte-level BPE tokenizer with the vocabulary, merges, added tokens and pre-tokenizer of the
    file."""
    model = file.require("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise InputError(
            f"cannot rebuild a tokenizer of kind {model!r} (tokenizer.ggml.model); only byte-level BPE (gpt2)",
            where=str(file.path),
            fix="use the model's safetensors folder, which holds its own tokenizer.json",
        )
    name = file.get("tokenizer.ggml.pre", str, "(missing)")
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre); known: {', '.join(sorted(PRE_TOKENIZERS))}",
            where=str(file.path),
            fix="use the model's safetensors folder, which holds its own tokenizer.json",
        )
    tokenizer = Tokenizer(_build_bpe(file, ignore_merges=name == "llama-bpe"))
    PRE_TOKENIZERS[name](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file)
    _add_bos_processor(tokenizer, file)
    return tokenizer


def _build_bpe(file: GgufFile, *, ignore_merges: bool) -> BPE:
    tokens = enumerate(
        zip(file.get_strings("tokenizer.ggml.tokens"), _read_token_types(file), strict=True)
    )
    entries = [
        (token, index)
        for index, (token, token_type) in tokens
        if not (token_type == UNUSED_TYPE and PADDING_TOKEN.fullmatch(token))
    ]
    vocabulary = dict(entries)
    if len(vocabulary) != len(entries):
        raise InputError("a token stands twice in the vocabulary", where=str(file.path))
    merges = [tuple(merge.split(" ")) for merge in file.get_strings("tokenizer.ggml.merges")]
    bad_merge = next(
        (merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocabulary), None
    )
    if bad_merge is not None:
        raise InputError(
            f"the merge {' '.join(bad_merge)!r} does not fit the vocabulary", where=str(file.path)
        )
    return BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)  # pyright: ignore[reportArgumentType]


def _read_token_types(file: GgufFile) -> list[int]:
    tokens = file.get_strings("tokenizer.ggml.tokens")
    token_types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(token_types) != len(tokens):
        raise InputError(
            f"{len(tokens)} tokens but {len(token_types)} token types", where=str(file.path)
        )
    return token_types


def _add_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens = zip(file.get_strings("tokenizer.ggml.tokens"), _read_token_types(file), strict=True)
    for token, token_type in tokens:
        if token_type == CONTROL_TYPE:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED_TYPE:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_bos_processor(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if not _should_add_bos(file):
        return
    bos = find_special_token(file, "bos")
    if bos is None:
        raise InputError("the tokenizer adds a first token but names none", where=str(file.path))
    index = file.require("tokenizer.ggml.bos_token_id", int)
    bos_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_processor]
    )


def _should_add_bos(file: GgufFile) -> bool:
    # llama.cpp adds one for a Llama 3 vocabulary that does not say otherwise.
    return file.get(
        "tokenizer.ggml.add_bos_token", bool, file.get("tokenizer.ggml.pre", str, "") == "llama-bpe"
    )


def find_special_id(file: GgufFile, name: str) -> int | None:
    """The id of the bos, eos, eot, eom, unknown or padding token, None where the file names
    none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    index, size = file.require(key, int), len(file.get_strings("tokenizer.ggml.tokens"))
    if not 0 <= index < size:
        raise InputError(f"{key} {index} is outside the vocabulary of {size}", where=str(file.path))
    return index


def find_special_token(file: GgufFile, name: str) -> str | None:
    """The text of the token that `special_id` finds."""
    index = find_special_id(file, name)
    return None if index is None else file.get_strings("tokenizer.ggml.tokens")[index]


def _build_config(file: GgufFile) -> dict[str, Any]:
    special_tokens = {
        "bos_token": find_special_token(file, "bos"),
        # A chat model answers until its end of turn; where the file names one, that is what
        # generation waits for.
        "eos_token": find_special_token(file, "eot") or find_special_token(file, "eos"),
        "unk_token": find_special_token(file, "unknown"),
        "pad_token": find_special_token(file, "padding") or find_special_token(file, "eos"),
    }
    return {
        # The one class that takes tokenizer.json as it stands; GPT2Tokenizer and others rebuild
        # their own cut.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _should_add_bos(file),
        "model_max_length": file.get_count(
            f"{file.require('general.architecture', str)}.context_length"
        ),
        **{name: token for name, token in special_tokens.items() if token is not None},
    }


def _set_byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _set_single_digits(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _set_llama3_split(tokenizer: Tokenizer) -> None:
    _set_regex_split(tokenizer, LLAMA3_SPLIT)


def _set_qwen2_split(tokenizer: Tokenizer) -> None:
    _set_regex_split(tokenizer, QWEN2_SPLIT)
    tokenizer.normalizer = normalizers.NFC()


def _set_regex_split(tokenizer: Tokenizer, pattern: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _set_byte_level,
    "smollm": _set_single_digits,
    "llama-bpe": _set_llama3_split,
    "qwen2": _set_qwen2_split,
}
