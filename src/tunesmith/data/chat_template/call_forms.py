"""The forms in which templates write a tool call, each read from a text.

    form.read(text, start, schemas) -> (ToolCall, end), or None

One object with name and arguments (Qwen, Hermes, Llama 3), a name before an object (DeepSeek,
Mistral, gpt-oss), or a name before arguments one by one (Qwen 3.5, GLM, LFM2). `find_object_form`
and the others recognize a form in a rendered call. Left out: what is around calls
(tool_syntax.py)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.core.types import Json
from tunesmith.data.chat_template.template_probe import count_common_prefix

FormSpan = tuple["CallForm", int, int]  # the form, and where the call starts and ends
_DECODER = json.JSONDecoder()
_NAME = re.compile(r"[\w.-]{1,64}")
_PYTHON_TEXT = re.compile(r"'(?:[^'\\\n]|\\.)*'")
_WORD = re.compile("True|False|None")
_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}  # as Python writes them


@dataclass(frozen=True)
class ToolCall:
    """A call that a model makes."""

    name: str
    arguments: Json


class CallForm(Protocol):
    """The way in which a template writes a name and arguments."""

    def read(
        self, text: str, start: int, schemas: Mapping[str, Json]
    ) -> tuple[ToolCall, int] | None:
        """Return the call at a position and where it ends; None if it is not complete."""
        ...


# ---------------------------------------------------------------- {"name": ..., "arguments": ...}


@dataclass(frozen=True)
class ObjectForm:
    """An object that holds both, perhaps inside another (`wrapper`).

    `keys` are all keys in their order; `is_text`: the arguments are JSON in a string."""

    name_key: str
    arguments_key: str
    keys: tuple[str, ...]
    wrapper: str = ""
    is_text: bool = False

    def read(
        self, text: str, start: int, schemas: Mapping[str, Json]
    ) -> tuple[ToolCall, int] | None:
        del schemas
        parsed = _read_object(text, start)
        if parsed is None:
            return None
        content, end = parsed
        inner = content.get(self.wrapper) if self.wrapper else content
        if not isinstance(inner, dict):
            return None
        name = inner.get(self.name_key)
        arguments = inner.get(self.arguments_key)
        if self.is_text and isinstance(arguments, str):
            arguments = _parse(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, arguments), end


def find_object_form(text: str, name: str, arguments: Json) -> FormSpan | None:
    """Recognize a call in a rendered text."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        parsed = _read_object(text, start)
        if parsed is None:
            continue
        content, end = parsed
        wrappers = [key for key, value in content.items() if isinstance(value, dict)]
        for wrapper in ("", *wrappers):
            inner = content[wrapper] if wrapper else content
            form = _match_object(inner, wrapper, name, arguments)
            if form is not None:
                return form, start, end
    return None


def _match_object(content: Json, wrapper: str, name: str, arguments: Json) -> ObjectForm | None:
    by_value = {json.dumps(value): key for key, value in content.items()}
    name_key = by_value.get(json.dumps(name))
    plain_key = by_value.get(json.dumps(arguments))
    text_key = next((key for key, value in content.items() if _parse(value) == arguments), None)
    arguments_key = plain_key or text_key
    if name_key is None or arguments_key is None:
        return None
    return ObjectForm(name_key, arguments_key, tuple(content), wrapper, plain_key is None)


# ---------------------------------------------------------------- NAME {...}


@dataclass(frozen=True)
class NamedForm:
    """A name, text between, and an object of arguments."""

    between: str

    def read(
        self, text: str, start: int, schemas: Mapping[str, Json]
    ) -> tuple[ToolCall, int] | None:
        del schemas
        name = _NAME.match(text, start)
        if name is None or not text.startswith(self.between, name.end()):
            return None
        parsed = _read_object(text, name.end() + len(self.between))
        return None if parsed is None else (ToolCall(name[0], parsed[0]), parsed[1])


def find_named_form(text: str, name: str, arguments: Json) -> FormSpan | None:
    """Recognize a call in a rendered text."""
    start = text.find(name)
    if start < 0:
        return None
    name_end = start + len(name)
    for match in re.finditer(r"\{", text[name_end:]):
        parsed = _read_object(text, name_end + match.start())
        if parsed is not None and parsed[0] == arguments:
            return NamedForm(text[name_end : name_end + match.start()]), start, parsed[1]
    return None


