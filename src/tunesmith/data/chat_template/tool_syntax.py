"""Learn how a chat template writes tool calls, so that calls can be read from an answer.

    learn_tool_syntax(renderer)      -> ToolSyntax, or InputError with the reason
    form.read(text, start, schemas)  -> (ToolCall, end), or None

Made-up calls are rendered, and the text around their names and arguments is the syntax: there is no
table of models. A template is learned only if what it renders is read back as the same calls: with
nested arguments, without any, with several calls, and with other content. Left out: reading an
answer while it grows (serve/tool_calls.py)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.template_probe import count_common_prefix

NAMES: tuple[str, str] = ("zq_search", "zqFetch2")
CONTENT = "Zqcontent"
USER: Json = {"role": "user", "content": "Zqhello"}
# Of each name, so that a text can be told from a number where a template quotes neither.
PROPERTIES: Json = {
    "zq_key": {"type": "string"},
    "zq_text": {"type": "string"},
    "zq_digits": {"type": "string"},
    "zq_count": {"type": "integer"},
    "zq_share": {"type": "number"},
    "zq_flag": {"type": "boolean"},
    "zq_list": {"type": "array"},
    "zq_tree": {"type": "object"},
}
SCHEMA: Json = {"type": "object", "properties": PROPERTIES}
SCHEMAS: dict[str, Json] = dict.fromkeys(NAMES, SCHEMA)
FIRST = {"zq_key": "zqvalue"}
SECOND = {"zq_key": "zqother", "zq_text": "zqlast"}
NESTED = {
    "zq_text": 'é 日本 👩‍👩‍👧 it\'s "quoted" \\ {x}\nsecond line',
    "zq_digits": "12",
    "zq_count": -3,
    "zq_share": 2.5,
    "zq_flag": True,
    "zq_list": [1, "zwei", [None, False]],
    "zq_tree": {"a": {"b": ["ä", {}]}, "c": ""},
}
PROBES: dict[str, tuple[Json, ...]] = {
    "a call": (FIRST,),
    "two arguments": (SECOND,),
    "nested arguments and unicode": (NESTED,),
    "no arguments": ({},),
}
PAIRS: tuple[tuple[Json, ...], ...] = ((FIRST, SECOND), (NESTED, {}), ({}, FIRST))


@dataclass(frozen=True)
class ReadAnswer:
    """An answer with calls; `content` is before them, `rest` after them and the closing text."""

    content: str
    calls: tuple[ToolCall, ...]
    rest: str


@dataclass(frozen=True)
class ToolSyntax:
    """The texts around the calls of an answer.

    `opening` is before the first, `separator` between two (None: one call per answer), `closing`
    after the last."""

    form: CallForm
    opening: str
    separator: str | None
    closing: str

    @property
    def first_word(self) -> str:
        """The word that every answer with a call contains; empty if it starts with the call."""
        return (self.opening.split() or [""])[0]

    def read(self, text: str, schemas: Mapping[str, Json]) -> ReadAnswer | None:
        """Return the calls that are complete in a text so far, None without one.

        schemas: name of each tool -> schema of its arguments. A call of another is none."""
        start = 0
        while (start := text.find(self.first_word, start)) >= 0:
            opening = _compile(self.opening).match(text, start)
            if opening is not None:
                answer = self._read_calls(text, opening.end(), schemas)
                if answer is not None:
                    return replace(answer, content=text[:start].rstrip())
            if not self.first_word:
                return None
            start += 1
        return None

    def _read_calls(self, text: str, start: int, schemas: Mapping[str, Json]) -> ReadAnswer | None:
        calls: list[ToolCall] = []
        end = start
        while (parsed := self.form.read(text, start, schemas)) is not None:
            if parsed[0].name not in schemas:
                break
            call, end = parsed
            calls.append(call)
            if self.separator is None:
                break
            separator = _compile(self.separator).match(text, end)
            if separator is None:
                break
            start = separator.end()
        if not calls:
            return None
        # Some templates close each answer, and models leave that out before the end token.
        closing = _compile(self.closing).match(text, end)
        rest = text[end if closing is None else closing.end() :]
        return ReadAnswer("", tuple(calls), rest if rest.strip() else "")


def _compile(text: str) -> re.Pattern[str]:
    """Return a pattern of a text in which the white space around words and tags does not matter."""
    words = re.sub("(?<=>)(?=<)", " ", text).split()
    return re.compile("".join(rf"\s*{re.escape(word)}" for word in words) + r"\s*")


# ---------------------------------------------------------------- learning


def learn_tool_syntax(renderer: Renderer) -> ToolSyntax:
    """Return the syntax of a renderer's template. Raises InputError with what is not read back."""
    prober = _SyntaxProber(renderer)
    syntax = prober.find_syntax()
    prober.check(syntax)
    return syntax


