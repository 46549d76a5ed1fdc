"""The grammar of a call that has to be made, in the syntax that a chat template writes.

    describe_calls(syntax, schemas, renderer) -> the text of a grammar, or InputError

In: the learned syntax, and the tools of a request with their schemas. Out: llguidance's Lark: the
template's opening, one call with its arguments as an object by their schema, its closing. Templates
that write arguments one by one are refused. Left out: which tools there are (tool_requests.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.call_forms import CallForm, NamedForm, ObjectForm
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ToolSyntax
from tunesmith.model.generation.grammar import embed_schema

SPACE = '" "?'


def describe_calls(syntax: ToolSyntax, schemas: Mapping[str, Json], renderer: Renderer) -> str:
    """Return the grammar of one call of one of the tools (name -> schema of the arguments).

    Raises InputError for a template or a schema that no grammar holds."""
    if syntax.forced_opening is None:
        raise InputError("the chat template does not continue a prompt with a call")
    calls: list[str] = []
    for name, schema in schemas.items():
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InputError(f"the parameters of {name} must be of type object")
        arguments = embed_schema({**schema, "type": "object"})
        calls.append(_describe_call(syntax.form, name, arguments, renderer))
    opening = _quote(syntax.forced_opening, renderer)
    closing = _quote(syntax.closing.rstrip(), renderer)
    return f"start: {opening} ({' | '.join(calls)}) {closing}"


def _describe_call(form: CallForm, name: str, arguments: str, renderer: Renderer) -> str:
    """Return the term of a call."""
    if isinstance(form, NamedForm):
        return f"{_quote(name + form.between, renderer)} {arguments}"
    if not isinstance(form, ObjectForm) or form.is_text or form.wrapper:
        raise InputError("the chat template does not write arguments as an object")
    if set(form.keys) != {form.name_key, form.arguments_key}:
        raise InputError("the chat template writes more than name and arguments")
    parts: list[str] = []
    for key in form.keys:
        value = _quote_plain(json.dumps(name)) if key == form.name_key else arguments
        parts.append(f'{_quote_plain(json.dumps(key))} {SPACE} ":" {SPACE} {value}')
    inside = f' {SPACE} "," {SPACE} '.join(parts)
    return f'"{{" {SPACE} {inside} {SPACE} "}}"'


def _quote(text: str, renderer: Renderer) -> str:
    """Return a text of the template as terms, with its control tokens by id."""
    terms: list[str] = []
    position = 0
    tokenizer = renderer.tokenizer
    for match in tokenizer.pattern.finditer(text):
        terms.append(_quote_plain(text[position : match.start()]))
        terms.append(f"<[{tokenizer.controls[match[0]].id}]>")
        position = match.end()
    terms.append(_quote_plain(text[position:]))
    return " ".join(filter(None, terms))


def _quote_plain(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
