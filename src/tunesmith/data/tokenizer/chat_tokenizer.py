"""The fast tokenizer of a model folder, taken apart: its control tokens, and plain text to ids.

Plain text never becomes a control token here. Added tokens are of three kinds:

    control      marked special, named in the config, or not a tag: only the template writes them
    structural   a tag with its partner (`<think>` `</think>`): also tokens in an assistant's text,
                 plain text elsewhere
    vocabulary   made by plain text anyway (line ends in Gemma), or HTML: tokens everywhere

Tokens that a recipe adds are vocabulary, or structural if the chat template writes them
(`added_tokens.py`). transformers is not used; ids equal those of the tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_file, read_json_object
from tunesmith.core.types import Json, NewToken
from tunesmith.data.tokenizer.guarded_tokenizer import GuardedTokenizer, needs_guard
from tunesmith.data.tokenizer.pieces import (
    MAX_PIECE_CHARS,
    WordEncoder,
    estimate_growth,
    split_grown_text,
    split_text,
)
from tunesmith.data.tokenizer.tokenizer_json import (
    MAX_LEADING,
    UNUSABLE_ERRORS,
    TokenizerErrors,
    append_tokens,
    check_added_tokens,
    parse_tokenizer,
)

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
MAX_BATCH_BYTES = 2**20  # encoded in one call, which nothing can interrupt
MAX_ROW_TOKENS = 2**20  # of a row that is held as a list; texts that are packed are not
TOO_LONG_FIX = "split the row: it is longer than the context of any model"
MAX_CACHED_CHARS = 64  # such runs repeat in every row and are cached
MAX_CACHED_TEXTS = 10_000
PATTERN_COMPONENTS = ("normalizer", "pre_tokenizer", "decoder")
AnyTokenizer = Tokenizer | GuardedTokenizer
MAX_PATTERN_CHARS = 500_000  # compiled in some seconds
MAX_PATTERN_DEPTH = 50  # nested groups; deeper, endings are listed

_TAG = re.compile(r"<(/?)([A-Za-z][\w.:-]*)>|<(\|?)([A-Za-z][\w.:-]*)(\|?)>|\[(/?)([A-Za-z]\w*)\]")
_HTML_TAGS = frozenset(
    re.findall(
        r"\w+",
        """
        a abbr acronym address applet area article aside audio b base basefont bdi bdo big
        blockquote body br button canvas caption center cite code col colgroup data datalist dd
        del details dfn dialog dir div dl dt em embed fieldset figcaption figure font footer form
        frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img input ins kbd
        label legend li link main map mark menu meta meter nav noframes noscript object ol
        optgroup option output p param picture pre progress q rp rt ruby s samp script search
        section select small source span strike strong style sub summary sup svg table tbody td
        template textarea tfoot th thead time title tr track tt u ul var video wbr
        """,
    )
)


@dataclass(frozen=True)
class ControlToken:
    """A control or structural token. lstrip, rstrip and single_word act on the text around it, as
    in the tokenizers library."""

    id: int
    text: str
    is_structural: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class ChatTokenizer:
    """Read-only after construction, except for caches."""

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Json,
        special_tokens: dict[str, str],
        end_ids: tuple[int, ...],
        new_tokens: Sequence[NewToken] = (),
        embedding_rows: int | None = None,
    ) -> None:
        """`new_tokens` are those added tokens that come from the recipe. No text makes any other
        token that has none of the model's `embedding_rows`. Raises InputError."""
        self.new_tokens = tuple(new_tokens)
        data = _override_added_tokens(config, parse_tokenizer(tokenizer_json))
        self.special_tokens = special_tokens
        self._growth = estimate_growth(data.get("normalizer"))
        identity = tokenizer_json + json.dumps(data["added_tokens"]).encode()
        self.sha256 = hashlib.sha256(identity).hexdigest()
        non_special = {token["content"] for token in data["added_tokens"] if not token["special"]}
        non_special -= set(special_tokens.values())
        ordinary_texts = {token.text for token in new_tokens if token.is_ordinary}
        # for text at the start of a document, after control tokens, and after other plain text
        self._start_tokenizer, vocabulary = _make_plain_tokenizer(data, non_special, ordinary_texts)
        with TokenizerErrors():  # over some steps the library panics: better now than in a run
            self._start_tokenizer.encode("some text")
        self._rest_tokenizer = _make_variant(data, self._start_tokenizer, should_keep_prefix=True)
        self._continuation_tokenizer = _make_variant(
            data, self._rest_tokenizer, should_keep_prefix=False
        )
        new_texts = {token.text for token in new_tokens}
        self.controls: dict[str, ControlToken] = {}
        for token in data["added_tokens"]:
            if token["content"] not in vocabulary:
                self.controls[token["content"]] = _make_control(token, non_special, new_texts)
        pattern = _build_pattern(self.controls)
        if len(pattern) > MAX_PATTERN_CHARS:
            message = (
                f"the added tokens share so little that {len(pattern):,} characters match them"
            )
            fix = f"no tokenizer needs more than {MAX_PATTERN_CHARS:,}; do not use this model"
            raise InputError(message, fix=fix)
        self.pattern = re.compile(pattern)
        self.control_ids = frozenset(control.id for control in self.controls.values())
        unk_texts = (data["model"].get("unk_token"), special_tokens.get("unk_token"))
        unk_ids = {self.token_to_id(str(text)) for text in unk_texts if text}
        self._embedding_rows = embedding_rows
        # ids that plain text must not make
        self._forbidden_ids = self.control_ids - unk_ids - {data["model"].get("unk_id")}
        self.eos_id = self.token_to_id(special_tokens.get("eos_token", ""))
        eos_ids = [] if self.eos_id is None else [self.eos_id]
        self.end_ids = tuple(dict.fromkeys([*end_ids, *eos_ids]))
        self.bos_ids = () if config.get("add_bos_token") is False else self._find_leading_ids()
        self.refuse_rowless_ids([*self.end_ids, *self.bos_ids])
        self.word_encoder: WordEncoder | None = None
        if self._start_tokenizer is self._continuation_tokenizer and not vocabulary:
            encode_word = partial(self._encode, tokenizer=self._start_tokenizer)
            self.word_encoder = WordEncoder.from_tokenizer(data, encode_word)
        # [is_start] -> text -> ids: short runs, and the runs of the last batch
        self._cache: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        self._prefetched: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        self._refuse_gaps()

    def _refuse_gaps(self) -> None:
        for token in self.new_tokens:
            if self.token_to_id(token.text) != token.id:
                raise InputError(
                    f"the tokenizer's ids are not consecutive: {token.text!r} does not get the next"
                )

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        new_tokens: Sequence[NewToken] = (),
        embedding_rows: int | None = None,
    ) -> ChatTokenizer:
        """Load the tokenizer of a model folder and add `new_tokens`. Raises InputError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            fix = "set `model` to a folder with a fast tokenizer"
            raise InputError("the model folder has no tokenizer.json", where=str(folder), fix=fix)
        config = read_json_object(folder / "tokenizer_config.json", is_optional=True)
        eos_token_id = read_json_object(folder / "generation_config.json", is_optional=True).get(
            "eos_token_id"
        )
        end_ids: list[Any] = []
        if eos_token_id is not None:
            end_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        if not all(type(end) is int for end in end_ids):
            message = (
                f"eos_token_id is not an integer or a list of them: {str(eos_token_id)[:80]!r}"
            )
            raise InputError(message, where=str(folder / "generation_config.json"))
        special_tokens = _read_special_tokens(folder, config)
        tokenizer_json = read_file(path)
        try:
            with TokenizerErrors(*UNUSABLE_ERRORS):
                tokenizer_json = append_tokens(tokenizer_json, new_tokens)
                return cls(
                    tokenizer_json,
                    config,
                    special_tokens,
                    tuple(end_ids),
                    new_tokens,
                    embedding_rows,
                )
        except InputError as error:
            raise InputError(error.message, where=str(path), fix=error.fix) from error

    def demote_structural(self, controls: Iterable[ControlToken]) -> None:
        """Make structural tokens control tokens, with their partners: an answer must not write
        tokens that mark turns."""
        for control in controls:
            for text in (control.text, get_partner(control.text)):
                if text in self.controls:
                    self.controls[text] = replace(self.controls[text], is_structural=False)

    @property
    def size(self) -> int:
        """The id after the last token."""
        return 1 + max(self._start_tokenizer.get_vocab(with_added_tokens=True).values())

    def token_to_id(self, text: str) -> int | None:
        with TokenizerErrors():
            return self._start_tokenizer.token_to_id(text) if text else None

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Return the ids of a run of plain text; `is_start` if the document starts with it. Raises
        InputError if it makes a control token."""
        cache = self._cache[is_start]
        cached = cache.get(text)
        if cached is not None:
            return cached
        prefetched = self._prefetched[is_start].get(text)
        if prefetched is not None:
            ids = self.check_ids(prefetched)
        else:
            ids = _join_ids(self.iter_run_ids(text, is_start=is_start))
        if len(text) <= MAX_CACHED_CHARS and len(cache) < MAX_CACHED_TEXTS:
            cache[text] = ids
        return ids

    def iter_run_ids(self, text: str, *, is_start: bool) -> Iterator[list[int]]:
        """Yield the ids of a run of any length, piece by piece, a few encoded together on all
        cores."""
        yield from self._iter_ids(text, self._start_tokenizer if is_start else self._rest_tokenizer)

    def _iter_ids(self, text: str, first_tokenizer: AnyTokenizer) -> Iterator[list[int]]:
        pieces = self._split_run(text)
        yield self._encode(next(pieces), first_tokenizer)
        tokenizer = self._continuation_tokenizer
        for batch in _iter_batches(pieces, self._growth):
            with TokenizerErrors():
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            yield from (self.check_ids(encoding.ids) for encoding in encodings)

    def _split_run(self, text: str) -> Iterator[str]:
        """Yield the pieces of a run, each of which the library encodes in bounded memory."""
        if self._is_short(text):
            return iter((text,))
        if self._growth == 1:
            return split_text(text, MAX_PIECE_CHARS)
        return split_grown_text(text, self._normalize)

    def _normalize(self, text: str) -> str:
        normalizer = self._start_tokenizer.normalizer
        if normalizer is None:
            return text
        with TokenizerErrors():
            return normalizer.normalize_str(text)

    def _is_short(self, text: str) -> bool:
        """Return whether a run is encoded as one piece, however much its normalization grows."""
        return len(text) * self._growth <= MAX_PIECE_CHARS

    def encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Return the ids of documents, encoded in one batch on all cores. Long texts are left out;
        empty if one cannot be encoded, or if `iter_text_ids` is faster."""
        if self.word_encoder is not None:
            return {}
        short_texts = [text for text in texts if self._is_short(text)]
        return self._encode_batch(short_texts, self._start_tokenizer)

    def iter_text_ids(self, text: str) -> Iterator[Sequence[int] | np.ndarray]:
        """Yield the ids of a document piece by piece, with the word cache where that is exact."""
        if self.word_encoder is None:
            yield from self.iter_run_ids(text, is_start=True)
            return
        for piece in split_text(text, MAX_PIECE_CHARS):
            yield self.word_encoder.encode_text(piece)

    def encode_ahead(self, runs: Iterable[tuple[str, bool]]) -> None:
        """Encode runs, (text, is_start) each, in one batch on all cores, for `encode` to take until
        the next batch."""
        texts: tuple[set[str], set[str]] = (set(), set())
        for text, is_start in runs:
            if text not in self._cache[is_start] and self._is_short(text):
                texts[is_start].add(text)
        rest_ids = self._encode_batch(list(texts[False]), self._rest_tokenizer)
        start_ids = self._encode_batch(list(texts[True]), self._start_tokenizer)
        self._prefetched = (rest_ids, start_ids)

    def _encode_batch(self, texts: list[str], tokenizer: AnyTokenizer) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        try:
            for batch in _iter_batches(texts, self._growth):
                with TokenizerErrors():
                    encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                ids.update(zip(batch, (encoding.ids for encoding in encodings), strict=True))
        except InputError:
            return {}  # the text at fault raises when it is encoded alone
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of text that continues other text: without the space that some tokenizers
        prepend."""
        return _join_ids(self._iter_ids(text, self._continuation_tokenizer))

    def _encode(self, text: str, tokenizer: AnyTokenizer) -> list[int]:
        with TokenizerErrors():  # without offsets, it takes less time and memory for the same ids
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return self.check_ids(encoding.ids)

    def refuse_rowless_ids(self, ids: Sequence[int]) -> None:
        """Raise InputError for a token that has no row in the model's embedding, except for the
        recipe's new tokens, which get one."""
        if self._embedding_rows is None or not ids or max(ids) < self._embedding_rows:
            return
        new_ids = {token.id for token in self.new_tokens}
        for token_id in ids:
            if token_id < self._embedding_rows or token_id in new_ids:
                continue
            texts = [text for text, control in self.controls.items() if control.id == token_id]
            text = texts[0] if texts else self.decode([token_id])
            raise InputError(
                f"the token {text!r:.80} has the id {token_id:,}, but the model's embedding has "
                f"{self._embedding_rows:,} rows",
                fix="use the tokenizer.json that belongs to the weights, or a chat template and "
                "rows without this token",
            )

    def check_ids(self, ids: list[int]) -> list[int]:
        """Return the same ids. Raises InputError if one is a control token, or has no embedding."""
        self.refuse_rowless_ids(ids)
        if not self._forbidden_ids.isdisjoint(ids):
            stray = next(self.decode([token]) for token in ids if token in self._forbidden_ids)
            raise InputError(f"the tokenizer makes the control token {stray!r} from plain text")
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        with TokenizerErrors(OverflowError):  # a token id that is negative or has over 32 bits
            return self._start_tokenizer.decode(list(tokens), skip_special_tokens=False)

    def can_match_control(self, control: ControlToken, following: str) -> bool:
        """Return whether the full tokenizer matches this token before `following`, which its
        normalizer may prevent."""
        if not control.normalized:
            return True
        return self._normalize(control.text + following).startswith(control.text)

    def _find_leading_ids(self) -> tuple[int, ...]:
        """Return the ids that the post-processor puts before plain text."""
        with TokenizerErrors():
            with_special = self._start_tokenizer.encode("a").ids
            plain = self._start_tokenizer.encode("a", add_special_tokens=False).ids
        if not with_special:
            return ()
        for count in range(len(with_special)):
            if plain and with_special[count : count + len(plain)] == plain:
                if count > MAX_LEADING:
                    break
                return tuple(with_special[:count])
        message = (
            f"the post-processor puts more than {MAX_LEADING} tokens before plain text, or changes"
            " its ids"
        )
        raise InputError(message, where="tokenizer.json:post_processor")


