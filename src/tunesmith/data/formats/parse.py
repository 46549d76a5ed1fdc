"""Rows as examples: the meaning of each key.

    Row -> rename_columns -> parse_row -> Example (messages with a weight each, or text)

`detect_format` looks at the first rows and gives the reason for its choice. `parse_row` reads one
row, or raises InvalidRow with its id. A format is one function and one line in `FORMATS`, at the
bottom. A preference row has two sides: `read_side` reads either one, `parse_pair` reads both.
Single messages are read in messages.py. Left out: tokens (chat_template/renderer.py)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.core.types import Example, Json, Row
from tunesmith.data.formats.messages import read_tools, read_turns
from tunesmith.data.readers.decode import describe_type
from tunesmith.data.readers.invalid_row import InvalidRow

Turns = list[tuple[Json, float]]
Side = Literal["chosen", "rejected"]

# Keys that rows of every format may have.
NEGATIVE_KEY = "negative"
REVIEW_KEY = "review"
SERVED_KEY = "served"  # which model answered, in a row of `tunesmith serve`
CHOICES_KEY = "choices"
LABEL_KEY = "label"  # of a single answer, with loss: kto

ID_KEYS = {"id", "idx", "index", "Unnamed: 0", "__index_level_0__"}  # of the hub, of pandas

PROMPT_KEYS = ("prompt", "conversations", "messages")  # the context of a preference row
_TOOL_KEYS = {"tools", "functions"}
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")

# Column names of other tools, for a hint about `columns:`.
_PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "input", "user")
_COMPLETION_COLUMNS = ("completion", "answer", "response", "output", "target", "assistant", "label")

# Columns of tables (tables.py), in lower case. The first column of classes is the answer.
TEXT_COLUMNS = (
    "text", "sentence", "review", "comment", "tweet", "document", "headline", "title", "utterance",
    "premise", "hypothesis", "question", "answer", "passage", "sentence1", "sentence2",
    "question1", "question2", "text1", "text2", "text_a", "text_b",
)  # fmt: skip
CLASS_COLUMNS = ("label_text", "label_name", "label", "class", "category", "sentiment")
CLASS_COLUMNS += ("emotion", "intent", "topic", "rating")

_CHOSEN_ONLY_NOTE = "stage sft trains on the chosen answers only, not on the rejected ones"
_TURNS_NOTE = (
    "each prompt becomes a user turn and each completion an assistant turn, "
    "because the model has a chat template"
)
_TEXT_NOTE = "prompt and completion are concatenated, because there is no chat template"


class RowFormat(NamedTuple):
    """How the rows of one format are recognized and read."""

    keys: tuple[str, ...]  # a row of this format has all of them
    used_keys: frozenset[str]  # every key that is read
    read: Callable[[Row, bool], Example]
    note: str = ""  # shown to the user


# ---------------------------------------------------------------- detection


def detect_format(
    rows: Sequence[Row], has_template: bool, *, has_pairs: bool = False
) -> tuple[str, str]:
    """Return (format, reason): the format of most of these first rows of a file.

    With `has_pairs` both sides of preference rows are read. Raises InputError if no row has a known
    format."""
    format_counts: Counter[str] = Counter()
    for row in rows:
        format_counts.update(_match_formats(row, has_pairs=has_pairs)[:1])
    if not format_counts:
        message = _describe_unknown_keys(rows[0].data)
        raise InputError(message, where=rows[0].id, fix=_suggest_columns(rows[0].data))
    format_order = list(FORMATS)
    name = max(format_counts, key=lambda name: (format_counts[name], -format_order.index(name)))
    first = next(row for row in rows if _match_formats(row, has_pairs=has_pairs)[:1] == [name])
    reasons = [f"the rows have {_quote_keys(FORMATS[name].keys)}"]
    for other in _match_formats(first, has_pairs=has_pairs)[1:]:
        # `messages` in a preference row is its context, not a second format.
        is_context = name == "preference" and FORMATS[other].keys == (_find_prompt_key(first),)
        if not is_context:
            reasons.append(f"{_quote_keys(FORMATS[other].keys)} is there too, but not used")
            break
    if name == "completion" and isinstance(first.data["prompt"], str):
        reasons.append(_TURNS_NOTE if has_template else _TEXT_NOTE)
    if note := get_note(name, has_pairs):
        reasons.append(note)
    return name, "; ".join(reasons)


def get_note(format: str, has_pairs: bool) -> str:
    """Return what the user should know about a format, "" if nothing."""
    return "" if has_pairs and format in SIDE_READERS else FORMATS[format].note


def find_unused_keys(row: Row, format: str, *, has_labels: bool = False) -> list[str]:
    """Return the keys of a row that nothing reads; an id is none."""
    used_keys = FORMATS[format].used_keys | ID_KEYS | {NEGATIVE_KEY, REVIEW_KEY, SERVED_KEY}
    used_keys |= {CHOICES_KEY, LABEL_KEY} if has_labels else {CHOICES_KEY}
    return [key for key in row.data if key not in used_keys]


def _match_formats(row: Row, *, has_pairs: bool) -> list[str]:
    """Return the formats of a row, the likeliest first; with `has_pairs` two-sided ones first."""
    names: list[str] = []
    for name, row_format in FORMATS.items():
        if all(key in row.data for key in row_format.keys):
            names.append(name)
    return sorted(names, key=lambda name: name not in SIDE_READERS) if has_pairs else names


def _find_prompt_key(row: Row) -> str:
    """Return the key with the context of a preference row, "" if there is none."""
    return next((key for key in PROMPT_KEYS if row.data.get(key) is not None), "")


def _quote_keys(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _describe_unknown_keys(data: Json) -> str:
    expected = "; ".join(f"{name}: {_quote_keys(format.keys)}" for name, format in FORMATS.items())
    keys = _quote_keys([f"{key:.40}" for key in list(data)[:8]]) or "no keys"
    return f"the row has {keys}, which is not a known format ({expected})"


def _suggest_columns(data: Json) -> str:
    if "non_preferred_output" in data:  # OpenAI's preference rows
        sides = "preferred_output as `chosen`, non_preferred_output as `rejected`"
        return f"write input.messages as `prompt`, {sides}"
    chosen = next((key for key in data if key.startswith("chosen")), "")
    rejected = next((key for key in data if key.startswith("rejected")), "")
    if chosen and rejected:
        columns = f"chosen: {chosen}, rejected: {rejected}"
    else:
        prompt = next((key for key in _PROMPT_COLUMNS if key in data), "QUESTION")
        completion = next((key for key in _COMPLETION_COLUMNS if key in data), "ANSWER")
        columns = f"prompt: {prompt}, completion: {completion}"
    return f"map the columns: `data: {{path: ..., columns: {{{columns}}}}}`"


# ---------------------------------------------------------------- columns


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Rename the columns of a row as the recipe maps them, {our name: column of the file}.

    A column that already has one of our names is dropped if another column is mapped to it."""
    renamed = {name: row.data[column] for name, column in columns.items() if column in row.data}
    used_columns = {*columns, *columns.values()}
    for key, value in row.data.items():
        if key not in used_columns:
            renamed[key] = value
    return Row(row.id, renamed)


