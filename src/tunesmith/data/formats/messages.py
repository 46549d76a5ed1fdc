"""Messages as the OpenAI API or ShareGPT writes them, checked and brought into one shape.

    messages of a row -> list of (message, weight); weight 0 is not trained

What changes: `train`, `weight` and `loss_weight` leave the message and become its weight; a list of text parts becomes
one string, its `reasoning` and `tool_call` parts the fields of an OpenAI message;
null beside tool calls becomes ""; the older `functions`, `function_call` and role `function` become `tools`,
`tool_calls` and role `tool`; ShareGPT's `from` and `value` become `role` and `content`. Everything else stays as it is
in the file, tool-call arguments byte for byte: a string stays that string, an object keeps its keys, their order and
their values. A part that is no text, such as an `image_url`, is refused: nothing is ever fetched.
"""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Json, Row
from tunesmith.data.readers.decode import Spot, read_json_text
from tunesmith.data.readers.invalid_row import BadRow

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
HEAVIEST = 1000  # a weight above it is a mistake
OTHER_NAMES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


def read_turns(where: str, messages: Any, key: str, *, trained: bool = True) -> list[tuple[Json, float]]:
    """Read a list of messages; assistant turns that say nothing else have weight 1 (0 if not `trained`)."""
    if not isinstance(messages, list) or not messages:
        what = f"`{key}` is empty" if messages == [] else f"`{key}` is not a list of messages"
        raise BadRow("not messages", what, where=where, fix='write [{"role": ..., "content": ...}, ...]')
    return [_read_turn(where, message, f"{key}[{i}]", trained) for i, message in enumerate(messages)]


def _read_turn(where: str, message: Any, place: str, trained: bool) -> tuple[Json, float]:
    if not isinstance(message, dict):
        raise BadRow(
            "not messages", f"{place} is not an object", where=where, fix='write {"role": ..., "content": ...}'
        )
    if "from" in message and "role" not in message:
        message = _from_sharegpt(where, message, place)
    if "loss_weight" in message and "weight" not in message:
        message = {**message, "weight": message["loss_weight"]}
    role = _role(where, message, place)
    if role == "assistant" and isinstance(message.get("content"), list):
        message = _from_parts(where, message, place)
    turn = {key: value for key, value in message.items() if key not in ("train", "weight", "loss_weight")}
    turn["role"] = "tool" if role == "function" else role
    calls = _calls(where, turn.pop("tool_calls", None), turn.pop("function_call", None), place)
    if calls:
        _check_calls(where, calls, role, place)
        turn["tool_calls"] = calls
    weight = _weight(where, message, place, 1.0 if trained and role == "assistant" else 0.0)
    turn["content"] = _content(where, message.get("content"), place, missing_is_fine=bool(calls))
    if role == "assistant" and weight and not calls and not turn["content"].strip():
        fix = "write the answer, drop the row, or mark the turn `train: false`"
        raise BadRow("empty answer", f"{place}: the assistant's answer is empty", where=where, fix=fix)
    return turn, weight


def _from_sharegpt(where: str, message: Json, place: str) -> Json:
    """A ShareGPT message under OpenAI's names; a `function_call` holds its calls as JSON text."""
    turn = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, value = message["from"], message.get("value")
    if speaker != "function_call":
        known = OTHER_NAMES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": known, "content": value, **turn}
    if not isinstance(value, str):
        raise BadRow("wrong tool call", f"{place}: the call is not a text", where=where, fix="write it as JSON text")
    calls = _json_text(where, value, place)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": [_as_function(call) for call in calls], **turn}


def _from_parts(where: str, message: Json, place: str) -> Json:
    """An assistant message whose content has `reasoning` and `tool_call` parts, under OpenAI's names."""
    kinds = {kind: [part for part in message["content"] if _kind(part) == kind] for kind in ("reasoning", "tool_call")}
    said: dict[str, list[Any]] = {kind: [part.get("value") for part in parts] for kind, parts in kinds.items()}
    if not all(isinstance(value, str) for values in said.values() for value in values):
        raise BadRow("not text", f"{place}: a part has no `value`", where=where, fix="write it as text")
    found = {**message, "content": [part for part in message["content"] if _kind(part) not in said]}
    if said["reasoning"]:
        found["reasoning_content"] = "".join(said["reasoning"])
    if said["tool_call"]:
        found["tool_calls"] = [_as_function(_json_text(where, text, place)) for text in said["tool_call"]]
    return found


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _as_function(value: Any) -> Any:
    """A bare {name, ...}, as ShareGPT files have it for calls and tools, in the shape of the OpenAI API."""
    bare = isinstance(value, dict) and "name" in value and "function" not in value
    return {"type": "function", "function": value} if bare else value