def _join_ids(parts: Iterable[list[int]]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        ids += part
        refuse_long_rows(len(ids))
    return ids


def refuse_long_rows(num_tokens: int) -> None:
    """Raise InputError for a row of so many tokens that it would take much memory."""
    if num_tokens > MAX_ROW_TOKENS:
        raise InputError(f"more than {MAX_ROW_TOKENS:,} tokens", fix=TOO_LONG_FIX)


def _iter_batches(texts: Iterable[str], growth: int) -> Iterator[list[str]]:
    """Yield the texts in batches of MAX_BATCH_BYTES after normalization; a longer one is alone."""
    batch: list[str] = []
    batch_bytes = 0
    for text in texts:
        num_bytes = growth * len(text.encode(errors="surrogatepass"))
        if batch and batch_bytes + num_bytes > MAX_BATCH_BYTES:
            yield batch
            batch = []
            batch_bytes = 0
        batch.append(text)
        batch_bytes += num_bytes
    if batch:
        yield batch


def _override_added_tokens(config: Json, data: Json) -> Json:
    """Return tokenizer.json with the added tokens of tokenizer_config.json, which take
    precedence."""
    tokens = {token["content"]: {"special": False} | token for token in data["added_tokens"]}
    for token_id, token in _iter_decoder_tokens(config.get("added_tokens_decoder") or {}):
        text = token["content"]
        if text in tokens:
            token_id = tokens[text]["id"]
        flags = {key: bool(token.get(key)) for key in (*FLAGS, "special")}
        tokens[text] = {"content": text, "id": token_id, **flags}
    return data | {"added_tokens": sorted(tokens.values(), key=lambda token: token["id"])}


def _iter_decoder_tokens(tokens: Any) -> Iterator[tuple[int, Json]]:
    """Yield (id, token) of each added token in tokenizer_config.json."""
    is_mapping = isinstance(tokens, dict)
    if not is_mapping or not all(re.fullmatch(r"\d{1,9}", number) for number in tokens):
        raise InputError("added_tokens_decoder in tokenizer_config.json does not map ids to tokens")
    for number, token in tokens.items():
        check_added_tokens([{**token, "id": int(number)} if isinstance(token, dict) else token])
        yield int(number), token


def _read_special_tokens(folder: Path, config: Json) -> dict[str, str]:
    """Return bos_token and so on, as templates see them. As in transformers, the older
    special_tokens_map.json counts if the config has no added_tokens_decoder."""
    merged_config = dict(config)
    if "added_tokens_decoder" not in config:
        merged_config |= read_json_object(folder / "special_tokens_map.json", is_optional=True)
    values = {name: merged_config.get(name) for name in SPECIAL_TOKEN_NAMES}
    extra = merged_config.get("extra_special_tokens")
    if isinstance(extra, dict):
        values |= extra
    special_tokens: dict[str, str] = {}
    for name, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special_tokens[name] = text
    return special_tokens


def _make_plain_tokenizer(
    data: Json, non_special: set[str], ordinary_texts: Container[str]
) -> tuple[AnyTokenizer, set[str]]:
    """Return the tokenizer with its control tokens switched off, and the added tokens that are
    vocabulary: all `ordinary_texts`, and HTML tags and what plain text makes anyway among the
    `non_special` ones."""
    for token in data["added_tokens"]:
        token["special"] = True  # `encode_special_tokens` switches exactly these off
    tokenizer = _load_tokenizer(data)
    vocabulary: set[str] = set()
    for token in data["added_tokens"]:
        text = token["content"]
        if text not in non_special:
            continue
        is_always_token = text in ordinary_texts or _get_tag_name(text) in _HTML_TAGS
        with TokenizerErrors():
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        if is_always_token or ids == [token["id"]]:
            vocabulary.add(text)
    if vocabulary:
        for token in data["added_tokens"]:
            token["special"] = token["content"] not in vocabulary
        tokenizer = _load_tokenizer(data)
    return tokenizer, vocabulary


def _load_tokenizer(data: Json) -> AnyTokenizer:
    """Load a tokenizer; one with unknown regular expressions or tables encodes in another
    process."""
    with TokenizerErrors():
        if needs_guard([data.get(name) for name in PATTERN_COMPONENTS]):
            return GuardedTokenizer(data)
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _make_variant(data: Json, default: AnyTokenizer, *, should_keep_prefix: bool) -> AnyTokenizer:
    """Return the tokenizer for text inside a document: without the space that is prepended to the
    first text only or, without `should_keep_prefix`, to any text."""
    components: Json = {}
    for name in ("normalizer", "pre_tokenizer"):
        component = _drop_prefix(data.get(name), should_keep_prefix)
        if component != data.get(name):
            components[name] = component
    return _load_tokenizer(data | components) if components else default


def _drop_prefix(component: Json | None, should_keep_prefix: bool) -> Json | None:
    if component is None:
        return None
    component = dict(component)
    for name in ("normalizers", "pretokenizers"):
        if name in component:
            inner_components = [
                _drop_prefix(inner, should_keep_prefix) for inner in component[name]
            ]
            component[name] = [inner for inner in inner_components if inner is not None]
    if component["type"] == "Metaspace" and (
        not should_keep_prefix or component.get("prepend_scheme") == "first"
    ):
        component |= {"prepend_scheme": "never", "add_prefix_space": False}
    if component["type"] == "ByteLevel" and not should_keep_prefix:
        component["add_prefix_space"] = False
    return None if component["type"] == "Prepend" and not should_keep_prefix else component


def _make_control(token: Json, non_special: set[str], new_texts: Container[str]) -> ControlToken:
    """Build a control token. A token of the recipe (`new_texts`) is structural without a partner:
    the template writes it."""
    text = token["content"]
    is_structural = text in new_texts or (text in non_special and get_partner(text) in non_special)
    flags = {key: bool(token.get(key)) for key in FLAGS}
    return ControlToken(token["id"], text, is_structural, **flags)


def _get_tag_name(text: str) -> str:
    match = _TAG.fullmatch(text)
    return (match[2] or match[4] or match[7]) if match else ""


def get_partner(text: str) -> str:
    """Return `</x>` for `<x>`, `<x|>` for `<|x>`, `[/X]` for `[X]`, and back; "" if not a tag."""
    match = _TAG.fullmatch(text)
    if match is None:
        return ""
    if match[2]:
        return f"<{match[2]}>" if match[1] else f"</{match[2]}>"
    if match[7]:
        return f"[{match[7]}]" if match[6] else f"[/{match[7]}]"
    is_opening = bool(match[3])
    if is_opening == bool(match[5]):
        return ""
    return f"<{match[4]}|>" if is_opening else f"<|{match[4]}>"


def _build_pattern(texts: Iterable[str]) -> str:
    """Return a pattern that matches the longest of the texts, which share their prefixes in it,
    since there may be thousands."""
    ordered = sorted(set(texts))
    return _build_branches(ordered, 0, 0) if ordered else "(?!)"


def _build_branches(texts: Sequence[str], start: int, depth: int) -> str:
    """Return a pattern for sorted texts, which are equal before character `start`."""
    end = start
    while texts[0][end : end + 1] == texts[-1][end : end + 1] != "":
        end += 1
    prefix = re.escape(texts[0][start:end])
    is_end = len(texts[0]) == end  # the shortest comes first
    if is_end:
        texts = texts[1:]
    if not texts:
        return prefix
    if depth == MAX_PATTERN_DEPTH:
        endings = sorted((text[end:] for text in texts), key=len, reverse=True)
        branches = [re.escape(ending) for ending in endings]
    else:
        groups = [list(group) for _, group in groupby(texts, key=lambda text: text[end])]
        branches = [_build_branches(group, end, depth + 1) for group in groups]
    return f"{prefix}(?:{'|'.join(branches)})" + ("?" if is_end else "")