def check_columns(
    columns: Mapping[str, str], first_rows: Sequence[Row], format: str, where: str
) -> None:
    """Raise InputError for a name that no format reads, or a column that no first row has."""
    formats = FORMATS.values() if format == "auto" else [FORMATS[format]]
    format_keys = sorted({key for row_format in formats for key in row_format.used_keys})
    format_keys += [*TEXT_COLUMNS, *CLASS_COLUMNS] if format == "auto" else [LABEL_KEY]
    file_columns = list(dict.fromkeys(key for row in first_rows for key in row.data))
    for name, column in columns.items():
        if name not in format_keys:
            kind = "row format has" if format == "auto" else f"{format} row has"
            message = f"columns: no {kind} a `{name}`"
            raise build_unknown_name_error(message, name, format_keys, where)
        if column not in file_columns:
            message = f"columns: {name}: the file has no column `{column}`"
            raise build_unknown_name_error(message, column, file_columns, where)


def build_unknown_name_error(
    message: str, name: str, valid_names: Sequence[str], where: str
) -> InputError:
    """Return the error for an unknown name, with the closest valid name as its fix."""
    keys = ", ".join(f"`{key:.40}`" for key in valid_names[:12])
    fix = suggest_name(name, valid_names, default=f"use one of {keys}", quote="`")
    return InputError(message, where=where, fix=fix)


# ---------------------------------------------------------------- one row


