"""Messages as the OpenAI API or ShareGPT writes them, checked and brought into one shape.

    messages of a row -> list of (message, weight); weight 0 is not trained

What changes: `train`, `weight` and `loss_weight` leave the message and become its weight; a list of
text parts becomes one string, its `reasoning` and `tool_call` parts the fields of an OpenAI
message; null beside tool calls becomes ""; the older `functions`, `function_call` and role
`function` become `tools`, `tool_calls` and role `tool`; ShareGPT's `from` and `value` become `role`
and `content`. Everything else stays as it is in the file, tool-call arguments byte for byte: a
string stays that string, an object keeps its keys, their order and their values. A part that is no
text, such as an `image_url`, is refused: nothing is ever fetched."""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Json, Row
from tunesmith.data.readers.decode import SourceLocation, read_json_text
from tunesmith.data.readers.invalid_row import InvalidRow

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_WEIGHT = 1000  # a weight above it is a mistake
ROLE_ALIASES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


def read_turns(
    where: str, messages: Any, key: str, *, is_trained: bool = True
) -> list[tuple[Json, float]]:
    """Read a list of messages; assistant turns that say nothing else have weight 1 (0 if not
    `trained`)."""
    if not isinstance(messages, list) or not messages:
        problem = f"`{key}` is empty" if messages == [] else f"`{key}` is not a list of messages"
        raise InvalidRow(
            "not messages", problem, where=where, fix='write [{"role": ..., "content": ...}, ...]'
        )
    return [
        _read_turn(where, message, f"{key}[{i}]", is_trained) for i, message in enumerate(messages)
    ]


def _read_turn(where: str, message: Any, key_path: str, is_trained: bool) -> tuple[Json, float]:
    if not isinstance(message, dict):
        raise InvalidRow(
            "not messages",
            f"{key_path} is not an object",
            where=where,
            fix='write {"role": ..., "content": ...}',
        )
    if "from" in message and "role" not in message:
        message = _convert_sharegpt(where, message, key_path)
    if "loss_weight" in message and "weight" not in message:
        message = {**message, "weight": message["loss_weight"]}
    role = _read_role(where, message, key_path)
    if role == "assistant" and isinstance(message.get("content"), list):
        message = _convert_parts(where, message, key_path)
    turn = {
        key: value
        for key, value in message.items()
        if key not in ("train", "weight", "loss_weight")
    }
    turn["role"] = "tool" if role == "function" else role
    calls = _read_calls(
        where, turn.pop("tool_calls", None), turn.pop("function_call", None), key_path
    )
    if calls:
        _check_calls(where, calls, role, key_path)
        turn["tool_calls"] = calls
    weight = _read_weight(
        where, message, key_path, 1.0 if is_trained and role == "assistant" else 0.0
    )
    turn["content"] = _read_content(
        where, message.get("content"), key_path, is_optional=bool(calls)
    )
    if role == "assistant" and weight and not calls and not turn["content"].strip():
        fix = "write the answer, drop the row, or mark the turn `train: false`"
        raise InvalidRow(
            "empty answer", f"{key_path}: the assistant's answer is empty", where=where, fix=fix
        )
    return turn, weight


def _convert_sharegpt(where: str, message: Json, key_path: str) -> Json:
    """A ShareGPT message under OpenAI's names; a `function_call` holds its calls as JSON text."""
    turn = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, value = message["from"], message.get("value")
    if speaker != "function_call":
        role = ROLE_ALIASES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": value, **turn}
    if not isinstance(value, str):
        raise InvalidRow(
            "wrong tool call",
            f"{key_path}: the call is not a text",
            where=where,
            fix="write it as JSON text",
        )
    calls = _parse_json_text(where, value, key_path)
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [_wrap_function(call) for call in calls],
        **turn,
    }


def _convert_parts(where: str, message: Json, key_path: str) -> Json:
    """An assistant message whose content has `reasoning` and `tool_call` parts, under OpenAI's
    names."""
    kinds = {
        kind: [part for part in message["content"] if _get_part_type(part) == kind]
        for kind in ("reasoning", "tool_call")
    }
    values_by_kind: dict[str, list[Any]] = {
        kind: [part.get("value") for part in parts] for kind, parts in kinds.items()
    }
    if not all(isinstance(value, str) for values in values_by_kind.values() for value in values):
        raise InvalidRow(
            "not text", f"{key_path}: a part has no `value`", where=where, fix="write it as text"
        )
    converted = {
        **message,
        "content": [
            part for part in message["content"] if _get_part_type(part) not in values_by_kind
        ],
    }
    if values_by_kind["reasoning"]:
        converted["reasoning_content"] = "".join(values_by_kind["reasoning"])
    if values_by_kind["tool_call"]:
        converted["tool_calls"] = [
            _wrap_function(_parse_json_text(where, text, key_path))
            for text in values_by_kind["tool_call"]
        ]
    return converted


def _get_part_type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _wrap_function(value: Any) -> Any:
    """A bare {name, ...}, as ShareGPT files have it for calls and tools, in the shape of the OpenAI
    API."""
    is_bare = isinstance(value, dict) and "name" in value and "function" not in value
    return {"type": "function", "function": value} if is_bare else value


def _parse_json_text(where: str, text: str, key_path: str) -> Any:
    try:
        return read_json_text(text, SourceLocation(key_path))
    except InvalidRow as problem:
        raise InvalidRow(
            problem.reason, f"{key_path}: {problem.message}", where=where, fix=problem.fix
        ) from None


