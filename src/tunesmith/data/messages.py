"""Messages as the OpenAI API writes them, checked and brought into one shape.

    messages of a row -> list of (message, weight); weight 0 is not trained

What changes: `train` and `weight` leave the message and become its weight; a list of text parts becomes one string;
null beside tool calls becomes ""; the older `functions`, `function_call` and role `function` become `tools`,
`tool_calls` and role `tool`. Everything else stays as it is in the file, tool-call arguments byte for byte: a string
stays that string, an object keeps its keys, their order and their values.
"""

from __future__ import annotations

from typing import Any

from tunesmith.errors import InputError
from tunesmith.types import Json, Row

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
HEAVIEST = 1000  # a weight above it is a mistake
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


def read_turns(where: str, messages: Any, key: str, *, trained: bool = True) -> list[tuple[Json, float]]:
    """Read a list of messages; assistant turns that say nothing else have weight 1 (0 if not `trained`)."""
    if not isinstance(messages, list) or not messages:
        what = f"`{key}` is empty" if messages == [] else f"`{key}` is not a list of messages"
        raise InputError(what, where=where, fix='write [{"role": ..., "content": ...}, ...]')
    return [_read_turn(where, message, f"{key}[{i}]", trained) for i, message in enumerate(messages)]


def _read_turn(where: str, message: Any, place: str, trained: bool) -> tuple[Json, float]:
    if not isinstance(message, dict):
        raise InputError(f"{place} is not an object", where=where, fix='write {"role": ..., "content": ...}')
    role = _role(where, message, place)
    turn = {key: value for key, value in message.items() if key not in ("train", "weight")}
    turn["role"] = "tool" if role == "function" else role
    calls = _calls(where, turn.pop("tool_calls", None), turn.pop("function_call", None), place)
    if calls:
        _check_calls(where, calls, role, place)
        turn["tool_calls"] = calls
    weight = _weight(where, message, place, 1.0 if trained and role == "assistant" else 0.0)
    turn["content"] = _content(where, message.get("content"), place, missing_is_fine=bool(calls))
    if role == "assistant" and weight and not calls and not turn["content"].strip():
        fix = "write the answer, drop the row, or mark the turn `train: false`"
        raise InputError(f"{place}: the assistant's answer is empty", where=where, fix=fix)
    return turn, weight


def _role(where: str, message: Json, place: str) -> str:
    role = message.get("role")
    if role in ROLES:
        return role
    what = f"{place} has no role" if role is None else f"{place} has the unknown role {role!r}"
    other = OTHER_NAMES.get(str(role).lower())
    raise InputError(what, where=where, fix=f"write `{other}`" if other else f"use one of {', '.join(ROLES)}")


def _weight(where: str, message: Json, place: str, default: float) -> float:
    """`train: false` and `weight: 0` say the same; other weights multiply the loss of the turn."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return default
    if train is not None and not isinstance(train, bool):
        raise InputError(f"{place}: `train` is {train!r}", where=where, fix="write true or false")
    if weight is None:
        weight = 1.0 if train else 0.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= HEAVIEST:
        raise InputError(
            f"{place}: `weight` is {weight!r:.40}", where=where, fix=f"write a number from 0 to {HEAVIEST}"
        )
    if train is not None and train != (weight > 0):
        raise InputError(f"{place}: `train` and `weight` contradict each other", where=where, fix="keep one of them")
    if weight > 0 and message["role"] != "assistant":
        what = f"{place}: a {message['role']} turn cannot be trained"
        raise InputError(what, where=where, fix="only assistant turns may have `train: true` or a weight")
    return float(weight)


def _content(where: str, content: Any, place: str, *, missing_is_fine: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if missing_is_fine:
            return ""  # templates print null as "None"
        raise InputError(f"{place}: the content is null or missing", where=where, fix='write a string, or "" for none')
    if isinstance(content, list):
        return "".join(_text_part(where, part, f"{place}.content[{i}]") for i, part in enumerate(content))
    what = f"{place}: the content is a {type(content).__name__}, not a string"
    raise InputError(what, where=where, fix="write a string; JSON goes into it as text")


def _text_part(where: str, part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InputError(
        f"{place} is {kind!r}, not text", where=where, fix="only text is trained; drop the row or the part"
    )


def _calls(where: str, calls: Any, older: Any, place: str) -> Any:
    if calls and older:
        what = f"{place} has `tool_calls` and `function_call`"
        raise InputError(what, where=where, fix="keep `tool_calls`")
    return [{"type": "function", "function": older}] if older else calls


def _check_calls(where: str, calls: Any, role: str, place: str) -> None:
    if role != "assistant":
        raise InputError(
            f"{place}: a {role} turn has tool calls", where=where, fix="only an assistant turn calls tools"
        )
    if not isinstance(calls, list):
        raise InputError(f"{place}: `tool_calls` is not a list", where=where, fix="write a list of calls")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write {"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise InputError(f"{place}.tool_calls[{i}] names no function", where=where, fix=fix)
        if not isinstance(function.get("arguments", {}), (str, dict)):
            what = f"{place}.tool_calls[{i}]: the arguments are neither an object nor a string"
            raise InputError(what, where=where, fix="write a JSON object")


def read_tools(row: Row) -> tuple[Json, ...]:
    """The tools of a row: `tools`, or the older `functions`. Raises InputError if they are not a list of objects."""
    tools, functions = row.data.get("tools"), row.data.get("functions")
    if tools and functions:
        raise InputError("the row has `tools` and `functions`", where=row.id, fix="keep `tools`")
    key, found = ("functions", functions) if functions else ("tools", tools)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise InputError(f"`{key}` is not a list of objects", where=row.id, fix="write a list of JSON schemas")
    return tuple({"type": "function", "function": tool} if key == "functions" else tool for tool in found)