def parse_row(row: Row, format: str, has_template: bool) -> Example:
    """Parse one row. Raises InvalidRow with its id and a fix."""
    row_format = FORMATS[format]
    for key in row_format.keys:
        if key not in row.data:
            message = f"the key `{key}` is missing"
            keys = _quote_keys(row_format.keys)
            fix = f"a `{format}` row needs {keys}; put rows of other formats into another file"
            raise InvalidRow("missing key", message, where=row.id, fix=fix)
    for key in _MEDIA_KEYS:
        if row.data.get(key):
            message = f"the row has `{key}`: only text is trained, and nothing is downloaded"
            fix = "remove the row, or the column if its answer needs only the text"
            raise InvalidRow("not text", message, where=row.id, fix=fix)
    example = row_format.read(row, has_template)
    negative = row.data.get(NEGATIVE_KEY)
    if not (negative is None or isinstance(negative, bool) or negative == "whole"):
        message = f"`{NEGATIVE_KEY}` is {negative!r:.40}"
        fix = 'use true (matches of constraints are bad), "whole" (all of the answer is) or false'
        raise InvalidRow("wrong mark", message, where=row.id, fix=fix)
    choices = _read_choices(row)
    if negative is None and not choices:
        return example
    return dataclasses.replace(example, negative=negative, choices=choices)


def refuse_verdict(row: Row) -> None:
    """Raise InvalidRow for a row whose review does not say that its answer is good.

    Such an answer is neither trained nor graded against, unless the row itself marks it as bad."""
    review: Any = row.data.get(REVIEW_KEY)
    verdict: Any = review.get("verdict") if isinstance(review, dict) else None
    if verdict is None or verdict == "good":
        return
    name = review.get("reviewer", "nobody")
    message = f"the verdict is {verdict!r:.40}, by {name!s:.40}"
    if verdict == "bad":
        if row.data.get(NEGATIVE_KEY) == "whole" or row.data.get(LABEL_KEY) is False:
            return
        fix = "correct the answer and set the verdict to good, or remove the row"
        raise InvalidRow("bad verdict", message, where=row.id, fix=fix)
    if verdict in ("unsure", "unsettled"):
        fix = "settle it as good, or remove the row"
        raise InvalidRow("unsettled verdict", message, where=row.id, fix=fix)
    raise InvalidRow("unknown verdict", message, where=row.id, fix="write good, bad or unsure")


def _read_choices(row: Row) -> tuple[str, ...]:
    """Return the answers to choose from, if the key is a list of strings.

    Other values are ignored: a metric that needs choices reports what is missing."""
    choices: Any = row.data.get(CHOICES_KEY)
    if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        return tuple(choices)
    return ()


def parse_pair(row: Row, format: str, has_template: bool) -> Example:
    """Parse both sides of a preference row: the chosen one, with the other as its `rejected`.

    Raises InvalidRow for equal sides and for different prompts, InputError for a format without
    pairs."""
    if format not in SIDE_READERS:
        message = f"a `{format}` row has no rejected answer"
        fix = "use rows with `chosen` and `rejected`, or remove `stage: preference`"
        raise InputError(message, where=row.id, fix=fix)
    chosen = parse_row(row, format, has_template)
    rejected = SIDE_READERS[format](row, has_template, side="rejected")
    if _normalize_answer(chosen) == _normalize_answer(rejected):
        message = "the chosen and the rejected answer are equal"
        fix = "correct one of them, or remove the row"
        raise InvalidRow("equal sides", message, where=row.id, fix=fix)
    _check_prompts(row, chosen.messages, rejected.messages)
    return dataclasses.replace(chosen, rejected=rejected)


def _check_prompts(row: Row, chosen: Sequence[Json], rejected: Sequence[Json]) -> None:
    """Raise InvalidRow unless the first messages in which two conversations differ are answers."""
    problem = "one side of the pair continues the other" if chosen else ""
    for i, messages in enumerate(zip(chosen, rejected, strict=False), start=1):
        if messages[0] != messages[1]:
            roles = [message["role"] for message in messages]
            is_prompt = roles != ["assistant", "assistant"]
            problem = f"the two sides differ before an answer, in message {i}" if is_prompt else ""
            break
    if problem:
        fix = "write two answers to the same prompt, or remove the row"
        raise InvalidRow("different prompts", problem, where=row.id, fix=fix)