def _json_text(where: str, text: str, place: str) -> Any:
    try:
        return read_json_text(text, Spot(place))
    except BadRow as problem:
        raise BadRow(problem.reason, f"{place}: {problem.what}", where=where, fix=problem.fix) from None


def _role(where: str, message: Json, place: str) -> str:
    role = message.get("role")
    if role in ROLES:
        return role
    what = f"{place} has no role" if role is None else f"{place} has the unknown role {role!r:.60}"
    other = OTHER_NAMES.get(str(role).lower())
    raise BadRow(
        "unknown role", what, where=where, fix=f"write `{other}`" if other else f"use one of {', '.join(ROLES)}"
    )


def _weight(where: str, message: Json, place: str, default: float) -> float:
    """`train: false` and `weight: 0` say the same; other weights multiply the loss of the turn."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return default
    if train is not None and not isinstance(train, bool):
        raise _wrong_weight(where, f"{place}: `train` is {train!r:.40}", "write true or false")
    if weight is None:
        weight = 1.0 if train else 0.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= HEAVIEST:
        fix = f"write a number from 0 to {HEAVIEST}"
        raise _wrong_weight(where, f"{place}: `weight` is {weight!r:.40}", fix)
    if train is not None and train != (weight > 0):
        raise _wrong_weight(where, f"{place}: `train` and `weight` contradict each other", "keep one of them")
    if weight > 0 and message["role"] != "assistant":
        fix = "only assistant turns may have `train: true` or a weight"
        raise _wrong_weight(where, f"{place}: a {message['role']} turn cannot be trained", fix)
    return float(weight)


def _wrong_weight(where: str, what: str, fix: str) -> BadRow:
    return BadRow("wrong weight", what, where=where, fix=fix)


def _content(where: str, content: Any, place: str, *, missing_is_fine: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if missing_is_fine:
            return ""  # templates print null as "None"
        what, fix = f"{place}: the content is null or missing", 'write a string, or "" for none'
        raise BadRow("null content", what, where=where, fix=fix)
    if isinstance(content, list):
        return "".join(_text_part(where, part, f"{place}.content[{i}]") for i, part in enumerate(content))
    what = f"{place}: the content is a {type(content).__name__}, not a string"
    raise BadRow("not text", what, where=where, fix="write a string; JSON goes into it as text")


def _text_part(where: str, part: Any, place: str) -> str:
    text = part.get("text", part.get("value")) if _kind(part) == "text" else None
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    what = f"{place} has no `text`" if kind == "text" else f"{place} is {kind!r:.60}, not text"
    fix = "only text is trained, and nothing is fetched; drop the row or the part"
    raise BadRow("not text", what, where=where, fix=fix)


# ---------------------------------------------------------------- tools


def _calls(where: str, calls: Any, older: Any, place: str) -> Any:
    if calls and older:
        what = f"{place} has `tool_calls` and `function_call`"
        raise BadRow("contradiction", what, where=where, fix="keep `tool_calls`")
    return [{"type": "function", "function": older}] if older else calls


def _check_calls(where: str, calls: Any, role: str, place: str) -> None:
    def wrong(what: str, fix: str) -> BadRow:
        return BadRow("wrong tool call", what, where=where, fix=fix)

    if role != "assistant":
        raise wrong(f"{place}: a {role} turn has tool calls", "only an assistant turn calls tools")
    if not isinstance(calls, list):
        raise wrong(f"{place}: `tool_calls` is not a list", "write a list of calls")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write {"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise wrong(f"{place}.tool_calls[{i}] names no function", fix)
        if not isinstance(function.get("arguments", {}), (str, dict)):
            what = f"{place}.tool_calls[{i}]: the arguments are neither an object nor a string"
            raise wrong(what, "write a JSON object")


def read_tools(row: Row) -> tuple[Json, ...]:
    """The tools of a row: `tools`, a list or its JSON text, or the older `functions`. Raises BadRow."""
    tools, functions = row.data.get("tools"), row.data.get("functions")
    if tools and functions:
        raise BadRow("contradiction", "the row has `tools` and `functions`", where=row.id, fix="keep `tools`")
    if isinstance(tools, str):
        tools = [_as_function(tool) for tool in _tools_of(row, tools)] if tools.strip() else None
    key, found = ("functions", functions) if functions else ("tools", tools)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _no_tools(row, key)
    return tuple({"type": "function", "function": tool} if key == "functions" else tool for tool in found)


def _tools_of(row: Row, text: str) -> list[Any]:
    found = _json_text(row.id, text, "tools")
    if not isinstance(found, list):
        raise _no_tools(row, "tools")
    return found


def _no_tools(row: Row, key: str) -> BadRow:
    fix = "write a list of JSON schemas"
    return BadRow("wrong tools", f"`{key}` is not a list of objects", where=row.id, fix=fix)
