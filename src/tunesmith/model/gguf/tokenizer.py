"""The tokenizer inside a GGUF file, rebuilt as the tokenizer.json that the original model had.

In: a `GgufFile`. Out: tokenizer.json, tokenizer_config.json and chat_template.jinja in a folder.
A GGUF holds the vocabulary and the merges; how text is cut before merging is only a name, `tokenizer.ggml.pre`. A wrong
cut trains on ids that the model never saw. So each name in PRE_TOKENIZERS is one whose cut was compared with real
tokenizers, and an unknown name is refused. Left out: SentencePiece and Unigram vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.hub.files import TEMPLATES

TEMPLATE_KEY = re.compile(r"tokenizer\.chat_template(?:\.(\w+))?")  # with a name: another one, such as for tools
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
PADDING = re.compile(r"\[PAD\d+\]")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja. InputError for what cannot be rebuilt."""
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(file), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    for key in file.metadata:
        if found := TEMPLATE_KEY.fullmatch(key):
            place = folder / TEMPLATES / f"{found[1]}.jinja" if found[1] else folder / "chat_template.jinja"
            place.parent.mkdir(exist_ok=True)
            place.write_text(file.get(key, str, ""), encoding="utf-8", newline="")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """A byte-level BPE tokenizer with the vocabulary, merges, added tokens and pre-tokenizer of the file."""
    model = file.need("tokenizer.ggml.model", str)
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
    tokenizer = Tokenizer(_bpe(file, whole_words=name == "llama-bpe"))
    PRE_TOKENIZERS[name](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file)
    _begin_with_bos(tokenizer, file)
    return tokenizer


def _bpe(file: GgufFile, *, whole_words: bool) -> BPE:
    tokens = enumerate(zip(file.texts("tokenizer.ggml.tokens"), _kinds(file), strict=True))
    entries = [(token, index) for index, (token, kind) in tokens if not (kind == UNUSED and PADDING.fullmatch(token))]
    vocabulary = dict(entries)
    if len(vocabulary) != len(entries):
        raise InputError("a token stands twice in the vocabulary", where=str(file.path))
    merges = [tuple(merge.split(" ")) for merge in file.texts("tokenizer.ggml.merges")]
    wrong = next((merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocabulary), None)
    if wrong is not None:
        raise InputError(f"the merge {' '.join(wrong)!r} does not fit the vocabulary", where=str(file.path))
    return BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words)  # pyright: ignore[reportArgumentType]


def _kinds(file: GgufFile) -> list[int]:
    tokens = file.texts("tokenizer.ggml.tokens")
    kinds = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise InputError(f"{len(tokens)} tokens but {len(kinds)} token types", where=str(file.path))
    return kinds


def _add_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens = zip(file.texts("tokenizer.ggml.tokens"), _kinds(file), strict=True)
    for token, kind in tokens:
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _begin_with_bos(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if not _adds_bos(file):
        return
    bos = special_token(file, "bos")
    if bos is None:
        raise InputError("the tokenizer adds a first token but names none", where=str(file.path))
    index = file.need("tokenizer.ggml.bos_token_id", int)
    first = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])


def _adds_bos(file: GgufFile) -> bool:
    # llama.cpp adds one for a Llama 3 vocabulary that does not say otherwise.
    return file.get("tokenizer.ggml.add_bos_token", bool, file.get("tokenizer.ggml.pre", str, "") == "llama-bpe")


def special_id(file: GgufFile, name: str) -> int | None:
    """The id of the bos, eos, eot, eom, unknown or padding token, None where the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    index, size = file.need(key, int), len(file.texts("tokenizer.ggml.tokens"))
    if not 0 <= index < size:
        raise InputError(f"{key} {index} is outside the vocabulary of {size}", where=str(file.path))
    return index


def special_token(file: GgufFile, name: str) -> str | None:
    """The text of the token that `special_id` finds."""
    index = special_id(file, name)
    return None if index is None else file.texts("tokenizer.ggml.tokens")[index]


def _config(file: GgufFile) -> dict[str, Any]:
    named = {
        "bos_token": special_token(file, "bos"),
        # A chat model answers until its end of turn; where the file names one, that is what generation waits for.
        "eos_token": special_token(file, "eot") or special_token(file, "eos"),
        "unk_token": special_token(file, "unknown"),
        "pad_token": special_token(file, "padding") or special_token(file, "eos"),
    }
    return {
        # The one class that takes tokenizer.json as it stands; GPT2Tokenizer and others rebuild their own cut.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(file),
        "model_max_length": file.count(f"{file.need('general.architecture', str)}.context_length"),
        **{name: token for name, token in named.items() if token is not None},
    }


def _byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _llama3(tokenizer: Tokenizer) -> None:
    _split(tokenizer, LLAMA3_SPLIT)


def _qwen2(tokenizer: Tokenizer) -> None:
    _split(tokenizer, QWEN2_SPLIT)
    tokenizer.normalizer = normalizers.NFC()


def _split(tokenizer: Tokenizer, pattern: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _byte_level,
    "smollm": _single_digits,
    "llama-bpe": _llama3,
    "qwen2": _qwen2,
}
