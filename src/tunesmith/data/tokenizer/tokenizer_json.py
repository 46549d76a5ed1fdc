"""Validate an untrusted tokenizer.json before the tokenizers library sees it.

    parse_tokenizer(bytes) -> Json       a supported model, and no step that expands text
    check_added_tokens(tokens)           each with a text, an id and boolean flags
    append_tokens(bytes, new) -> bytes   the file with tokens added
    with TokenizerErrors(): ...          errors of the library become InputError

The library trusts the file: a normalizer that replaces one letter by a megabyte fills the memory,
an empty added token matches everywhere, and a broken pattern ends in a Rust panic. Left out: the
meaning of the tokens (`chat_tokenizer.py`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import count_json_marks, describe_json_error
from tunesmith.core.types import Json, NewToken

# What a tokenizer.json of wrong types or depth raises while it is taken apart.
UNUSABLE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    re.error,
)
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
MAX_BYTES = 64 * 2**20
MAX_VALUES = 3_000_000  # commas and brackets: 262,144 tokens and their merges have 1.9 million
MAX_VOCAB = 400_000
MAX_GROWTH = 64  # characters that all steps together may write for one
MAX_STEPS = 24  # real ones have up to ten
BYTE_LEVEL_GROWTH = 4  # a character of four bytes becomes four
MAX_ID = 2**31
MAX_TOKEN_CHARS = 1024  # per added token
MAX_ADDED_CHARS = 1_000_000  # of all added tokens
MAX_LEADING = 8  # tokens before plain text
MAX_POST_PROCESSOR_CHARS = 20_000
MAX_UNIGRAM_CHARS = 64  # per token of a Unigram vocabulary, whose time is their product
MAX_WORD_CHARS = 1000  # max_input_chars_per_word of WordPiece, which takes quadratic time
MAX_AFFIX_CHARS = 16  # prefix or suffix of subwords


def parse_tokenizer(tokenizer_json: bytes) -> Json:
    """Return the tokenizer without truncation and padding. Raises InputError; the caller adds the
    path."""
    if len(tokenizer_json) > MAX_BYTES:
        raise InputError(
            f"the tokenizer.json has {len(tokenizer_json):,} bytes, more than {MAX_BYTES:,}"
        )
    if count_json_marks(tokenizer_json) > MAX_VALUES:
        message = f"the tokenizer.json has more than {MAX_VALUES:,} commas and brackets"
        raise InputError(message, fix="no tokenizer needs that many; do not use this model")
    try:
        data = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        message = f"the tokenizer.json cannot be read: {describe_json_error(error)}"
        raise InputError(message) from error
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or "added_tokens" not in data:
        raise InputError("the tokenizer.json has no added_tokens or no model")
    if model.get("type", "BPE") not in MODELS:
        raise InputError(f"the tokenizer.json has the unknown model {model['type']!r:.80}")
    check_added_tokens(data["added_tokens"])
    _check_model(model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        _check_growth(name, data.get(name))
    num_chars = len(json.dumps(data.get("post_processor")))
    if num_chars > MAX_POST_PROCESSOR_CHARS:
        message = f"the tokenizer's post_processor has {num_chars:,} characters"
        fix = f"no tokenizer needs more than {MAX_POST_PROCESSOR_CHARS:,}; do not use this model"
        raise InputError(message, fix=fix)
    return data | {"truncation": None, "padding": None}


def append_tokens(tokenizer_json: bytes, new: Sequence[NewToken]) -> bytes:
    """Return a valid file with tokens added as transformers adds plain ones: matched in any text,
    before normalization."""
    if not new:
        return tokenizer_json
    data = json.loads(tokenizer_json)
    for token in new:
        flags = dict.fromkeys(FLAGS, False)
        data["added_tokens"].append({"id": token.id, "content": token.text} | flags)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class TokenizerErrors:
    """Turn errors of the tokenizers library into InputError.

    The library raises plain Exception, and PanicException if Rust panics (such as a pattern that
    backtracks for half a minute), which is no Exception and cannot be imported. Other errors pass
    unchanged, except those of `kinds`."""

    def __init__(self, *kinds: type[Exception]) -> None:
        self.kinds = kinds

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        is_panic = kind is not None and kind.__name__ == "PanicException"
        if isinstance(error, InputError):
            return
        if kind is Exception or isinstance(error, (UnicodeError, *self.kinds)) or is_panic:
            message = f"the tokenizers library cannot use this tokenizer: {str(error)[:300]}"
            raise InputError(message, fix="download the model again") from None


def check_added_tokens(tokens: Any) -> None:
    """Raise InputError for an added token without a valid text, id and flags."""
    num_chars = 0
    for token in tokens if isinstance(tokens, list) else [tokens]:
        text = token.get("content") if isinstance(token, dict) else None
        has_text = isinstance(text, str) and 0 < len(text) <= MAX_TOKEN_CHARS
        token_id = token.get("id") if isinstance(token, dict) else None
        if not has_text or type(token_id) is not int or not 0 <= token_id < MAX_ID:
            message = f"an added token has no valid text and id: {str(token)[:80]}"
            raise InputError(message, fix="correct or remove it in tokenizer.json")
        num_chars += len(str(text))
        if num_chars > MAX_ADDED_CHARS:
            message = f"the added tokens have more than {MAX_ADDED_CHARS:,} characters together"
            raise InputError(message, fix="do not use this model")
        if any(not isinstance(token.get(flag, False), bool) for flag in FLAGS):
            raise InputError(f"the added token {text!r:.80} has a flag that is not a boolean")


def _check_model(model: Json) -> None:
    max_word_chars = model.get("max_input_chars_per_word") or 0
    if type(max_word_chars) is not int or max_word_chars > MAX_WORD_CHARS:
        raise InputError("the tokenizer's max_input_chars_per_word is out of range")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > MAX_AFFIX_CHARS:
            raise InputError(f"the tokenizer's {name} is too long")
    vocab = model.get("vocab")
    if isinstance(vocab, (dict, list)) and len(vocab) > MAX_VOCAB:
        message = f"the tokenizer's vocabulary has {len(vocab):,} tokens, more than {MAX_VOCAB:,}"
        raise InputError(message, fix="do not use this model")
    if model.get("type") == "Unigram" and isinstance(vocab, list):
        longest = max((len(str(entry[0])) for entry in vocab if entry), default=0)
        if longest > MAX_UNIGRAM_CHARS:
            message = f"the tokenizer's Unigram vocabulary has a token of {longest:,} characters"
            fix = f"no tokenizer needs more than {MAX_UNIGRAM_CHARS}; do not use this model"
            raise InputError(message, fix=fix)
    if model.get("dropout"):
        message = f"the tokenizer has BPE dropout ({model['dropout']!r:.80}): no text has fixed ids"
        raise InputError(message, fix="set dropout to null in tokenizer.json")


def _check_growth(name: str, component: Any) -> None:
    steps = list(iter_steps(component))
    growth = math.prod(max(1, count_written_chars(step)) for step in steps)
    if len(steps) > MAX_STEPS or growth > MAX_GROWTH:
        message = (
            f"the tokenizer's {name} expands text up to {growth:,} times (steps: {len(steps)})"
        )
        fix = f"no tokenizer needs more than {MAX_GROWTH}; do not use this model"
        raise InputError(message, fix=fix)


def iter_steps(component: Any) -> Iterator[Json]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, inside sequences too."""
    todo = [component]
    while todo:
        step = todo.pop()
        if isinstance(step, dict):
            yield step
            for value in step.values():
                todo += value if isinstance(value, list) else []


def count_written_chars(step: Json) -> int:
    """Return how many characters a step may write for one."""
    if step.get("type") == "ByteLevel":
        return BYTE_LEVEL_GROWTH
    content = step.get("content")
    if isinstance(content, str):
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        num_replaced = len(replaced) if isinstance(replaced, str) else 1
        return math.ceil(len(content) / max(1, num_replaced))
    if isinstance(step.get("prepend"), str):
        return len(step["prepend"])
    if isinstance(step.get("replacement"), str):
        return len(step["replacement"])
    return 1
