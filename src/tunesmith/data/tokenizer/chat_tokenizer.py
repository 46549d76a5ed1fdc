"""The fast tokenizer of a model folder, taken apart: what control tokens there are, and plain text
to ids.

Plain text never becomes a control token here. Added tokens are of three kinds:

    control     marked special, named in the config, or not a tag: only the template writes them
    structural  a tag with its partner (`<think>` `</think>`): also tokens in an assistant's text, text elsewhere
    vocabulary  plain text makes them anyway (line ends in Gemma), or HTML: tokens everywhere, as in any other tokenizer

Those that a recipe adds are vocabulary, or structural where the chat template writes them
(new_tokens.py).

transformers is not used; ids equal those of the tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, NewToken
from tunesmith.data.tokenizer.tokenizer_json import (
    TokenizerErrors,
    append_tokens,
    check_added_tokens,
    parse_tokenizer,
)
from tunesmith.data.tokenizer.word_cache import WordEncoder

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
MAX_PIECE_CHARS = (
    2**18
)  # characters; longer runs are encoded in pieces, since the library takes over 100 bytes a token
BATCH_PIECES = 4  # pieces of a long run that are encoded in one batch
MAX_CACHED_CHARS = 64  # characters; such runs repeat in every row and are remembered
MAX_CACHED_TEXTS = 10_000

_TAG = re.compile(r"<(/?)([A-Za-z][\w.:-]*)>|<(\|?)([A-Za-z][\w.:-]*)(\|?)>|\[(/?)([A-Za-z]\w*)\]")
_HTML_TAGS = frozenset(
    re.findall(
        r"\w+",
        """
        a abbr acronym address applet area article aside audio b base basefont bdi bdo big blockquote body br button
        canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed
        fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe
        img input ins kbd label legend li link main map mark menu meta meter nav noframes noscript object ol optgroup
        option output p param picture pre progress q rp rt ruby s samp script search section select small source span
        strike strong style sub summary sup svg table tbody td template textarea tfoot th thead time title tr track tt u
        ul var video wbr
        """,
    )
)


@dataclass(frozen=True)
class ControlToken:
    """A control or structural token. Strips and `single_word` act on the text around it, as
    tokenizers do."""

    id: int
    text: str
    is_structural: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class ChatTokenizer:
    """Read-only after construction, but for a memory of short texts."""

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Json,
        special_tokens: dict[str, str],
        end_ids: tuple[int, ...],
        new_tokens: Sequence[NewToken] = (),
    ) -> None:
        """`new`: those of the added tokens that are the recipe's."""
        self.new_tokens = tuple(new_tokens)
        data = _override_added_tokens(config, parse_tokenizer(tokenizer_json))
        self.special_tokens = special_tokens
        self.sha256 = hashlib.sha256(
            tokenizer_json + json.dumps(data["added_tokens"]).encode()
        ).hexdigest()
        non_special = {
            token["content"] for token in data["added_tokens"] if not token["special"]
        } - set(special_tokens.values())
        self._start_tokenizer, vocabulary = _make_plain_tokenizer(
            data, non_special, {token.text for token in new_tokens if token.is_ordinary}
        )
        self._rest_tokenizer = _make_variant(data, self._start_tokenizer, should_keep_prefix=True)
        self._continuation_tokenizer = _make_variant(
            data, self._rest_tokenizer, should_keep_prefix=False
        )
        added = [token for token in data["added_tokens"] if token["content"] not in vocabulary]
        new_texts = {token.text for token in new_tokens}
        self.controls = {
            token["content"]: _make_control(token, non_special, new_texts) for token in added
        }
        self.pattern = re.compile(_build_pattern(self.controls))
        self.control_ids = frozenset(control.id for control in self.controls.values())
        unk_ids = {
            self.token_to_id(str(text))
            for text in (data["model"].get("unk_token"), special_tokens.get("unk_token"))
            if text
        }
        self._forbidden_ids = (
            self.control_ids - unk_ids - {data["model"].get("unk_id")}
        )  # what plain text must not give
        self.eos_id = self.token_to_id(special_tokens.get("eos_token", ""))
        self.end_ids = tuple(
            dict.fromkeys([*end_ids, *([self.eos_id] if self.eos_id is not None else [])])
        )
        self.bos_ids = () if config.get("add_bos_token") is False else self._find_leading_ids()
        is_plain = self._start_tokenizer is self._continuation_tokenizer and not vocabulary
        self.word_encoder = (
            WordEncoder.from_tokenizer(data, partial(self._encode, tokenizer=self._start_tokenizer))
            if is_plain
            else None
        )
        self._cache: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        self._prefetched: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        if mismatched := [
            token.text for token in new_tokens if self.token_to_id(token.text) != token.id
        ]:
            raise InputError(
                f"the tokenizer's numbers have holes: it gives {mismatched[0]!r} another one than the next"
            )

    @classmethod
    def from_folder(cls, folder: Path, new_tokens: Sequence[NewToken] = ()) -> ChatTokenizer:
        """With the tokens `new` added to it. Raises InputError if there is no tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                "the model folder has no tokenizer.json",
                where=str(folder),
                fix="give a folder with one",
            )
        config = read_json(folder / "tokenizer_config.json")
        eos_token_id = read_json(folder / "generation_config.json").get("eos_token_id")
        end_ids = (
            tuple(eos_token_id)
            if isinstance(eos_token_id, list)
            else ()
            if eos_token_id is None
            else (eos_token_id,)
        )
        if not all(type(end) is int for end in end_ids):
            message = f"eos_token_id is {str(eos_token_id)[:80]!r}, neither a number nor a list of numbers"
            raise InputError(message, where=str(folder / "generation_config.json"))
        try:
            return cls(
                append_tokens(path.read_bytes(), new_tokens),
                config,
                _read_special_tokens(folder, config),
                end_ids,
                new_tokens,
            )
        except InputError as error:
            raise InputError(error.message, where=str(path), fix=error.fix) from error

    def demote_structural(self, controls: Iterable[ControlToken]) -> None:
        """Make structural tokens that mark turns control tokens, with their partners: an answer
        must not write them."""
        for text in [
            name for control in controls for name in (control.text, _get_partner(control.text))
        ]:
            if text in self.controls:
                self.controls[text] = replace(self.controls[text], is_structural=False)

    @property
    def size(self) -> int:
        """The number behind the last token's."""
        return 1 + max(self._start_tokenizer.get_vocab(with_added_tokens=True).values())

    def token_to_id(self, text: str) -> int | None:
        return self._start_tokenizer.token_to_id(text) if text else None

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Ids of a run of plain text; `at_start` if nothing stands before it in the document."""
        cache = self._cache[is_start]
        cached = cache.get(text)
        if cached is not None:
            return cached
        prefetched = self._prefetched[is_start].get(text)
        ids = (
            [i for part in self.iter_run_ids(text, is_start=is_start) for i in part]
            if prefetched is None
            else self.check_ids(prefetched)
        )
        if len(text) <= MAX_CACHED_CHARS and len(cache) < MAX_CACHED_TEXTS:
            cache[text] = ids
        return ids

    def iter_run_ids(self, text: str, *, is_start: bool) -> Iterator[list[int]]:
        """The ids of a run of any length, piece by piece; a few are encoded together, on all
        cores."""
        remaining = split_text(text, MAX_PIECE_CHARS)
        yield self._encode(
            next(remaining), self._start_tokenizer if is_start else self._rest_tokenizer
        )
        while batch := list(islice(remaining, BATCH_PIECES)):
            with TokenizerErrors():
                encodings = self._continuation_tokenizer.encode_batch_fast(
                    batch, add_special_tokens=False
                )
            yield from (self.check_ids(encoding.ids) for encoding in encodings)

    def encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of whole texts, encoded in one batch on all cores; without long ones, without any
        if one of them cannot be encoded, or where `text_parts` is faster."""
        short_texts = [text for text in texts if len(text) <= MAX_PIECE_CHARS]
        return (
            {}
            if self.word_encoder is not None
            else self._encode_batch(short_texts, self._start_tokenizer)
        )

    def iter_text_ids(self, text: str) -> Iterator[Sequence[int] | np.ndarray]:
        """The ids of a whole text, piece by piece; by its words where that is exact."""
        if self.word_encoder is None:
            yield from self.iter_run_ids(text, is_start=True)
            return
        for piece in split_text(text, MAX_PIECE_CHARS):
            yield self.word_encoder.encode_text(piece)

    def encode_ahead(self, runs: Iterable[tuple[str, bool]]) -> None:
        """Encode runs, (text, at_start) each, in one batch on all cores. `encode` finds them until
        the next batch."""
        texts: tuple[set[str], set[str]] = (set(), set())
        for text, is_start in runs:
            if text not in self._cache[is_start] and len(text) <= MAX_PIECE_CHARS:
                texts[is_start].add(text)
        rest, head = (
            self._encode_batch(list(batch), t)
            for batch, t in zip(texts, (self._rest_tokenizer, self._start_tokenizer), strict=True)
        )
        self._prefetched = rest, head

    def _encode_batch(self, texts: list[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
        try:
            with TokenizerErrors():
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except InputError:
            return {}  # one of the texts; it says so when it is encoded alone
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that goes on from other text: no space is put in front, whatever the
        tokenizer's habit."""
        return self._encode(text, self._continuation_tokenizer)

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        with TokenizerErrors():
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        return self.check_ids(ids)

    def check_ids(self, ids: list[int]) -> list[int]:
        """The same ids. Raises InputError if one of them is a control token's."""
        if not self._forbidden_ids.isdisjoint(ids):
            stray = next(self.decode([token]) for token in ids if token in self._forbidden_ids)
            raise InputError(f"the tokenizer makes the control token {stray!r} from plain text")
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._start_tokenizer.decode(list(tokens), skip_special_tokens=False)

    def can_match_control(self, control: ControlToken, following: str) -> bool:
        """False if normalisation would keep the full tokenizer from finding this token before
        `following`."""
        normalizer = self._start_tokenizer.normalizer
        if not control.normalized or normalizer is None:
            return True
        return normalizer.normalize_str(control.text + following).startswith(control.text)

    def _find_leading_ids(self) -> tuple[int, ...]:
        with_special = self._start_tokenizer.encode("a").ids
        plain = self._start_tokenizer.encode("a", add_special_tokens=False).ids
        count = next(
            n for n in range(len(with_special) + 1) if with_special[n : n + len(plain)] == plain
        )
        return tuple(with_special[:count])


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """A text in pieces of at most so many characters. It is cut before a space between two words,
    where tokens begin anyway; if there is none before another space or line end; if there is none
    anywhere."""
    start = 0
    while len(text) - start > max_chars:
        end = _find_cut(text, start + max_chars // 2, start + max_chars)
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(text: str, low: int, high: int) -> int:
    position = high
    while (position := text.rfind(" ", low, position)) >= 0:
        if text[position - 1].isalpha() and text[position + 1].isalpha():
            return position
    space = max(text.rfind(space, low, high) for space in " \n")
    return space if space >= 0 else high


def _override_added_tokens(config: Json, data: Json) -> Json:
    """Added tokens as tokenizer_config.json has them, where it says otherwise than
    tokenizer.json."""
    tokens = {token["content"]: {"special": False} | token for token in data["added_tokens"]}
    for token_id, token in _iter_decoder_tokens(config.get("added_tokens_decoder") or {}):
        text = token["content"]
        flags = {key: bool(token.get(key)) for key in (*FLAGS, "special")}
        tokens[text] = {
            "content": text,
            "id": tokens[text]["id"] if text in tokens else token_id,
            **flags,
        }
    return data | {"added_tokens": sorted(tokens.values(), key=lambda token: token["id"])}


def _iter_decoder_tokens(tokens: Any) -> Iterator[tuple[int, Json]]:
    """The added tokens of a tokenizer_config.json."""
    if not isinstance(tokens, dict) or not all(
        re.fullmatch(r"\d{1,9}", number) for number in tokens
    ):
        raise InputError(
            "added_tokens_decoder in tokenizer_config.json is no mapping from numbers to tokens"
        )
    for number, token in tokens.items():
        check_added_tokens([{**token, "id": int(number)} if isinstance(token, dict) else token])
        yield int(number), token


def read_json(path: Path) -> Json:
    """An absent file is empty."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("not a JSON object", where=str(path))
    return data


def _read_special_tokens(folder: Path, config: Json) -> dict[str, str]:
    """bos_token and so on, as templates see them; the older special_tokens_map.json counts where it
    still does."""
    merged_config = dict(config)
    if "added_tokens_decoder" not in config:
        merged_config |= read_json(folder / "special_tokens_map.json")
    extra = merged_config.get("extra_special_tokens")
    special_tokens = {name: merged_config.get(name) for name in SPECIAL_TOKEN_NAMES} | (
        extra if isinstance(extra, dict) else {}
    )
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in special_tokens.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _make_plain_tokenizer(
    data: Json, non_special: set[str], ordinary_texts: Container[str]
) -> tuple[Tokenizer, set[str]]:
    """The tokenizer with its control tokens switched off, and which of the `usual` (not special)
    added tokens are vocabulary; the `ordinary` ones are."""
    for token in data["added_tokens"]:
        token["special"] = True  # `encode_special_tokens` switches exactly these off
    tokenizer = _load_tokenizer(data)
    vocabulary = {
        token["content"]
        for token in data["added_tokens"]
        if token["content"] in non_special
        and (
            token["content"] in ordinary_texts
            or _get_tag_name(token["content"]) in _HTML_TAGS
            or tokenizer.encode(token["content"], add_special_tokens=False).ids == [token["id"]]
        )
    }
    if vocabulary:
        for token in data["added_tokens"]:
            token["special"] = token["content"] not in vocabulary
        tokenizer = _load_tokenizer(data)
    return tokenizer, vocabulary


def _load_tokenizer(data: Json) -> Tokenizer:
    with TokenizerErrors():
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _make_variant(data: Json, default: Tokenizer, *, should_keep_prefix: bool) -> Tokenizer:
    """The tokenizer for text that something stands before: without a space that is put in front of
    the first text only, and with `keep_always=False` of every text."""
    components = {
        name: _drop_prefix(data.get(name), should_keep_prefix)
        for name in ("normalizer", "pre_tokenizer")
    }
    return (
        default
        if all(components[name] == data.get(name) for name in components)
        else _load_tokenizer(data | components)
    )


def _drop_prefix(component: Json | None, should_keep_prefix: bool) -> Json | None:
    if component is None:
        return None
    component = dict(component)
    for name in ("normalizers", "pretokenizers"):
        if name in component:
            component[name] = [_drop_prefix(inner, should_keep_prefix) for inner in component[name]]
            component[name] = [inner for inner in component[name] if inner is not None]
    if component["type"] == "Metaspace" and (
        not should_keep_prefix or component.get("prepend_scheme") == "first"
    ):
        component |= {"prepend_scheme": "never", "add_prefix_space": False}
    if component["type"] == "ByteLevel" and not should_keep_prefix:
        component["add_prefix_space"] = False
    return None if component["type"] == "Prepend" and not should_keep_prefix else component


def _make_control(token: Json, non_special: set[str], new_texts: Container[str]) -> ControlToken:
    """`written`: tokens that the recipe adds and the template writes; they need no partner."""
    text = token["content"]
    is_structural = text in new_texts or (text in non_special and _get_partner(text) in non_special)
    return ControlToken(
        token["id"], token["content"], is_structural, **{key: bool(token.get(key)) for key in FLAGS}
    )


def _get_tag_name(text: str) -> str:
    match = _TAG.fullmatch(text)
    return (match[2] or match[4] or match[7]) if match else ""


def _get_partner(text: str) -> str:
    """`</x>` of `<x>`, `<x|>` of `<|x>`, `[/X]` of `[X]`, and back; "" if it is no tag."""
    match = _TAG.fullmatch(text)
    if match is None:
        return ""
    if match[2]:
        return f"<{match[2]}>" if match[1] else f"</{match[2]}>"
    if match[7]:
        return f"[{match[7]}]" if match[6] else f"[/{match[7]}]"
    is_opening, is_closing = bool(match[3]), bool(match[5])
    return (
        "" if is_opening == is_closing else (f"<{match[4]}|>" if is_opening else f"<|{match[4]}>")
    )


def _build_pattern(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest where several begin; a trie, since there may be
    thousands."""
    trie: Json = {}
    for text in texts:
        node = trie
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _build_branches(trie) if trie else "(?!)"


def _build_branches(node: Json) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:  # a loop, so that long texts do not nest
        ((letter, node),) = node.items()
        prefix += re.escape(letter)
    is_end = "" in node
    paths = [re.escape(letter) + _build_branches(child) for letter, child in node.items() if letter]
    if not paths:
        return prefix
    return f"{prefix}(?:{'|'.join(paths)})" + ("?" if is_end else "")
