"""A tokenizer.json as a stranger's file: parsed, bounded, and handed to the tokenizers library.

    parse(bytes) -> Json             a known model, and no step that blows text up
    check_tokens(list)               added tokens with a text, an id and yes-or-no flags
    with ItsErrors(): ...            what the library cannot use becomes an InputError
    with_tokens(bytes, new) -> bytes the file with tokens added

The library itself trusts the file. A normalizer that replaces one letter by a megabyte fills the
memory, an empty added token matches everywhere, and a broken pattern ends in a panic of Rust. Left
out: the meaning of the tokens (tokenizer.py)."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, NewToken

MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
MAX_BYTES = 64 * 2**20
MAX_GROWTH = 64  # letters that all steps together may write for one
MAX_STEPS = 200
MAX_TOKEN_CHARS = 1024  # characters of an added token
MAX_WORD_CHARS = 1000  # characters that WordPiece looks at, in time that grows with their square
MAX_AFFIX_CHARS = 16  # characters that BPE and WordPiece put around the parts of a word


def parse_tokenizer(tokenizer_json: bytes) -> Json:
    """Without its truncation and padding. Raises InputError; the caller adds the place."""
    if len(tokenizer_json) > MAX_BYTES:
        raise InputError(
            f"the tokenizer.json has {len(tokenizer_json):,} bytes, more than {MAX_BYTES:,}"
        )
    try:
        data = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the tokenizer.json is not valid JSON: {error}") from error
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or "added_tokens" not in data:
        raise InputError("the tokenizer.json has no added_tokens or no model")
    if model.get("type", "BPE") not in MODELS:
        raise InputError(f"the tokenizer.json has the unknown model {model['type']!r:.80}")
    check_added_tokens(data["added_tokens"])
    _check_model(model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        _check_growth(name, data.get(name))
    return data | {"truncation": None, "padding": None}


def append_tokens(tokenizer_json: bytes, new: Sequence[NewToken]) -> bytes:
    """A sound file with tokens added as transformers adds plain ones: found in any text, before
    normalisation."""
    if not new:
        return tokenizer_json
    data = json.loads(tokenizer_json)
    data["added_tokens"] += [
        {"id": t.id, "content": t.text} | dict.fromkeys(FLAGS, False) for t in new
    ]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class TokenizerErrors:
    """The library raises plain Exception, and where Rust gives up PanicException, which is none and
    cannot be imported: a pattern that goes back and forth without end is stopped so, after half a
    minute. All else goes on its way."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if (
            kind is Exception
            or isinstance(error, UnicodeError)
            or (kind and kind.__name__ == "PanicException")
        ):
            message = f"the tokenizers library cannot use this tokenizer: {str(error)[:300]}"
            raise InputError(message, fix="download the model again") from None


def check_added_tokens(tokens: Any) -> None:
    for token in tokens if isinstance(tokens, list) else [tokens]:
        text = token.get("content") if isinstance(token, dict) else None
        if (
            not isinstance(text, str)
            or not 0 < len(text) <= MAX_TOKEN_CHARS
            or type(token.get("id")) is not int
        ):
            raise InputError(f"an added token has no sound text and number: {str(token)[:80]}")
        if any(not isinstance(token.get(flag, False), bool) for flag in FLAGS):
            raise InputError(
                f"the added token {text!r:.80} has a flag that is neither true nor false"
            )


def _check_model(model: Json) -> None:
    max_word_chars = model.get("max_input_chars_per_word") or 0
    affixes = [
        model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")
    ]
    if (
        type(max_word_chars) is not int
        or max_word_chars > MAX_WORD_CHARS
        or any(len(str(affix)) > MAX_AFFIX_CHARS for affix in affixes)
    ):
        raise InputError("the tokenizer's model has an absurd prefix, suffix or length of words")
    if model.get("dropout"):
        message = f"the tokenizer leaves out merges at random (dropout {model['dropout']!r:.80}): no text has fixed ids"
        raise InputError(message, fix="set dropout to null in tokenizer.json")


def _check_growth(name: str, component: Any) -> None:
    steps = list(_iter_steps(component))
    growth = math.prod(max(1, _estimate_growth(step)) for step in steps)
    if len(steps) > MAX_STEPS or growth > MAX_GROWTH:
        message = f"the tokenizer's {name} has {len(steps)} steps that write up to {growth:,} letters for one"
        raise InputError(
            message, fix=f"no tokenizer needs more than {MAX_GROWTH}; do not use this model"
        )


def _iter_steps(component: Any) -> Iterator[Json]:
    """The parts of a normalizer, pre-tokenizer or decoder, sequences opened."""
    todo = [component]
    while todo:
        step = todo.pop()
        if isinstance(step, dict):
            yield step
            todo += [inner for value in step.values() if isinstance(value, list) for inner in value]


def _estimate_growth(step: Json) -> int:
    """Letters that a step may write for one."""
    content = step.get("content")
    if isinstance(content, str):
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        return math.ceil(len(content) / max(1, len(replaced) if isinstance(replaced, str) else 1))
    if isinstance(step.get("prepend"), str):
        return len(step["prepend"])
    if isinstance(step.get("replacement"), str):
        return len(step["replacement"])
    if isinstance(step.get("precompiled_charsmap"), str):
        return _measure_charsmap(step["precompiled_charsmap"])
    return 1


def _measure_charsmap(charsmap: str) -> int:
    """The longest text behind the trie of a SentencePiece table, whose length stands in front."""
    try:
        raw = base64.b64decode(charsmap, validate=True)
    except ValueError as error:
        raise InputError(f"the tokenizer's precompiled_charsmap is damaged: {error}") from error
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(len(text.decode("utf-8", "replace")) for text in texts)