@dataclass(frozen=True)
class _SyntaxProber:
    renderer: Renderer

    def find_syntax(self) -> ToolSyntax:
        text_1 = self.render_answer((FIRST,))
        text_0 = self.render_answer(({},))
        text_2 = self.render_answer((SECOND,))
        if NAMES[0] not in text_1 or "zq_key" not in text_1:
            raise InputError("the chat template does not write tool calls")
        form_span = find_object_form(text_1, NAMES[0], FIRST)
        form_span = form_span or find_named_form(text_1, NAMES[0], FIRST)
        if form_span is None:
            pair = self.render_pair()
            form_span = find_parts_form((text_1, text_0, text_2), pair, NAMES)
        if form_span is None:
            raise InputError("the form of the chat template's tool calls is not known")
        form, start, end = form_span
        opening = self.find_opening(form, text_1[:start])
        return self.find_separator(ToolSyntax(form, opening, None, text_1[end:]))

    def find_opening(self, form: CallForm, before: str) -> str:
        """Return the text before a call: what follows other content, if the template writes it."""
        try:
            beside = self.render_answer((FIRST,), CONTENT)
        except InputError:
            return before
        if CONTENT not in beside:
            return before
        start = beside.index(CONTENT) + len(CONTENT)
        for position in range(start, len(beside)):
            if parsed := form.read(beside, position, {NAMES[0]: SCHEMA}):
                opening = beside[start:position].strip()
                is_same = parsed[0].name == NAMES[0] and before.rstrip().endswith(opening)
                return opening if is_same else before
        return before

    def find_separator(self, syntax: ToolSyntax) -> ToolSyntax:
        """Add what is between two calls, if the template writes several."""
        text = self.render_pair()
        if NAMES[1] not in text:
            return syntax
        opening = _compile(syntax.opening).search(text)
        first = opening and syntax.form.read(text, opening.end(), SCHEMAS)
        if not first:
            raise InputError("two tool calls are not written like one")
        for position in range(first[1], len(text)):
            second = syntax.form.read(text, position, SCHEMAS)
            if second is not None and second[0] == ToolCall(NAMES[1], SECOND):
                return replace(syntax, separator=text[first[1] : position])
        raise InputError("the second of two tool calls is not found")

    # ---- renders

    def render_pair(self) -> str:
        """Return an answer with two calls; empty if the template does not take them."""
        try:
            return self.render_answer((FIRST, SECOND))
        except InputError:
            return ""

    def render_answer(self, arguments: Sequence[Json], content: str = "") -> str:
        """Return what a model has to write for calls: from the prompt to its end token."""
        prompt, full = self.render_texts(arguments, content)
        start = len(prompt)
        if not full.startswith(prompt):
            start = count_common_prefix(prompt, full)
            start = max(full.rfind("\n", 0, start), full.rfind(">", 0, start)) + 1
        answer = full[start:]
        last = max((answer.rfind(name) for name in NAMES), default=0)
        ends = filter(None, (self.renderer.decode([token]) for token in self.renderer.end_ids))
        positions = [end for text in ends if (end := answer.find(text, max(last, 0))) >= 0]
        return answer[: min(positions, default=len(answer))]

    def render_texts(self, arguments: Sequence[Json], content: str) -> tuple[str, str]:
        calls: list[Json] = []
        for index, value in enumerate(arguments):
            function = {"name": NAMES[index], "arguments": value}
            # nine letters and digits, as Mistral's templates want it
            calls.append({"id": f"zqcall00{index}", "type": "function", "function": function})
        message: Json = {"role": "assistant", "content": content, "tool_calls": calls}
        tools = tuple(_make_tool(name) for name in NAMES)
        prompt = self.renderer.render_text([USER], tools, has_prompt=True)
        return prompt, self.renderer.render_text([USER, message], tools)

    # ---- the test of what was learned

    def check(self, syntax: ToolSyntax) -> None:
        """Raise InputError for a probe that is not read as what was rendered."""
        for label, arguments in self._iter_probes(syntax):
            expected = tuple(map(ToolCall, NAMES, arguments))
            for content in ("", CONTENT):
                text = self.render_answer(arguments, content)
                answer = syntax.read(text, SCHEMAS)
                label += " with other content" if content else ""
                if answer is None or answer.calls != expected or answer.rest:
                    message = f"{label}: what the chat template writes is not read back as the call"
                    raise InputError(message)
                if content in text and not answer.content.endswith(content):
                    raise InputError(f"{label}: the content is not read back")

    def _iter_probes(self, syntax: ToolSyntax) -> Iterator[tuple[str, tuple[Json, ...]]]:
        yield from PROBES.items()
        if syntax.separator is not None:
            for pair in PAIRS:
                yield "several calls", pair


def _make_tool(name: str) -> Json:
    function = {"name": name, "description": "Zq.", "parameters": SCHEMA}
    return {"type": "function", "function": function}


# ---------------------------------------------------------------- the forms of a call

# One object with name and arguments (Qwen, Hermes, Llama 3), a name before an object (DeepSeek,
# Mistral, gpt-oss), or a name before arguments one by one (Qwen 3.5, GLM, LFM2).

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

    `is_text`: the arguments are JSON in a string."""

    name_key: str
    arguments_key: str
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
    return ObjectForm(name_key, arguments_key, wrapper, plain_key is None)


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
