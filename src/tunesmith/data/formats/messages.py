"""Messages in OpenAI or ShareGPT form, validated and converted to one form.

    messages of a row -> list of (message, weight); weight 0 is not trained

Changes: `train`, `weight` and `loss_weight` leave the message and become its weight. A list of text
parts becomes one string; its `reasoning` and `tool_call` parts become the fields of an OpenAI
message. Null content of a message with tool calls becomes "". The older `functions`,
`function_call` and role `function` become `tools`, `tool_calls` and role `tool`. ShareGPT's `from`
and `value` become `role` and `content`. Everything else stays as in the file, tool-call arguments
byte for byte: a string stays that string, an object keeps its keys, their order and their values.
Parts that are not text, such as `image_url`, are refused: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from tunesmith.core.types import Json, Row, RowWeight
from tunesmith.data.readers.decode import SourceLocation, describe_type, read_json_text
from tunesmith.data.readers.invalid_row import InvalidRow

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROLE_ALIASES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "a recording"),
    **dict.fromkeys(("video", "video_url"), "a video"),
}
MAX_WEIGHT = 1000  # a larger weight is a mistake
MAX_MESSAGES = 4000  # of a row
WEIGHT_KEYS = ("train", "weight", "loss_weight")


def read_turns(
    where: str, messages: Any, key: str, *, is_trained: bool = True
) -> list[tuple[Json, float]]:
    """Return (message, weight) of each message in a list.

    Assistant turns without a weight get 1 (0 if not `is_trained`), other turns 0. Raises
    InvalidRow."""
    if not isinstance(messages, list) or not messages:
        problem = f"`{key}` is empty" if messages == [] else f"`{key}` is not a list of messages"
        fix = 'write [{"role": ..., "content": ...}, ...]'
        if isinstance(messages, str):
            fix += ", not as text, so not in CSV: use JSONL or Parquet"
        raise InvalidRow("not messages", problem, where=where, fix=fix)
    if len(messages) > MAX_MESSAGES:
        problem = f"`{key}` has {len(messages):,} messages, more than {MAX_MESSAGES:,}"
        raise InvalidRow("too many messages", problem, where=where, fix="split the row")
    turns: list[tuple[Json, float]] = []
    for i, message in enumerate(messages):
        turns.append(_read_turn(where, message, f"{key}[{i}]", is_trained))
    return turns


def _read_turn(where: str, message: Any, key_path: str, is_trained: bool) -> tuple[Json, float]:
    if not isinstance(message, dict):
        problem = f"{key_path} is not an object"
        fix = 'write {"role": ..., "content": ...}'
        raise InvalidRow("not messages", problem, where=where, fix=fix)
    if "from" in message and "role" not in message:
        message = _convert_sharegpt(where, message, key_path)
    if "loss_weight" in message and "weight" not in message:
        message = {**message, "weight": message["loss_weight"]}
    role = _read_role(where, message, key_path)
    if role == "assistant" and isinstance(message.get("content"), list):
        message = _convert_parts(where, message, key_path)
    turn = {key: value for key, value in message.items() if key not in WEIGHT_KEYS}
    turn["role"] = "tool" if role == "function" else role
    calls = turn.pop("tool_calls", None)
    if legacy_call := turn.pop("function_call", None):
        if calls:
            problem = f"{key_path} has both `tool_calls` and `function_call`"
            raise InvalidRow("contradiction", problem, where=where, fix="keep `tool_calls`")
        calls = [{"type": "function", "function": legacy_call}]
    if calls:
        _check_calls(where, calls, role, key_path)
        turn["tool_calls"] = calls
    default_weight = 1.0 if is_trained and role == "assistant" else 0.0
    weight = _read_weight(where, message, key_path, default_weight)
    content = message.get("content")
    if content is None and calls:
        content = ""  # templates would print null as "None"
    turn["content"] = _read_content(where, content, key_path)
    if role == "assistant" and weight and not calls and not turn["content"].strip():
        problem = f"{key_path}: the assistant's answer is empty"
        fix = "write the answer, remove the row, or set `train: false` on the turn"
        raise InvalidRow("empty answer", problem, where=where, fix=fix)
    return turn, weight


def _convert_sharegpt(where: str, message: Json, key_path: str) -> Json:
    """Convert a ShareGPT message to OpenAI form; a `function_call` holds its calls as JSON text."""
    turn = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker = message["from"]
    value = message.get("value")
    if speaker != "function_call":
        role = ROLE_ALIASES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": value, **turn}
    if not isinstance(value, str):
        problem = f"{key_path}: the call is not a string"
        raise InvalidRow("wrong tool call", problem, where=where, fix="write it as JSON text")
    calls = _parse_json_text(where, value, key_path)
    calls = [_wrap_function(call) for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": "", "tool_calls": calls, **turn}


def _convert_parts(where: str, message: Json, key_path: str) -> Json:
    """Convert the `reasoning` and `tool_call` parts of an assistant message to OpenAI fields."""
    texts: list[Any] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in message["content"]:
        kind = _get_part_type(part)
        if kind not in ("reasoning", "tool_call"):
            texts.append(part)
            continue
        value = part.get("value")
        if not isinstance(value, str):
            problem = f"{key_path}: a part has no `value`"
            raise InvalidRow("not text", problem, where=where, fix="write it as a string")
        if kind == "reasoning":
            reasoning.append(value)
        else:
            calls.append(_wrap_function(_parse_json_text(where, value, key_path)))
    converted = {**message, "content": texts}
    if reasoning:
        converted["reasoning_content"] = "".join(reasoning)
    if calls:
        converted["tool_calls"] = calls
    return converted


def _get_part_type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _find_medium(part: Any) -> str:
    """Return what a part that is not text holds, in words; empty for an unknown type."""
    kind = _get_part_type(part)
    return MEDIA_PARTS.get(kind, "") if isinstance(kind, str) else ""


def _wrap_function(value: Any) -> Any:
    """Wrap a bare {name, ...}, as ShareGPT has it for calls and tools, as the OpenAI API does."""
    is_bare = isinstance(value, dict) and "name" in value and "function" not in value
    return {"type": "function", "function": value} if is_bare else value


def _parse_json_text(where: str, text: str, key_path: str) -> Any:
    try:
        return read_json_text(text, SourceLocation(key_path))
    except InvalidRow as problem:
        message = f"{key_path}: {problem.message}"
        raise InvalidRow(problem.reason, message, where=where, fix=problem.fix) from None


def _read_role(where: str, message: Json, key_path: str) -> str:
    role = message.get("role")
    if role in ROLES:
        return role
    problem = f"{key_path} has the unknown role {role!r:.60}"
    if role is None:
        problem = f"{key_path} has no role"
    alias = ROLE_ALIASES.get(str(role).lower())
    fix = f"write `{alias}`" if alias else f"use one of {', '.join(ROLES)}"
    raise InvalidRow("unknown role", problem, where=where, fix=fix)


def _read_weight(where: str, message: Json, key_path: str, default: float) -> float:
    """Return the loss weight of a turn; `train: false` and `weight: 0` mean the same."""

    def build_error(problem: str, fix: str) -> InvalidRow:
        return InvalidRow("wrong weight", f"{key_path}: {problem}", where=where, fix=fix)

    train = message.get("train")
    weight = message.get("weight")
    if train is None and weight is None:
        return default
    if train is not None and not isinstance(train, bool):
        raise build_error(f"`train` is {train!r:.40}", "write true or false")
    if weight is None:
        weight = 1.0 if train else 0.0
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= MAX_WEIGHT:
        raise build_error(f"`weight` is {weight!r:.40}", f"write a number from 0 to {MAX_WEIGHT}")
    if train is not None and train != (weight > 0):
        raise build_error("`train` and `weight` contradict each other", "keep one of them")
    if weight > 0 and message["role"] != "assistant":
        fix = "set `train: true` or a weight on assistant turns only"
        raise build_error(f"a {message['role']} turn cannot be trained", fix)
    return RowWeight(weight)


def _read_content(where: str, content: Any, key_path: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts: list[str] = []
        for i, part in enumerate(content):
            parts.append(_read_text_part(where, part, f"{key_path}.content[{i}]"))
        return "".join(parts)
    if content is None:
        problem = f"{key_path}: the content is null or missing"
        fix = 'write a string, or "" for no content'
        raise InvalidRow("null content", problem, where=where, fix=fix)
    problem = f"{key_path}: the content is {describe_type(content)}, not a string"
    fix = "write a string; JSON goes into it as text"
    raise InvalidRow("not text", problem, where=where, fix=fix)


def _read_text_part(where: str, part: Any, key_path: str) -> str:
    if _get_part_type(part) == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
        problem = f"{key_path} has no `text`"
    elif medium := _find_medium(part):
        problem = f"the row has {medium}: {key_path} is {_get_part_type(part)!r}"
        fix = "remove the row, or the part if its answer needs only the text: only text is trained"
        raise InvalidRow("not text", problem, where=where, fix=fix)
    else:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        problem = f"{key_path} is {kind!r:.60}, not text"
    fix = "remove the row or the part: only text is trained, and nothing is downloaded"
    raise InvalidRow("not text", problem, where=where, fix=fix)


# ---------------------------------------------------------------- tools


def _check_calls(where: str, calls: Any, role: str, key_path: str) -> None:
    def build_error(problem: str, fix: str) -> InvalidRow:
        return InvalidRow("wrong tool call", f"{key_path}{problem}", where=where, fix=fix)

    if role != "assistant":
        raise build_error(f": a {role} turn has tool calls", "only assistant turns call tools")
    if not isinstance(calls, list):
        raise build_error(": `tool_calls` is not a list", "write a list of calls")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'write {"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise build_error(f".tool_calls[{i}] has no function name", fix)
        if not isinstance(function.get("arguments", {}), (str, dict)):
            problem = f".tool_calls[{i}]: the arguments are neither an object nor a string"
            raise build_error(problem, "write a JSON object")


def read_tools(row: Row) -> tuple[Json, ...]:
    """Return the tools of a row: `tools`, a list or its JSON text, or the older `functions`.

    Raises InvalidRow."""
    tools = row.data.get("tools")
    functions = row.data.get("functions")
    if tools and functions:
        problem = "the row has both `tools` and `functions`"
        raise InvalidRow("contradiction", problem, where=row.id, fix="keep `tools`")
    if isinstance(tools, str):
        tools = _parse_json_text(row.id, tools, "tools") if tools.strip() else []
        if isinstance(tools, list):
            tools = [_wrap_function(tool) for tool in tools]
    elif tools is None:
        tools = []
    key = "functions" if functions else "tools"
    tool_list: Any = functions or tools
    if not isinstance(tool_list, list) or not all(isinstance(tool, dict) for tool in tool_list):
        problem = f"`{key}` is not a list of objects"
        fix = "write a list of JSON schemas"
        raise InvalidRow("wrong tools", problem, where=row.id, fix=fix)
    if key == "functions":
        tool_list = [{"type": "function", "function": tool} for tool in tool_list]
    return tuple(tool_list)
