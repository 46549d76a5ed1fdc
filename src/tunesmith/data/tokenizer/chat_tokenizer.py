"""The fast tokenizer of a model folder, taken apart: what control tokens there are, and plain text to ids.

Plain text never becomes a control token here. Added tokens are of three kinds:

    control     marked special, named in the config, or not a tag: only the template writes them
    structural  a tag with its partner (`<think>` `</think>`): also tokens in an assistant's text, text elsewhere
    vocabulary  plain text makes them anyway (line ends in Gemma), or HTML: tokens everywhere, as in any other tokenizer

Those that a recipe adds are vocabulary, or structural where the chat template writes them (new_tokens.py).

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
from tunesmith.data.tokenizer.tokenizer_json import ItsErrors, check_tokens, parse, with_tokens
from tunesmith.data.tokenizer.word_cache import Words

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
LONG_TEXT = 2**18  # characters; longer runs are encoded in pieces, since the library takes over 100 bytes a token
TOGETHER = 4  # pieces of a long run that are encoded in one batch
SHORT_TEXT = 64  # characters; such runs repeat in every row and are remembered
REMEMBERED = 10_000

_TAG = re.compile(r"<(/?)([A-Za-z][\w.:-]*)>|<(\|?)([A-Za-z][\w.:-]*)(\|?)>|\[(/?)([A-Za-z]\w*)\]")
_HTML = frozenset(
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
class Control:
    """A control or structural token. Strips and `single_word` act on the text around it, as tokenizers do."""

    id: int
    text: str
    structural: bool
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
        named: dict[str, str],
        end_ids: tuple[int, ...],
        new: Sequence[NewToken] = (),
    ) -> None:
        """`new`: those of the added tokens that are the recipe's."""
        self.new = tuple(new)
        data = _with_tokens_of(config, parse(tokenizer_json))
        self.named = named
        self.sha256 = hashlib.sha256(tokenizer_json + json.dumps(data["added_tokens"]).encode()).hexdigest()
        usual = {token["content"] for token in data["added_tokens"] if not token["special"]} - set(named.values())
        self._head, vocabulary = _plain_tokenizer(data, usual, {token.text for token in new if token.ordinary})
        self._rest = _variant(data, self._head, keep_always=True)
        self._continuation = _variant(data, self._rest, keep_always=False)
        added = [token for token in data["added_tokens"] if token["content"] not in vocabulary]
        written = {token.text for token in new}
        self.controls = {token["content"]: _control(token, usual, written) for token in added}
        self.pattern = re.compile(_longest_first(self.controls))
        self.control_ids = frozenset(control.id for control in self.controls.values())
        unknown = {self.id(str(text)) for text in (data["model"].get("unk_token"), named.get("unk_token")) if text}
        self._never = self.control_ids - unknown - {data["model"].get("unk_id")}  # what plain text must not give
        self.eos_id = self.id(named.get("eos_token", ""))
        self.end_ids = tuple(dict.fromkeys([*end_ids, *([self.eos_id] if self.eos_id is not None else [])]))
        self.bos = () if config.get("add_bos_token") is False else self._leading_ids()
        plain = self._head is self._continuation and not vocabulary
        self.words = Words.of(data, partial(self._encode, tokenizer=self._head)) if plain else None
        self._memory: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        self._ahead: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        if other := [token.text for token in new if self.id(token.text) != token.id]:
            raise InputError(f"the tokenizer's numbers have holes: it gives {other[0]!r} another one than the next")

    @classmethod
    def from_folder(cls, folder: Path, new: Sequence[NewToken] = ()) -> ChatTokenizer:
        """With the tokens `new` added to it. Raises InputError if there is no tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError("the model folder has no tokenizer.json", where=str(folder), fix="give a folder with one")
        config = read_json(folder / "tokenizer_config.json")
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        end_ids = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        if not all(type(end) is int for end in end_ids):
            what = f"eos_token_id is {str(ends)[:80]!r}, neither a number nor a list of numbers"
            raise InputError(what, where=str(folder / "generation_config.json"))
        try:
            return cls(with_tokens(path.read_bytes(), new), config, _named_tokens(folder, config), end_ids, new)
        except InputError as error:
            raise InputError(error.what, where=str(path), fix=error.fix) from error

    def demote(self, controls: Iterable[Control]) -> None:
        """Make structural tokens that mark turns control tokens, with their partners: an answer must not write them."""
        for text in [name for control in controls for name in (control.text, _partner(control.text))]:
            if text in self.controls:
                self.controls[text] = replace(self.controls[text], structural=False)

    @property
    def size(self) -> int:
        """The number behind the last token's."""
        return 1 + max(self._head.get_vocab(with_added_tokens=True).values())

    def id(self, text: str) -> int | None:
        return self._head.token_to_id(text) if text else None

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a run of plain text; `at_start` if nothing stands before it in the document."""
        memory = self._memory[at_start]
        known = memory.get(text)
        if known is not None:
            return known
        ahead = self._ahead[at_start].get(text)
        ids = (
            [i for part in self.parts(text, at_start=at_start) for i in part] if ahead is None else self.checked(ahead)
        )
        if len(text) <= SHORT_TEXT and len(memory) < REMEMBERED:
            memory[text] = ids
        return ids

    def parts(self, text: str, *, at_start: bool) -> Iterator[list[int]]:
        """The ids of a run of any length, piece by piece; a few are encoded together, on all cores."""
        left = pieces(text, LONG_TEXT)
        yield self._encode(next(left), self._head if at_start else self._rest)
        while some := list(islice(left, TOGETHER)):
            with ItsErrors():
                encoded = self._continuation.encode_batch_fast(some, add_special_tokens=False)
            yield from (self.checked(one.ids) for one in encoded)

    def many(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of whole texts, encoded in one batch on all cores; without long ones, without any if one of them
        cannot be encoded, or where `text_parts` is faster."""
        short = [text for text in texts if len(text) <= LONG_TEXT]
        return {} if self.words is not None else self._batch(short, self._head)

    def text_parts(self, text: str) -> Iterator[Sequence[int] | np.ndarray]:
        """The ids of a whole text, piece by piece; by its words where that is exact."""
        if self.words is None:
            yield from self.parts(text, at_start=True)
            return
        for piece in pieces(text, LONG_TEXT):
            yield self.words.ids(piece)

    def encode_ahead(self, runs: Iterable[tuple[str, bool]]) -> None:
        """Encode runs, (text, at_start) each, in one batch on all cores. `encode` finds them until the next batch."""
        texts: tuple[set[str], set[str]] = (set(), set())
        for text, at_start in runs:
            if text not in self._memory[at_start] and len(text) <= LONG_TEXT:
                texts[at_start].add(text)
        rest, head = (self._batch(list(some), t) for some, t in zip(texts, (self._rest, self._head), strict=True))
        self._ahead = rest, head

    def _batch(self, texts: list[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
        try:
            with ItsErrors():
                encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except InputError:
            return {}  # one of the texts; it says so when it is encoded alone
        return {text: one.ids for text, one in zip(texts, encoded, strict=True)}

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that goes on from other text: no space is put in front, whatever the tokenizer's habit."""
        return self._encode(text, self._continuation)

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        with ItsErrors():
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        return self.checked(ids)

    def checked(self, ids: list[int]) -> list[int]:
        """The same ids. Raises InputError if one of them is a control token's."""
        if not self._never.isdisjoint(ids):
            stray = next(self.decode([token]) for token in ids if token in self._never)
            raise InputError(f"the tokenizer makes the control token {stray!r} from plain text")
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._head.decode(list(tokens), skip_special_tokens=False)

    def matches(self, control: Control, following: str) -> bool:
        """False if normalisation would keep the full tokenizer from finding this token before `following`."""
        normalizer = self._head.normalizer
        if not control.normalized or normalizer is None:
            return True
        return normalizer.normalize_str(control.text + following).startswith(control.text)

    def _leading_ids(self) -> tuple[int, ...]:
        with_special = self._head.encode("a").ids
        plain = self._head.encode("a", add_special_tokens=False).ids
        count = next(n for n in range(len(with_special) + 1) if with_special[n : n + len(plain)] == plain)
        return tuple(with_special[:count])


def pieces(text: str, most: int) -> Iterator[str]:
    """A text in pieces of at most so many characters. It is cut before a space between two words, where tokens begin
    anyway; if there is none before another space or line end; if there is none anywhere."""
    start = 0
    while len(text) - start > most:
        end = _cut(text, start + most // 2, start + most)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, low: int, high: int) -> int:
    place = high
    while (place := text.rfind(" ", low, place)) >= 0:
        if text[place - 1].isalpha() and text[place + 1].isalpha():
            return place
    space = max(text.rfind(space, low, high) for space in " \n")
    return space if space >= 0 else high


def _with_tokens_of(config: Json, data: Json) -> Json:
    """Added tokens as tokenizer_config.json has them, where it says otherwise than tokenizer.json."""
    tokens = {token["content"]: {"special": False} | token for token in data["added_tokens"]}
    for number, token in _numbered(config.get("added_tokens_decoder") or {}):
        text = token["content"]
        given = {key: bool(token.get(key)) for key in (*FLAGS, "special")}
        tokens[text] = {"content": text, "id": tokens[text]["id"] if text in tokens else number, **given}
    return data | {"added_tokens": sorted(tokens.values(), key=lambda token: token["id"])}


def _numbered(tokens: Any) -> Iterator[tuple[int, Json]]:
    """The added tokens of a tokenizer_config.json."""
    if not isinstance(tokens, dict) or not all(re.fullmatch(r"\d{1,9}", number) for number in tokens):
        raise InputError("added_tokens_decoder in tokenizer_config.json is no mapping from numbers to tokens")
    for number, token in tokens.items():
        check_tokens([{**token, "id": int(number)} if isinstance(token, dict) else token])
        yield int(number), token


def read_json(path: Path) -> Json:
    """An absent file is empty."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=str(path))
    return found


def _named_tokens(folder: Path, config: Json) -> dict[str, str]:
    """bos_token and so on, as templates see them; the older special_tokens_map.json counts where it still does."""
    given = dict(config)
    if "added_tokens_decoder" not in config:
        given |= read_json(folder / "special_tokens_map.json")
    extra = given.get("extra_special_tokens")
    named = {name: given.get(name) for name in NAMES} | (extra if isinstance(extra, dict) else {})
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain_tokenizer(data: Json, usual: set[str], ordinary: Container[str]) -> tuple[Tokenizer, set[str]]:
    """The tokenizer with its control tokens switched off, and which of the `usual` (not special) added tokens are
    vocabulary; the `ordinary` ones are."""
    for token in data["added_tokens"]:
        token["special"] = True  # `encode_special_tokens` switches exactly these off
    tokenizer = _load(data)
    vocabulary = {
        token["content"]
        for token in data["added_tokens"]
        if token["content"] in usual
        and (
            token["content"] in ordinary
            or _tag_name(token["content"]) in _HTML
            or tokenizer.encode(token["content"], add_special_tokens=False).ids == [token["id"]]
        )
    }
    if vocabulary:
        for token in data["added_tokens"]:
            token["special"] = token["content"] not in vocabulary
        tokenizer = _load(data)
    return tokenizer, vocabulary


def _load(data: Json) -> Tokenizer:
    with ItsErrors():
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _variant(data: Json, usual: Tokenizer, *, keep_always: bool) -> Tokenizer:
    """The tokenizer for text that something stands before: without a space that is put in front of the first text
    only, and with `keep_always=False` of every text."""
    parts = {name: _without_prefix(data.get(name), keep_always) for name in ("normalizer", "pre_tokenizer")}
    return usual if all(parts[name] == data.get(name) for name in parts) else _load(data | parts)


def _without_prefix(part: Json | None, keep_always: bool) -> Json | None:
    if part is None:
        return None
    part = dict(part)
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [_without_prefix(inner, keep_always) for inner in part[name]]
            part[name] = [inner for inner in part[name] if inner is not None]
    if part["type"] == "Metaspace" and (not keep_always or part.get("prepend_scheme") == "first"):
        part |= {"prepend_scheme": "never", "add_prefix_space": False}
    if part["type"] == "ByteLevel" and not keep_always:
        part["add_prefix_space"] = False
    return None if part["type"] == "Prepend" and not keep_always else part


def _control(token: Json, usual: set[str], written: Container[str]) -> Control:
    """`written`: tokens that the recipe adds and the template writes; they need no partner."""
    text = token["content"]
    structural = text in written or (text in usual and _partner(text) in usual)
    return Control(token["id"], token["content"], structural, **{key: bool(token.get(key)) for key in FLAGS})


def _tag_name(text: str) -> str:
    match = _TAG.fullmatch(text)
    return (match[2] or match[4] or match[7]) if match else ""


def _partner(text: str) -> str:
    """`</x>` of `<x>`, `<x|>` of `<|x>`, `[/X]` of `[X]`, and back; "" if it is no tag."""
    match = _TAG.fullmatch(text)
    if match is None:
        return ""
    if match[2]:
        return f"<{match[2]}>" if match[1] else f"</{match[2]}>"
    if match[7]:
        return f"[{match[7]}]" if match[6] else f"[/{match[7]}]"
    opening, closing = bool(match[3]), bool(match[5])
    return "" if opening == closing else (f"<{match[4]}|>" if opening else f"<|{match[4]}>")


def _longest_first(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest where several begin; a trie, since there may be thousands."""
    trie: Json = {}
    for text in texts:
        node = trie
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(trie) if trie else "(?!)"


def _branches(node: Json) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:  # a loop, so that long texts do not nest
        ((letter, node),) = node.items()
        prefix += re.escape(letter)
    ends = "" in node
    paths = [re.escape(letter) + _branches(below) for letter, below in node.items() if letter]
    if not paths:
        return prefix
    return f"{prefix}(?:{'|'.join(paths)})" + ("?" if ends else "")