def parse_labelled(row: Row, format: str, has_template: bool) -> Example:
    """Parse a row with a `label`: true if its answer is desirable, else false. A preference row is
    a desirable and an undesirable answer.

    Raises InvalidRow for a row without a label."""
    if format in SIDE_READERS:
        return dataclasses.replace(parse_pair(row, format, has_template), label=True)
    example = parse_row(row, format, has_template)
    label = row.data.get(LABEL_KEY)
    if label not in (True, False):  # also 1 and 0
        problem = (
            f"`{LABEL_KEY}` is {label!r:.40}" if LABEL_KEY in row.data else "there is no label"
        )
        fix = "set `label` to true for a desirable answer and to false for an undesirable one"
        if isinstance(label, str):
            fix += "; not as text, so not in CSV: use JSONL or Parquet"
        raise InvalidRow("no label", problem, where=row.id, fix=fix)
    return dataclasses.replace(example, label=bool(label))


def _normalize_answer(example: Example) -> object:
    """Return the content of an example without white space around its last answer."""
    if example.text is not None:
        return example.prompt, example.text.strip()
    *history, last = example.messages
    return history, {**last, "content": last["content"].strip()}


# ---------------------------------------------------------------- formats


def read_messages(row: Row, has_template: bool) -> Example:
    """Read OpenAI chat: `messages`, with optional `tools` or the older `functions`.

    A message may have `train` or `weight`."""
    _require_template(row, has_template)
    return _build_conversation(row, read_turns(row.id, row.data["messages"], "messages"))


def read_sharegpt(row: Row, has_template: bool) -> Example:
    """Read ShareGPT: `conversations` of `from` and `value`, with optional `system` and `tools`."""
    _require_template(row, has_template)
    turns = read_turns(row.id, row.data["conversations"], "conversations")
    system = _read_optional_text(row, "system")
    if not system:
        return _build_conversation(row, turns)
    first_turn = turns[0][0]
    if first_turn["role"] != "system":
        turns = [_build_context_turn("system", system), *turns]
    elif first_turn["content"] != system:
        message = "`system` and the first turn are two different system prompts"
        raise InvalidRow("contradiction", message, where=row.id, fix="keep one of them")
    return _build_conversation(row, turns)


def read_alpaca(row: Row, has_template: bool) -> Example:
    """Read Alpaca: `instruction`, then `input` below it, is the question; `output` is the answer.

    `history` is a list of earlier [question, answer] pairs."""
    _require_template(row, has_template)
    history = row.data.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        message = "`history` is not a list of pairs"
        fix = "write [[question, answer], ...]"
        raise InvalidRow("not messages", message, where=row.id, fix=fix)
    system = _read_optional_text(row, "system")
    question = _require_text(row, "instruction")
    if input_text := _read_optional_text(row, "input"):
        question += f"\n{input_text}"
    messages: list[Json] = []
    for user_content, answer in [*pairs, (question, _require_text(row, "output"))]:
        messages.append({"role": "user", "content": user_content})
        messages.append({"role": "assistant", "content": answer})
    turns = read_turns(row.id, messages, "turns")
    if system:
        turns = [_build_context_turn("system", system), *turns]
    return _build_conversation(row, turns)


def read_completion(row: Row, has_template: bool) -> Example:
    """Read `prompt` and `completion`: strings or lists of messages; the completion is trained."""
    return _build_completion(row, "prompt", "completion", has_template)


def read_side(row: Row, has_template: bool, *, side: Side = "chosen") -> Example:
    """Read one side of a preference row; its answer is trained.

    The answer follows `prompt`, `conversations` or `messages`. If both sides are full
    conversations, the answer is what follows the turns that they share."""
    answer = row.data[side]
    other_answer = row.data["rejected" if side == "chosen" else "chosen"]
    if not _is_conversation(answer):
        prompt_key = _find_prompt_key(row)
        if not prompt_key:
            message = f"`{side}` has no prompt"
            fix = "add a `prompt` (or map a column to it), or write both sides as conversations"
            raise InvalidRow("missing key", message, where=row.id, fix=fix)
        return _build_completion(row, prompt_key, side, has_template)
    _require_template(row, has_template)
    num_shared = 0
    if _is_conversation(other_answer):
        for turn, other_turn in zip(answer[:-1], other_answer, strict=False):
            if turn != other_turn:
                break
            num_shared += 1
    prompt_turns: Turns = []
    if num_shared:
        prompt_turns = read_turns(row.id, answer[:num_shared], side, is_trained=False)
    return _build_conversation(row, prompt_turns + read_turns(row.id, answer[num_shared:], side))


