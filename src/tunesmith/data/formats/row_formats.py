"""Rows as examples: which keys of a row mean what.

    Row -> Example (messages with a weight each, or text)

`detect` looks at the first rows and says why it chose a format; `parse` reads one row or says what
is wrong with it, naming the row. A format is one function, and one line in `FORMATS`. A preference
row has two sides: `read_side` reads either, `parse_pair` both. How messages become tokens is
decided in `render.py`; single messages are read in `messages.py`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example, Json, Row
from tunesmith.data.formats.messages import read_tools, read_turns
from tunesmith.data.readers.invalid_row import InvalidRow

Turns = list[tuple[Json, float]]
Side = Literal["chosen", "rejected"]

NEGATIVE_KEY, REVIEW_KEY, CHOICES_KEY = "negative", "review", "choices"  # keys of any row


class RowFormat(NamedTuple):
    keys: tuple[str, ...]  # a row of this format has all of them
    used_keys: frozenset[str]  # every key of the row that is read
    read: Callable[[Row, bool], Example]
    note: str = ""  # what the user should know of it


def detect_format(
    rows: Sequence[Row], has_template: bool, *, has_pairs: bool = False
) -> tuple[str, str]:
    """(format, reason): the format that most of these first rows of a file have; with `pairs` both
    sides of preference rows are read. Raises InputError if none has one."""
    format_counts = Counter(
        names[0] for row in rows if (names := _match_formats(row, has_pairs=has_pairs))
    )
    if not format_counts:
        raise InputError(
            _describe_unknown_keys(rows[0].data),
            where=rows[0].id,
            fix=_suggest_columns(rows[0].data),
        )
    name, _ = max(format_counts.items(), key=lambda item: (item[1], -list(FORMATS).index(item[0])))
    first = next(row for row in rows if _match_formats(row, has_pairs=has_pairs)[:1] == [name])
    reason = f"the rows have {_quote_keys(FORMATS[name].keys)}"
    others = [
        other
        for other in _match_formats(first, has_pairs=has_pairs)[1:]
        if not _is_prompt_format(name, other, first)
    ]
    if others:
        reason += f"; {_quote_keys(FORMATS[others[0]].keys)} is there too and not used"
    if name == "completion" and isinstance(first.data["prompt"], str):
        reason += "; " + (_TURNS_NOTE if has_template else _TEXT_NOTE)
    return name, "; ".join(filter(None, (reason, get_note(name, has_pairs))))


def get_note(format: str, has_pairs: bool) -> str:
    """What the user should know of a format; with `pairs` nothing of a row is left out."""
    return "" if has_pairs and format in SIDE_READERS else FORMATS[format].note


def parse_row(row: Row, format: str, has_template: bool) -> Example:
    """Read one row. Raises BadRow that names the row and what to do about it."""
    row_format = FORMATS[format]
    for key in row_format.keys:
        if key not in row.data:
            fix = f"a `{format}` row has {_quote_keys(row_format.keys)}; rows of another format go into a file of their own"
            raise InvalidRow("missing key", f"the key `{key}` is missing", where=row.id, fix=fix)
    for key in ("images", "videos", "audios"):
        if row.data.get(key):
            message = f"the row has `{key}`: only text is trained, and nothing is fetched"
            raise InvalidRow("not text", message, where=row.id, fix="drop the row")
    example, negative, choices = (
        row_format.read(row, has_template),
        _read_negative(row),
        _read_choices(row),
    )
    if negative is None and not choices:
        return example
    return dataclasses.replace(example, negative=negative, choices=choices)


def _read_choices(row: Row) -> tuple[str, ...]:
    """Answers to choose from, where the key is a list of texts; a metric that needs them says
    so."""
    choices: Any = row.data.get(CHOICES_KEY)
    return (
        tuple(choices)
        if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        else ()
    )


def _read_negative(row: Row) -> bool | Literal["whole"] | None:
    negative = row.data.get(NEGATIVE_KEY)
    if negative is None or isinstance(negative, bool) or negative == "whole":
        return negative
    fix = 'write true (what breaks a constraint is bad), "whole" (all of it is) or false'
    raise InvalidRow("wrong mark", f"`{NEGATIVE_KEY}` is {negative!r:.40}", where=row.id, fix=fix)


def parse_pair(row: Row, format: str, has_template: bool) -> Example:
    """Both sides of a preference row: the chosen one, with the other as its `rejected`. Raises
    BadRow for equal sides, InputError for a format that has none."""
    if format not in SIDE_READERS:
        fix = "write rows with `chosen` and `rejected`, or leave `stage: preference` out"
        raise InputError(
            f"a `{format}` row has no rejected answer to prefer another to", where=row.id, fix=fix
        )
    chosen = parse_row(row, format, has_template)
    rejected = SIDE_READERS[format](row, has_template, side="rejected")
    if _normalize_answer(chosen) == _normalize_answer(rejected):
        message = "the chosen and the rejected answer are equal: nothing is preferred"
        raise InvalidRow(
            "equal sides", message, where=row.id, fix="correct one of them, or drop the row"
        )
    return dataclasses.replace(chosen, rejected=rejected)


def _normalize_answer(example: Example) -> object:
    """What an example says, white space around its last answer aside."""
    if example.text is not None:
        return example.prompt, example.text.strip()
    *history, last = example.messages
    return history, {**last, "content": last["content"].strip()}


def find_unused_keys(row: Row, format: str) -> list[str]:
    """The keys of a row that nothing reads."""
    return [
        key
        for key in row.data
        if key not in FORMATS[format].used_keys | {NEGATIVE_KEY, REVIEW_KEY, CHOICES_KEY}
    ]


_TURNS_NOTE = "each prompt becomes a user turn and each completion an assistant turn, since the model has a chat template"
_TEXT_NOTE = "prompt and completion are joined as they are, since there is no chat template"


def _match_formats(row: Row, *, has_pairs: bool) -> list[str]:
    """Formats of a row, the likeliest first: where `pairs` are wanted one with two sides."""
    names = [
        name for name, format in FORMATS.items() if all(key in row.data for key in format.keys)
    ]
    return sorted(names, key=lambda name: name not in SIDE_READERS) if has_pairs else names


def _is_prompt_format(name: str, other: str, row: Row) -> bool:
    """The keys of another format hold what the sides of a preference row answer."""
    return name == "preference" and FORMATS[other].keys == (_find_prompt_key(row),)


def _find_prompt_key(row: Row) -> str:
    """Which key holds what the sides of a preference row answer; none if nothing does."""
    return next((key for key in PROMPT_KEYS if row.data.get(key) is not None), "")


def _quote_keys(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _describe_unknown_keys(data: Json) -> str:
    expected = "; ".join(f"{name}: {_quote_keys(format.keys)}" for name, format in FORMATS.items())
    keys = _quote_keys([f"{key:.40}" for key in list(data)[:8]]) or "no keys"
    return f"the row has {keys}, and no known format ({expected})"


def _suggest_columns(data: Json) -> str:
    sides = {
        side: next((key for key in data if key.startswith(side)), "")
        for side in ("chosen", "rejected")
    }
    if all(sides.values()):
        pairs = ", ".join(f"{side}: {key}" for side, key in sides.items())
        return f"say which key is what: `data: {{path: ..., columns: {{{pairs}}}}}`"
    prompt_column = next((key for key in _PROMPT_COLUMNS if key in data), "QUESTION")
    completion_column = next((key for key in _COMPLETION_COLUMNS if key in data), "ANSWER")
    return f"say which key is what: `data: {{path: ..., columns: {{prompt: {prompt_column}, completion: {completion_column}}}}}`"


_PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "input", "user")
_COMPLETION_COLUMNS = ("completion", "answer", "response", "output", "target", "assistant", "label")


# ---------------------------------------------------------------- the formats


def read_messages(row: Row, has_template: bool) -> Example:
    """OpenAI chat: `messages`, perhaps `tools` or the older `functions`; a message may have `train`
    or `weight`."""
    _require_template(row, has_template)
    return _build_conversation(row, read_turns(row.id, row.data["messages"], "messages"))


def read_sharegpt(row: Row, has_template: bool) -> Example:
    """ShareGPT: `conversations` of `from` and `value`, perhaps with `system` and `tools` beside
    it."""
    _require_template(row, has_template)
    turns = read_turns(row.id, row.data["conversations"], "conversations")
    system = _read_optional_text(row, "system")
    if system and turns[0][0]["role"] == "system" and turns[0][0]["content"] != system:
        message = "`system` and the first turn are two different system prompts"
        raise InvalidRow("contradiction", message, where=row.id, fix="keep one of them")
    if system and turns[0][0]["role"] != "system":
        turns = [_build_context_turn("system", system), *turns]
    return _build_conversation(row, turns)


def read_alpaca(row: Row, has_template: bool) -> Example:
    """Alpaca: `instruction` with `input` below it is the question, `output` the answer; `history`
    came before."""
    _require_template(row, has_template)
    system, input_text = _read_optional_text(row, "system"), _read_optional_text(row, "input")
    history = row.data.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        fix = "write [[question, answer], ...]"
        raise InvalidRow("not messages", "`history` is not a list of pairs", where=row.id, fix=fix)
    question = _require_text(row, "instruction") + (f"\n{input_text}" if input_text else "")
    contents = [part for pair in pairs for part in pair] + [question, _require_text(row, "output")]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(contents)
    ]
    turns = read_turns(row.id, messages, "turns")
    return _build_conversation(
        row, [_build_context_turn("system", system), *turns] if system else turns
    )


def read_completion(row: Row, has_template: bool) -> Example:
    """`prompt` and `completion`: two strings, or lists of messages; only the completion is
    trained."""
    return _build_completion(row, "prompt", "completion", has_template)


def read_side(row: Row, has_template: bool, *, side: Side = "chosen") -> Example:
    """One side of a preference row, its answer trained: what answers the `prompt`, or the
    `conversations` or `messages` that stand there instead; of two whole conversations, what follows
    the turns that they share."""
    answer, other_answer = (
        row.data[key] for key in (side, "rejected" if side == "chosen" else "chosen")
    )
    if not _is_conversation(answer):
        prompt_key = _find_prompt_key(row)
        if not prompt_key:
            fix = (
                "add a `prompt` (or map a column to it), or write both sides as whole conversations"
            )
            raise InvalidRow(
                "missing key", f"nothing says what `{side}` answers", where=row.id, fix=fix
            )
        return _build_completion(row, prompt_key, side, has_template)
    _require_template(row, has_template)
    num_shared = 0
    while (
        num_shared < len(answer) - 1
        and _is_conversation(other_answer)
        and answer[: num_shared + 1] == other_answer[: num_shared + 1]
    ):
        num_shared += 1
    prompt_turns = (
        read_turns(row.id, answer[:num_shared], side, is_trained=False) if num_shared else []
    )
    return _build_conversation(row, prompt_turns + read_turns(row.id, answer[num_shared:], side))


def read_openai_preference(row: Row, has_template: bool, *, side: Side = "chosen") -> Example:
    """OpenAI preference file: `input` with its messages, `preferred_output` and
    `non_preferred_output`."""
    prompt = row.data["input"]
    if not isinstance(prompt, dict):
        raise InvalidRow(
            "not messages",
            "`input` is not an object",
            where=row.id,
            fix='write {"messages": [...]}',
        )
    data = {
        "prompt": prompt.get("messages"),
        "chosen": row.data["preferred_output"],
        "tools": prompt.get("tools"),
    }
    return read_side(
        Row(row.id, {**data, "rejected": row.data["non_preferred_output"]}), has_template, side=side
    )


def read_text(row: Row, has_template: bool) -> Example:  # noqa: ARG001 - every format has this signature
    """`text`: trained as it is, without a template."""
    text = _require_text(row, "text")
    if not text.strip():
        raise InvalidRow("empty text", "the text is empty", where=row.id, fix="drop the row")
    return Example(row.id, text=text)


# ---------------------------------------------------------------- what they share


def _build_completion(
    row: Row, prompt_key: str, completion_key: str, has_template: bool
) -> Example:
    """A prompt, not trained, and its answer, which is: two strings, or lists of messages."""
    prompt, answer = row.data[prompt_key], row.data[completion_key]
    is_text = isinstance(prompt, str) and isinstance(answer, str)
    if is_text and not answer.strip():
        raise InvalidRow(
            "empty answer",
            f"the {completion_key} is empty",
            where=row.id,
            fix="write the answer, or drop the row",
        )
    if is_text and not has_template:
        return Example(row.id, text=answer, prompt=prompt)
    _require_template(row, has_template)
    prompt_turns = read_turns(
        row.id, _to_turns(row.id, prompt, "user", prompt_key), prompt_key, is_trained=False
    )
    answer_turns = read_turns(
        row.id, _to_turns(row.id, answer, "assistant", completion_key), completion_key
    )
    return _build_conversation(row, prompt_turns + answer_turns)


def _build_conversation(row: Row, turns: Turns) -> Example:
    """The rules that hold for a whole conversation."""
    last_role = turns[-1][0]["role"]
    if last_role != "assistant":
        message = f"the last turn is `{last_role}`: after it there is nothing to train"
        fix = "add the assistant's answer, or drop that turn"
        raise InvalidRow("no answer at the end", message, where=row.id, fix=fix)
    if not any(weight for _, weight in turns):
        message = "no turn is trained: all are `train: false` or have weight 0"
        fix = "train at least one assistant turn, or drop the row"
        raise InvalidRow("nothing trained", message, where=row.id, fix=fix)
    messages, weights = zip(*turns, strict=True)
    return Example(row.id, messages, weights, read_tools(row))


def _is_conversation(value: Any) -> bool:
    """Whether a list of messages holds what the user said, too."""
    turns = value if isinstance(value, list) else []
    return any(
        isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human")
        for turn in turns
    )


def _to_turns(where: str, value: Any, role: str, key: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    fix = "write both as strings, or both as lists of messages"
    message = f"`{key}` is {_describe_type(value)}, neither a string nor a list of messages"
    raise InvalidRow("not messages", message, where=where, fix=fix)


def _build_context_turn(role: str, content: str) -> tuple[Json, float]:
    """A turn that is not trained."""
    return {"role": role, "content": content}, 0.0


def _require_text(row: Row, key: str) -> str:
    text = row.data[key]
    if not isinstance(text, str):
        raise InvalidRow(
            "not text",
            f"`{key}` is {_describe_type(text)}, not a string",
            where=row.id,
            fix="write a string",
        )
    return text


def _read_optional_text(row: Row, key: str) -> str:
    return "" if row.data.get(key) is None else _require_text(row, key)


def _require_template(row: Row, has_template: bool) -> None:
    """A matter of the model, not of the row."""
    if not has_template:
        fix = "name one with `template:`, or write the rows as `text`, or as `prompt` and `completion` strings"
        raise InputError(
            "messages need a chat template, and this model has none", where=row.id, fix=fix
        )


def _describe_type(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


PROMPT_KEYS = ("prompt", "conversations", "messages")  # what the sides of a preference row answer
_TOOL_KEYS = {"tools", "functions"}
_CHOSEN_ONLY_NOTE = "stage sft trains on the chosen answers, the rejected ones are not trained"

# The first format whose keys a row has wins.
FORMATS = {
    "messages": RowFormat(("messages",), frozenset({"messages", *_TOOL_KEYS}), read_messages),
    "completion": RowFormat(
        ("prompt", "completion"), frozenset({"prompt", "completion", *_TOOL_KEYS}), read_completion
    ),
    "preference": RowFormat(
        ("chosen", "rejected"),
        frozenset({*PROMPT_KEYS, "chosen", "rejected", *_TOOL_KEYS}),
        read_side,
        _CHOSEN_ONLY_NOTE,
    ),
    "openai_preference": RowFormat(
        ("input", "preferred_output", "non_preferred_output"),
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        read_openai_preference,
        _CHOSEN_ONLY_NOTE,
    ),
    "sharegpt": RowFormat(
        ("conversations",), frozenset({"conversations", "system", *_TOOL_KEYS}), read_sharegpt
    ),
    "alpaca": RowFormat(
        ("instruction", "output"),
        frozenset({"instruction", "input", "output", "system", "history", *_TOOL_KEYS}),
        read_alpaca,
        "`input` stands below the instruction in one user turn",
    ),
    "text": RowFormat(("text",), frozenset({"text"}), read_text),
}

# What reads either side of a preference row.
SIDE_READERS: dict[str, Callable[..., Example]] = {
    "preference": read_side,
    "openai_preference": read_openai_preference,
}
