"""The grammar of a call that has to be made, in the syntax that a chat template writes.

    describe_calls(syntax, schemas, renderer) -> the text of a grammar, or InputError

In: the learned syntax, and the tools of a request with their schemas. Out: llguidance's Lark: the
template's opening, one call with arguments by their schema, its closing. Whatever the grammar lets
through is read back as the same call; what it cannot hold is refused by name. Left out: which tools
there are (tool_requests.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.call_forms import NamedForm, ObjectForm, PartsForm
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.template_probe import count_common_prefix
from tunesmith.data.chat_template.tool_syntax import ToolSyntax
from tunesmith.model.generation.grammar import embed_schema

# What a schema may say where arguments are written one by one; other keywords are refused.
NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema"}
DEFINITIONS = {"$defs", "definitions"}
TOOL_KEYWORDS = {"type", "properties", "required", "additionalProperties", *NOTES, *DEFINITIONS}
VALUE_KEYWORDS = {"type", "enum", "const", *NOTES}
NUMBERS = ("integer", "number", "null")  # their JSON has no text in it
BOOLEANS = ("true", "false", "True", "False")  # as JSON and as Python write them
SPACE = '" "?'
PYTHON_TEXT = r"""/'([^'\\\x00-\x1f\x7f]|\\['"\\abfnrtv])*'/"""


def describe_calls(syntax: ToolSyntax, schemas: Mapping[str, Json], renderer: Renderer) -> str:
    """Return the grammar of one call of one of the tools (name -> schema of the arguments).

    Raises InputError for a template or a schema that no grammar holds."""
    if syntax.forced_opening is None:
        raise InputError("the chat template does not continue a prompt with a call")
    grammar = _CallGrammar(renderer)
    calls: list[str] = []
    for name, schema in schemas.items():
        calls.append(grammar.describe(syntax, name, schema))
    opening = grammar.quote(syntax.forced_opening)
    closing = grammar.quote(syntax.closing.rstrip())
    start = f"start: {opening} ({' | '.join(calls)}) {closing}"
    return "\n".join([start, *grammar.rules])


@dataclass(frozen=True)
class _CallGrammar:
    """Terms of a grammar for one renderer, and the rules that they name."""

    renderer: Renderer
    rules: list[str] = field(default_factory=list[str])

    def quote(self, text: str) -> str:
        """Return a text of the template as terms, with its control tokens by id."""
        terms: list[str] = []
        position = 0
        tokenizer = self.renderer.tokenizer
        for match in tokenizer.pattern.finditer(text):
            terms.append(_quote_plain(text[position : match.start()]))
            terms.append(f"<[{tokenizer.controls[match[0]].id}]>")
            position = match.end()
        terms.append(_quote_plain(text[position:]))
        return " ".join(filter(None, terms))

    def add_rule(self, body: str, kind: str = "rule") -> str:
        """Add a rule, or a `TEXT` of patterns, and return its name."""
        name = f"{kind}_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def describe(self, syntax: ToolSyntax, name: str, schema: Json) -> str:
        """Return the term of a call."""
        form = syntax.form
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InputError(f"the parameters of {name} must be of type object")
        schema = {**schema, "type": "object"}
        if isinstance(form, NamedForm):
            return f"{self.quote(name + form.between)} {embed_schema(schema)}"
        if isinstance(form, PartsForm):
            return f"{self.quote(name)} ({_PartsGrammar(self, form, schema).describe()})"
        if not isinstance(form, ObjectForm) or form.is_text or form.wrapper:
            raise InputError("the chat template does not write arguments as an object")
        if set(form.keys) != {form.name_key, form.arguments_key}:
            raise InputError("the chat template writes more than name and arguments")
        parts: list[str] = []
        for key in form.keys:
            value = _quote_plain(json.dumps(name)) if key == form.name_key else embed_schema(schema)
            parts.append(f'{_quote_plain(json.dumps(key))} {SPACE} ":" {SPACE} {value}')
        inside = f' {SPACE} "," {SPACE} '.join(parts)
        return f'"{{" {SPACE} {inside} {SPACE} "}}"'


# ---------------------------------------------------------------- arguments one by one


class _PartsGrammar:
    """The arguments of one tool, in the order of its schema, each optional one or not.

    A text without quotes ends where `end` begins: what follows both a middle and a last value."""

    def __init__(self, grammar: _CallGrammar, form: PartsForm, schema: Json) -> None:
        _refuse_keywords(schema, TOOL_KEYWORDS)
        if wrong := next((ref for ref in _iter_references(schema) if not _is_definition(ref)), ""):
            message = "is not resolved where arguments are written one by one"
            raise InputError(f"the reference {wrong:.80} {message}")
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise InputError("properties is not an object, or required is not a list")
        if unknown := [name for name in required if name not in list(properties)]:
            message = f"a required argument is not among the properties: {unknown[0]!s:.80}"
            raise InputError(message)
        self._grammar = grammar
        self._form = form
        self._properties = list(properties.items())
        self._required = frozenset(required)
        self._definitions = {key: schema[key] for key in DEFINITIONS & set(schema)}
        self._end = "" if form.quote else self._find_end()

    def _find_end(self) -> str:
        """Return what follows every value, without a part of a control token."""
        form = self._form
        size = count_common_prefix(form.between, form.after)
        pattern = self._grammar.renderer.tokenizer.pattern
        for text in (form.between, form.after):
            for match in pattern.finditer(text):
                if match.start() < size < match.end():
                    size = match.start()
        if not size:
            raise InputError("the chat template does not end each argument in the same way")
        return form.between[:size]

    def describe(self) -> str:
        """Return the term of all arguments, and of what ends the call."""
        terms: list[str] = []
        if self._properties:
            terms.append(f"{self._grammar.quote(self._form.before)} {self._add_rules()}")
        if not self._required:
            terms.append(self._grammar.quote(self._form.empty))
        return " | ".join(terms)

    def _add_rules(self) -> str:
        """Add a rule for each argument and return that of the first: from the last to the first,
        since each names the one after it."""
        quote = self._grammar.quote
        between = quote(self._form.between[len(self._end) :])
        following = self._grammar.add_rule(quote(self._form.after[len(self._end) :]))
        first = ""
        for name, schema in reversed(self._properties):
            argument = f"{self._describe_argument(name, schema)} {following}"
            is_optional = name not in self._required
            first = argument + (f" | {first}" if is_optional and first else "")
            first = self._grammar.add_rule(first)
            skipped = f" | {following}" if is_optional else ""
            following = self._grammar.add_rule(f"{between} {argument}{skipped}")
        return first

    def _describe_argument(self, name: str, schema: Any) -> str:
        middle = self._form.middle
        if (name + middle).index(middle) != len(name):
            raise InputError(f"the name of an argument contains a part of the syntax: {name:.80}")
        value = self._describe_value(name, schema)
        return f"{_quote_plain(name)} {self._grammar.quote(middle)} {value}"

    def _describe_value(self, name: str, schema: Any) -> str:
        """Return the term of a value and, where texts have no quotes, of `end` after it."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise InputError(f"the schema of {name:.80} is not an object")
        end = self._grammar.quote(self._end)
        kind = schema.get("type")
        if "enum" in schema or "const" in schema:
            _refuse_keywords(schema, VALUE_KEYWORDS, name)
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, list) or not values:
                raise InputError(f"enum of {name:.80} is not a list of values")
            return f"({' | '.join(self._quote_value(value, schema) for value in values)}) {end}"
        if kind == "boolean":
            return f"({' | '.join(map(_quote_plain, BOOLEANS))}) {end}"
        if kind == "string" and self._form.quote != '"':
            _refuse_keywords(schema, VALUE_KEYWORDS, name)
            return PYTHON_TEXT if self._form.quote else self._describe_text()
        if not self._form.quote and "\n" not in self._end and kind not in NUMBERS:
            raise InputError(f"a value of {name:.80} could contain the text that ends an argument")
        return f"{embed_schema({**schema, **self._definitions})} {end}"

    def _describe_text(self) -> str:
        """Return the term of any text without `end` in it, and of `end`."""
        control = self._grammar.renderer.tokenizer.pattern.search(self._end)
        start = len(self._end) if control is None else control.start()
        last = _escape(self._end[:start])
        # letters of a control token are no control token, and would still be read as the end
        wrong = f"{last}(?s:.+)" if control is None else f"{_escape(control[0])}(?s:.*)"
        text = self._grammar.add_rule(f"/(?s:.*){last}/ & ~/(?s:.*){wrong}/", "TEXT")
        return f"{text} {self._grammar.quote(self._end[start:])}"

    def _quote_value(self, value: Any, schema: Json) -> str:
        """Return the term of a given value, as it is read back."""
        texts = [json.dumps(value, ensure_ascii=False)]
        if isinstance(value, str) and self._form.quote != '"':
            texts.insert(0, _quote_python(value) if self._form.quote else value)
        for text in texts:
            is_unended = not self._end or self._end not in text
            if is_unended and self._form.is_read_as(text, value, schema):
                return _quote_plain(text)
        raise InputError(f"a value of an argument cannot be written: {str(value)!r:.80}")


def _is_definition(reference: str) -> bool:
    return any(reference.startswith(f"#/{key}/") for key in DEFINITIONS)


def _iter_references(schema: Any) -> Iterator[str]:
    """Yield the references of a schema, whose depth is bounded."""
    if isinstance(schema, list):
        for item in schema:
            yield from _iter_references(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield str(value)
            yield from _iter_references(value)


def _refuse_keywords(schema: Json, keywords: set[str], name: str = "") -> None:
    for key in schema:
        if key not in keywords:
            where = f" of {name:.80}" if name else ""
            message = f"{key:.80}{where} is not enforced where arguments are written one by one"
            raise InputError(message)


def _quote_python(text: str) -> str:
    """Return a text in single quotes."""
    for char, escape in (("\\", r"\\"), ("'", r"\'"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(char, escape)
    return f"'{text}'"


def _quote_plain(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escape(text: str) -> str:
    """Return a text as a pattern of Lark, whose delimiter is a slash."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"n")