def read_text(row: Row, has_template: bool) -> Example:  # noqa: ARG001 - shared signature
    """Read `text`: trained as it is, without a chat template."""
    text = _require_text(row, "text")
    if not text.strip():
        raise InvalidRow("empty text", "the text is empty", where=row.id, fix="remove the row")
    return Example(row.id, text=text)


# ---------------------------------------------------------------- shared by the formats


def _build_completion(
    row: Row, prompt_key: str, completion_key: str, has_template: bool
) -> Example:
    """Build an example from a prompt, not trained, and its answer: strings or message lists."""
    prompt = row.data[prompt_key]
    answer = row.data[completion_key]
    is_text = isinstance(prompt, str) and isinstance(answer, str)
    if is_text and not answer.strip():
        message = f"the {completion_key} is empty"
        fix = "write the answer, or remove the row"
        raise InvalidRow("empty answer", message, where=row.id, fix=fix)
    if is_text and not has_template:
        return Example(row.id, text=answer, prompt=prompt)
    _require_template(row, has_template)
    prompt_messages = _to_messages(row.id, prompt, "user", prompt_key)
    prompt_turns = read_turns(row.id, prompt_messages, prompt_key, is_trained=False)
    answer_messages = _to_messages(row.id, answer, "assistant", completion_key)
    answer_turns = read_turns(row.id, answer_messages, completion_key)
    return _build_conversation(row, prompt_turns + answer_turns)


def _build_conversation(row: Row, turns: Turns) -> Example:
    """Build an example from turns, after the checks that concern all of them together."""
    last_role = turns[-1][0]["role"]
    if last_role != "assistant":
        message = f"the last turn is `{last_role}`, so there is no answer to train on"
        fix = "add the assistant's answer, or remove that turn"
        raise InvalidRow("no answer at the end", message, where=row.id, fix=fix)
    if not any(weight for _, weight in turns):
        message = "no turn is trained: all have `train: false` or weight 0"
        fix = "train at least one assistant turn, or remove the row"
        raise InvalidRow("nothing trained", message, where=row.id, fix=fix)
    messages, weights = zip(*turns, strict=True)
    return Example(row.id, messages, weights, read_tools(row))


def _is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of messages with a user turn."""
    for turn in value if isinstance(value, list) else []:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
            return True
    return False


def _to_messages(where: str, value: Any, role: str, key: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    message = f"`{key}` is {describe_type(value)}, neither a string nor a list of messages"
    fix = "write both as strings, or both as lists of messages"
    raise InvalidRow("not messages", message, where=where, fix=fix)


def _build_context_turn(role: str, content: str) -> tuple[Json, float]:
    """Return a turn that is not trained."""
    return {"role": role, "content": content}, 0.0


def _require_text(row: Row, key: str) -> str:
    text = row.data[key]
    if not isinstance(text, str):
        message = f"`{key}` is {describe_type(text)}, not a string"
        raise InvalidRow("not text", message, where=row.id, fix="write a string")
    return text


def _read_optional_text(row: Row, key: str) -> str:
    return "" if row.data.get(key) is None else _require_text(row, key)


def _require_template(row: Row, has_template: bool) -> None:
    # An InputError, not an InvalidRow: the model lacks something, not the row.
    if not has_template:
        message = "messages need a chat template, but this model has none"
        fix = "set `chat_template:`, or use `text` rows, or `prompt` and `completion` strings"
        raise InputError(message, where=row.id, fix=fix)


# The first format that has all its keys in a row wins.
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
    "sharegpt": RowFormat(
        ("conversations",), frozenset({"conversations", "system", *_TOOL_KEYS}), read_sharegpt
    ),
    "alpaca": RowFormat(
        ("instruction", "output"),
        frozenset({"instruction", "input", "output", "system", "history", *_TOOL_KEYS}),
        read_alpaca,
        "`input` follows the instruction in the same user turn",
    ),
    "text": RowFormat(("text",), frozenset({"text"}), read_text),
}

# The formats with two sides.
SIDE_READERS: dict[str, Callable[..., Example]] = {"preference": read_side}