def _read_role(where: str, message: Json, key_path: str) -> str:
    role = message.get("role")
    if role in ROLES:
        return role
    problem = (
        f"{key_path} has no role"
        if role is None
        else f"{key_path} has the unknown role {role!r:.60}"
    )
    alias = ROLE_ALIASES.get(str(role).lower())
    raise InvalidRow(
        "unknown role",
        problem,
        where=where,
        fix=f"write `{alias}`" if alias else f"use one of {', '.join(ROLES)}",
    )


def _read_weight(where: str, message: Json, key_path: str, default: float) -> float:
    """`train: false` and `weight: 0` say the same; other weights multiply the loss of the turn."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return default
    if train is not None and not isinstance(train, bool):
        raise _build_weight_error(
            where, f"{key_path}: `train` is {train!r:.40}", "write true or false"
        )
    if weight is None:
        weight = 1.0 if train else 0.0
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 <= weight <= MAX_WEIGHT
    ):
        fix = f"write a number from 0 to {MAX_WEIGHT}"
        raise _build_weight_error(where, f"{key_path}: `weight` is {weight!r:.40}", fix)
    if train is not None and train != (weight > 0):
        raise _build_weight_error(
            where, f"{key_path}: `train` and `weight` contradict each other", "keep one of them"
        )
    if weight > 0 and message["role"] != "assistant":
        fix = "only assistant turns may have `train: true` or a weight"
        raise _build_weight_error(
            where, f"{key_path}: a {message['role']} turn cannot be trained", fix
        )
    return float(weight)


def _build_weight_error(where: str, problem: str, fix: str) -> InvalidRow:
    return InvalidRow("wrong weight", problem, where=where, fix=fix)


def _read_content(where: str, content: Any, key_path: str, *, is_optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if is_optional:
            return ""  # templates print null as "None"
        problem, fix = (
            f"{key_path}: the content is null or missing",
            'write a string, or "" for none',
        )
        raise InvalidRow("null content", problem, where=where, fix=fix)
    if isinstance(content, list):
        return "".join(
            _read_text_part(where, part, f"{key_path}.content[{i}]")
            for i, part in enumerate(content)
        )
    problem = f"{key_path}: the content is a {type(content).__name__}, not a string"
    raise InvalidRow(
        "not text", problem, where=where, fix="write a string; JSON goes into it as text"
    )


def _read_text_part(where: str, part: Any, key_path: str) -> str:
    text = part.get("text", part.get("value")) if _get_part_type(part) == "text" else None
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    problem = (
        f"{key_path} has no `text`" if kind == "text" else f"{key_path} is {kind!r:.60}, not text"
    )
    fix = "only text is trained, and nothing is fetched; drop the row or the part"
    raise InvalidRow("not text", problem, where=where, fix=fix)


# ---------------------------------------------------------------- tools


def _read_calls(where: str, calls: Any, legacy_call: Any, key_path: str) -> Any:
    if calls and legacy_call:
        problem = f"{key_path} has `tool_calls` and `function_call`"
        raise InvalidRow("contradiction", problem, where=where, fix="keep `tool_calls`")
    return [{"type": "function", "function": legacy_call}] if legacy_call else calls


def _check_calls(where: str, calls: Any, role: str, key_path: str) -> None:
    def build_error(problem: str, fix: str) -> InvalidRow:
        return InvalidRow("wrong tool call", problem, where=where, fix=fix)

    if role != "assistant":
        raise build_error(
            f"{key_path}: a {role} turn has tool calls", "only an assistant turn calls tools"
        )
    if not isinstance(calls, list):
        raise build_error(f"{key_path}: `tool_calls` is not a list", "write a list of calls")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write {"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise build_error(f"{key_path}.tool_calls[{i}] names no function", fix)
        if not isinstance(function.get("arguments", {}), (str, dict)):
            problem = (
                f"{key_path}.tool_calls[{i}]: the arguments are neither an object nor a string"
            )
            raise build_error(problem, "write a JSON object")


def read_tools(row: Row) -> tuple[Json, ...]:
    """The tools of a row: `tools`, a list or its JSON text, or the older `functions`. Raises
    BadRow."""
    tools, functions = row.data.get("tools"), row.data.get("functions")
    if tools and functions:
        raise InvalidRow(
            "contradiction", "the row has `tools` and `functions`", where=row.id, fix="keep `tools`"
        )
    if isinstance(tools, str):
        tools = (
            [_wrap_function(tool) for tool in _parse_tools(row, tools)] if tools.strip() else None
        )
    key, tool_list = ("functions", functions) if functions else ("tools", tools)
    if tool_list is None:
        return ()
    if not isinstance(tool_list, list) or not all(isinstance(tool, dict) for tool in tool_list):
        raise _build_tools_error(row, key)
    return tuple(
        {"type": "function", "function": tool} if key == "functions" else tool for tool in tool_list
    )


def _parse_tools(row: Row, text: str) -> list[Any]:
    tools = _parse_json_text(row.id, text, "tools")
    if not isinstance(tools, list):
        raise _build_tools_error(row, "tools")
    return tools


def _build_tools_error(row: Row, key: str) -> InvalidRow:
    fix = "write a list of JSON schemas"
    return InvalidRow("wrong tools", f"`{key}` is not a list of objects", where=row.id, fix=fix)
