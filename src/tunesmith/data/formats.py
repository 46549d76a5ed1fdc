"""Rows as examples: which keys of a row mean what.

    Row -> Example (messages with a weight each, or text)

`detect` looks at the first rows and says why it chose a format; `parse` reads one row or says what is wrong with it,
naming the row. Three formats: OpenAI `messages`, `completion` (prompt and completion, strings or messages), `text`.
How messages become tokens is decided in `render.py`; single messages are read in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tunesmith.data.messages import read_tools, read_turns
from tunesmith.errors import InputError
from tunesmith.types import Example, Json, Row


class Format(NamedTuple):
    keys: tuple[str, ...]  # a row of this format has all of them
    used: frozenset[str]  # every key of the row that is read
    read: Callable[[Row, bool], Example]


def detect(rows: Sequence[Row], has_template: bool) -> tuple[str, str]:
    """(format, reason) from the first rows of a file. Raises InputError if none fits, or if the rows disagree."""
    first = rows[0]
    fitting = [_fitting(row) for row in rows]
    for row, names in zip(rows, fitting, strict=True):
        if not names:
            raise InputError(_unknown_keys(row.data), where=row.id, fix=_hint(row.data))
    name = fitting[0][0]
    for row, names in zip(rows, fitting, strict=True):
        if name not in names:
            what = f"this row looks like `{names[0]}`, but row {first.id} like `{name}`"
            raise InputError(what, where=row.id, fix="put the formats into separate files, or name one with `format:`")
    reason = f"the rows have {_quoted(FORMATS[name].keys)}"
    if len(fitting[0]) > 1:
        reason += f"; {_quoted(FORMATS[fitting[0][1]].keys)} is there too and not used"
    if name == "completion" and isinstance(first.data["prompt"], str):
        reason += "; " + (_AS_TURNS if has_template else _AS_TEXT)
    return name, reason


def parse(row: Row, format: str, has_template: bool) -> Example:
    """Read one row. Raises InputError that names the row and what to do about it."""
    chosen = FORMATS[format]
    for key in chosen.keys:
        if key not in row.data:
            raise InputError(f"the key `{key}` is missing", where=row.id, fix=f"a `{format}` row has {chosen.keys}")
    return chosen.read(row, has_template)


def unused_keys(row: Row, format: str) -> list[str]:
    """The keys of a row that nothing reads."""
    return [key for key in row.data if key not in FORMATS[format].used]


_AS_TURNS = "each prompt becomes a user turn and each completion an assistant turn, since the model has a chat template"
_AS_TEXT = "prompt and completion are joined as they are, since there is no chat template"


def _fitting(row: Row) -> list[str]:
    return [name for name, format in FORMATS.items() if all(key in row.data for key in format.keys)]


def _quoted(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _unknown_keys(data: Json) -> str:
    wanted = "; ".join(f"{name}: {_quoted(format.keys)}" for name, format in FORMATS.items())
    return f"the row has {_quoted(list(data)[:8]) or 'no keys'}, and no known format ({wanted})"


def _hint(data: Json) -> str:
    if "conversations" in data:
        return "rename `conversations` to `messages`, `from` to `role`, `value` to `content`"
    if "instruction" in data:
        return "write `instruction` (with `input`) as `prompt`, and `output` as `completion`"
    return "rename the keys"


# ---------------------------------------------------------------- the formats


def read_messages(row: Row, has_template: bool) -> Example:
    """OpenAI chat: `messages`, perhaps `tools` or the older `functions`; a message may have `train` or `weight`."""
    _need_template(row, has_template)
    return _conversation(row, read_turns(row.id, row.data["messages"], "messages"))


def read_completion(row: Row, has_template: bool) -> Example:
    """`prompt` and `completion`: two strings, or lists of messages; only the completion is trained."""
    prompt, completion = row.data["prompt"], row.data["completion"]
    strings = isinstance(prompt, str) and isinstance(completion, str)
    if strings and not completion.strip():
        raise InputError("the completion is empty", where=row.id, fix="write the answer, or drop the row")
    if strings and not has_template:
        return Example(row.id, text=completion, prompt=prompt)
    _need_template(row, has_template)
    before = read_turns(row.id, _as_turns(row.id, prompt, "user", "prompt"), "prompt", trained=False)
    after = read_turns(row.id, _as_turns(row.id, completion, "assistant", "completion"), "completion")
    return _conversation(row, before + after)


def read_text(row: Row, has_template: bool) -> Example:  # noqa: ARG001 - every format has this signature
    """`text`: trained as it is, without a template."""
    text = row.data["text"]
    if not isinstance(text, str):
        raise InputError(f"`text` is {_kind(text)}, not a string", where=row.id, fix="write a string")
    if not text.strip():
        raise InputError("the text is empty", where=row.id, fix="drop the row")
    return Example(row.id, text=text)


def _conversation(row: Row, turns: list[tuple[Json, float]]) -> Example:
    """The rules that hold for a whole conversation."""
    last = turns[-1][0]["role"]
    if last != "assistant":
        what = f"the last turn is `{last}`: after it there is nothing to train"
        raise InputError(what, where=row.id, fix="add the assistant's answer, or drop that turn")
    if not any(weight for _, weight in turns):
        what = "no turn is trained: all are `train: false` or have weight 0"
        raise InputError(what, where=row.id, fix="train at least one assistant turn, or drop the row")
    messages, weights = zip(*turns, strict=True)
    return Example(row.id, messages, weights, read_tools(row))


def _as_turns(where: str, value: Any, role: str, key: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    fix = "write both as strings, or both as lists of messages"
    raise InputError(f"`{key}` is {_kind(value)}, neither a string nor a list of messages", where=where, fix=fix)


def _need_template(row: Row, has_template: bool) -> None:
    if not has_template:
        fix = "name one with `template:`, or write the rows as `text`, or as `prompt` and `completion` strings"
        raise InputError("messages need a chat template, and this model has none", where=row.id, fix=fix)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


# The first format whose keys a row has wins.
FORMATS = {
    "messages": Format(("messages",), frozenset({"messages", "tools", "functions"}), read_messages),
    "completion": Format(
        ("prompt", "completion"), frozenset({"prompt", "completion", "tools", "functions"}), read_completion
    ),
    "text": Format(("text",), frozenset({"text"}), read_text),
}
