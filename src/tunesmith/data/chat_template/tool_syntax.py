"""Learn how a chat template writes tool calls, so that calls can be read from an answer.

    learn_tool_syntax(renderer) -> ToolSyntax, or InputError with the reason

Made-up calls are rendered, and the text around their names and arguments is the syntax: there is no
table of models. A template is learned only if what it renders is read back as the same calls: with
nested arguments, without any, with several calls, and with other content. Left out: reading an
answer while it grows (serve/tool_calls.py), enforcing a call (serve/tool_calls.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.call_forms import (
    CallForm,
    ToolCall,
    find_named_form,
    find_object_form,
    find_parts_form,
)
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
    after the last. `forced_opening` is all that the template writes between a prompt and a call;
    None if a call is no continuation of a prompt."""

    form: CallForm
    opening: str
    separator: str | None
    closing: str
    forced_opening: str | None = None

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
        forced = text_1[:start] if self.is_continuation((FIRST,)) else None
        return self.find_separator(ToolSyntax(form, opening, None, text_1[end:], forced))

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

    def is_continuation(self, arguments: Sequence[Json]) -> bool:
        prompt, full = self.render_texts(arguments, "")
        return full.startswith(prompt)

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