# ---------------------------------------------------------------- NAME KEY VALUE KEY VALUE


@dataclass(frozen=True)
class PartsForm:
    """A name, then keys and values, with the texts before, between and after them.

    `empty` is what follows the name of a call without arguments, `quote` what is around a text; if
    there is none, the tool's schema tells text from numbers."""

    before: str
    middle: str
    between: str
    after: str
    empty: str
    quote: str

    def read(
        self, text: str, start: int, schemas: Mapping[str, Json]
    ) -> tuple[ToolCall, int] | None:
        name = _NAME.match(text, start)
        if name is None:
            return None
        if text.startswith(self.empty, name.end()):
            return ToolCall(name[0], {}), name.end() + len(self.empty)
        if not text.startswith(self.before, name.end()):
            return None
        properties = schemas.get(name[0], {}).get("properties")
        return self._read_arguments(
            name[0],
            text,
            name.end() + len(self.before),
            properties if isinstance(properties, dict) else {},
        )

    def _read_arguments(
        self, name: str, text: str, position: int, properties: Json
    ) -> tuple[ToolCall, int] | None:
        arguments: Json = {}
        while (key_end := text.find(self.middle, position)) >= 0:
            key = text[position:key_end]
            parsed = self._read_value(text, key_end + len(self.middle), properties.get(key))
            if parsed is None:
                return None
            arguments[key], end = parsed
            if text.startswith(self.after, end):
                return ToolCall(name, arguments), end + len(self.after)
            if not text.startswith(self.between, end):
                return None
            position = end + len(self.between)
        return None

    def _read_value(self, text: str, start: int, schema: Any) -> tuple[Any, int] | None:
        if self.quote:
            return _read_literal(text, start)
        ends = [text.find(end, start) for end in (self.between, self.after)]
        end = min((end for end in ends if end >= 0), default=-1)
        return None if end < 0 else (_convert_value(text[start:end], schema), end)


def find_parts_form(
    texts: tuple[str, str, str], pair: str, names: tuple[str, str]
) -> FormSpan | None:
    """Recognize a call in texts with one, no and two arguments, zq_key and zq_text, and a text with
    two calls, empty if there are none."""
    text_1, text_0, text_2 = texts
    start = text_1.find(names[0])
    key = text_1.find("zq_key", start)
    value = text_1.find("zqvalue", key)
    second_value = text_2.find("zqother")
    second_key = text_2.find("zq_text", second_value)
    if min(start, key, value, second_value, second_key) < 0 or names[0] not in text_0:
        return None
    quote = text_1[value - 1] if text_1[value - 1] in "'\"" else ""
    value_end = value + len("zqvalue") + len(quote)
    middle = text_1[key + len("zq_key") : value - len(quote)]
    between = text_2[second_value + len("zqother") + len(quote) : second_key]
    closing = text_1[value_end:]
    after = closing
    if names[1] in pair:
        first_end = pair.index("zqvalue") + len("zqvalue") + len(quote)
        after = closing[: count_common_prefix(closing, pair[first_end : pair.rindex(names[1])])]
    # what ends a call ends one without arguments, too
    after_name = text_0[text_0.index(names[0]) + len(names[0]) :]
    empty = after_name[: len(after_name) - len(closing) + len(after)]
    before = text_1[start + len(names[0]) : key]
    if not all((before, middle, between, after, empty)):
        return None
    form = PartsForm(before, middle, between, after, empty, quote)
    return form, start, value_end + len(after)


def _convert_value(text: str, schema: Any) -> Any:
    """Return a value that is not quoted: text where the schema says so, else JSON if it is any."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------- JSON inside a text


def _read_literal(text: str, start: int) -> tuple[Any, int] | None:
    """Return the complete JSON value or Python text at a position, and where it ends."""
    if quoted := _PYTHON_TEXT.match(text, start):
        try:
            return ast.literal_eval(quoted[0]), quoted.end()
        except (ValueError, SyntaxError):
            return None
    if word := _WORD.match(text, start):
        return _WORDS[word[0]], word.end()
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _read_object(text: str, start: int) -> tuple[Json, int] | None:
    """Return the complete object at a position, and where it ends."""
    if not text.startswith("{", start):
        return None
    try:
        content, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return content, end


def _parse(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
