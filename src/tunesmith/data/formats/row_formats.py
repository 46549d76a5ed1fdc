"""Rows as examples: which keys of a row mean what.

    Row -> Example (messages with a weight each, or text)

`detect` looks at the first rows and says why it chose a format; `parse` reads one row or says what is wrong with it,
naming the row. A format is one function, and one line in `FORMATS`. A preference row has two sides: `read_side` reads
either, `parse_pair` both. How messages become tokens is decided in `render.py`; single messages are read in
`messages.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example, Json, Row
from tunesmith.data.formats.messages import read_tools, read_turns
from tunesmith.data.readers.invalid_row import BadRow

Turns = list[tuple[Json, float]]
Side = Literal["chosen", "rejected"]

NEGATIVE, REVIEW, CHOICES = "negative", "review", "choices"  # keys of any row


class Format(NamedTuple):
    keys: tuple[str, ...]  # a row of this format has all of them
    used: frozenset[str]  # every key of the row that is read
    read: Callable[[Row, bool], Example]
    note: str = ""  # what the user should know of it


def detect(rows: Sequence[Row], has_template: bool, *, pairs: bool = False) -> tuple[str, str]:
    """(format, reason): the format that most of these first rows of a file have; with `pairs` both sides of preference
    rows are read. Raises InputError if none has one."""
    fitting = Counter(names[0] for row in rows if (names := _fitting(row, pairs=pairs)))
    if not fitting:
        raise InputError(_unknown_keys(rows[0].data), where=rows[0].id, fix=_hint(rows[0].data))
    name, _ = max(fitting.items(), key=lambda item: (item[1], -list(FORMATS).index(item[0])))
    first = next(row for row in rows if _fitting(row, pairs=pairs)[:1] == [name])
    reason = f"the rows have {_quoted(FORMATS[name].keys)}"
    others = [other for other in _fitting(first, pairs=pairs)[1:] if not _asks(name, other, first)]
    if others:
        reason += f"; {_quoted(FORMATS[others[0]].keys)} is there too and not used"
    if name == "completion" and isinstance(first.data["prompt"], str):
        reason += "; " + (_AS_TURNS if has_template else _AS_TEXT)
    return name, "; ".join(filter(None, (reason, note_on(name, pairs))))


def note_on(format: str, pairs: bool) -> str:
    """What the user should know of a format; with `pairs` nothing of a row is left out."""
    return "" if pairs and format in SIDES else FORMATS[format].note


def parse(row: Row, format: str, has_template: bool) -> Example:
    """Read one row. Raises BadRow that names the row and what to do about it."""
    chosen = FORMATS[format]
    for key in chosen.keys:
        if key not in row.data:
            fix = f"a `{format}` row has {_quoted(chosen.keys)}; rows of another format go into a file of their own"
            raise BadRow("missing key", f"the key `{key}` is missing", where=row.id, fix=fix)
    for key in ("images", "videos", "audios"):
        if row.data.get(key):
            what = f"the row has `{key}`: only text is trained, and nothing is fetched"
            raise BadRow("not text", what, where=row.id, fix="drop the row")
    example, negative, choices = chosen.read(row, has_template), _negative(row), _choices(row)
    if negative is None and not choices:
        return example
    return dataclasses.replace(example, negative=negative, choices=choices)


def _choices(row: Row) -> tuple[str, ...]:
    """Answers to choose from, where the key is a list of texts; a metric that needs them says so."""
    choices: Any = row.data.get(CHOICES)
    return tuple(choices) if isinstance(choices, list) and all(isinstance(one, str) for one in choices) else ()


def _negative(row: Row) -> bool | Literal["whole"] | None:
    negative = row.data.get(NEGATIVE)
    if negative is None or isinstance(negative, bool) or negative == "whole":
        return negative
    fix = 'write true (what breaks a constraint is bad), "whole" (all of it is) or false'
    raise BadRow("wrong mark", f"`{NEGATIVE}` is {negative!r:.40}", where=row.id, fix=fix)


def parse_pair(row: Row, format: str, has_template: bool) -> Example:
    """Both sides of a preference row: the chosen one, with the other as its `rejected`. Raises BadRow for equal sides,
    InputError for a format that has none."""
    if format not in SIDES:
        fix = "write rows with `chosen` and `rejected`, or leave `stage: preference` out"
        raise InputError(f"a `{format}` row has no rejected answer to prefer another to", where=row.id, fix=fix)
    chosen = parse(row, format, has_template)
    rejected = SIDES[format](row, has_template, side="rejected")
    if _said(chosen) == _said(rejected):
        what = "the chosen and the rejected answer are equal: nothing is preferred"
        raise BadRow("equal sides", what, where=row.id, fix="correct one of them, or drop the row")
    return dataclasses.replace(chosen, rejected=rejected)


def _said(example: Example) -> object:
    """What an example says, white space around its last answer aside."""
    if example.text is not None:
        return example.prompt, example.text.strip()
    *before, last = example.messages
    return before, {**last, "content": last["content"].strip()}


def unused_keys(row: Row, format: str) -> list[str]:
    """The keys of a row that nothing reads."""
    return [key for key in row.data if key not in FORMATS[format].used | {NEGATIVE, REVIEW, CHOICES}]


_AS_TURNS = "each prompt becomes a user turn and each completion an assistant turn, since the model has a chat template"
_AS_TEXT = "prompt and completion are joined as they are, since there is no chat template"


def _fitting(row: Row, *, pairs: bool) -> list[str]:
    """Formats of a row, the likeliest first: where `pairs` are wanted one with two sides."""
    fitting = [name for name, format in FORMATS.items() if all(key in row.data for key in format.keys)]
    return sorted(fitting, key=lambda name: name not in SIDES) if pairs else fitting


def _asks(name: str, other: str, row: Row) -> bool:
    """The keys of another format hold what the sides of a preference row answer."""
    return name == "preference" and FORMATS[other].keys == (_asked_in(row),)


def _asked_in(row: Row) -> str:
    """Which key holds what the sides of a preference row answer; none if nothing does."""
    return next((key for key in ASKED if row.data.get(key) is not None), "")


def _quoted(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _unknown_keys(data: Json) -> str:
    wanted = "; ".join(f"{name}: {_quoted(format.keys)}" for name, format in FORMATS.items())
    keys = _quoted([f"{key:.40}" for key in list(data)[:8]]) or "no keys"
    return f"the row has {keys}, and no known format ({wanted})"


def _hint(data: Json) -> str:
    sides = {side: next((key for key in data if key.startswith(side)), "") for side in ("chosen", "rejected")}
    if all(sides.values()):
        pairs = ", ".join(f"{side}: {key}" for side, key in sides.items())
        return f"say which key is what: `data: {{path: ..., columns: {{{pairs}}}}}`"
    asked = next((key for key in _PROMPTS if key in data), "QUESTION")
    answered = next((key for key in _ANSWERS if key in data), "ANSWER")
    return f"say which key is what: `data: {{path: ..., columns: {{prompt: {asked}, completion: {answered}}}}}`"


_PROMPTS = ("prompt", "question", "query", "instruction", "input", "user")
_ANSWERS = ("completion", "answer", "response", "output", "target", "assistant", "label")


# ---------------------------------------------------------------- the formats


def read_messages(row: Row, has_template: bool) -> Example:
    """OpenAI chat: `messages`, perhaps `tools` or the older `functions`; a message may have `train` or `weight`."""
    _need_template(row, has_template)
    return _conversation(row, read_turns(row.id, row.data["messages"], "messages"))


def read_sharegpt(row: Row, has_template: bool) -> Example:
    """ShareGPT: `conversations` of `from` and `value`, perhaps with `system` and `tools` beside it."""
    _need_template(row, has_template)
    turns = read_turns(row.id, row.data["conversations"], "conversations")
    system = _optional_text(row, "system")
    if system and turns[0][0]["role"] == "system" and turns[0][0]["content"] != system:
        what = "`system` and the first turn are two different system prompts"
        raise BadRow("contradiction", what, where=row.id, fix="keep one of them")
    if system and turns[0][0]["role"] != "system":
        turns = [_turn("system", system), *turns]
    return _conversation(row, turns)


def read_alpaca(row: Row, has_template: bool) -> Example:
    """Alpaca: `instruction` with `input` below it is the question, `output` the answer; `history` came before."""
    _need_template(row, has_template)
    system, below = _optional_text(row, "system"), _optional_text(row, "input")
    history = row.data.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        fix = "write [[question, answer], ...]"
        raise BadRow("not messages", "`history` is not a list of pairs", where=row.id, fix=fix)
    question = _text(row, "instruction") + (f"\n{below}" if below else "")
    said = [part for pair in pairs for part in pair] + [question, _text(row, "output")]
    messages = [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(said)]
    turns = read_turns(row.id, messages, "turns")
    return _conversation(row, [_turn("system", system), *turns] if system else turns)


def read_completion(row: Row, has_template: bool) -> Example:
    """`prompt` and `completion`: two strings, or lists of messages; only the completion is trained."""
    return _answered(row, "prompt", "completion", has_template)


def read_side(row: Row, has_template: bool, *, side: Side = "chosen") -> Example:
    """One side of a preference row, its answer trained: what answers the `prompt`, or the `conversations` or `messages`
    that stand there instead; of two whole conversations, what follows the turns that they share."""
    own, other = (row.data[key] for key in (side, "rejected" if side == "chosen" else "chosen"))
    if not _is_conversation(own):
        asked = _asked_in(row)
        if not asked:
            fix = "add a `prompt` (or map a column to it), or write both sides as whole conversations"
            raise BadRow("missing key", f"nothing says what `{side}` answers", where=row.id, fix=fix)
        return _answered(row, asked, side, has_template)
    _need_template(row, has_template)
    shared = 0
    while shared < len(own) - 1 and _is_conversation(other) and own[: shared + 1] == other[: shared + 1]:
        shared += 1
    before = read_turns(row.id, own[:shared], side, trained=False) if shared else []
    return _conversation(row, before + read_turns(row.id, own[shared:], side))


def read_openai_preference(row: Row, has_template: bool, *, side: Side = "chosen") -> Example:
    """OpenAI preference file: `input` with its messages, `preferred_output` and `non_preferred_output`."""
    asked = row.data["input"]
    if not isinstance(asked, dict):
        raise BadRow("not messages", "`input` is not an object", where=row.id, fix='write {"messages": [...]}')
    data = {"prompt": asked.get("messages"), "chosen": row.data["preferred_output"], "tools": asked.get("tools")}
    return read_side(Row(row.id, {**data, "rejected": row.data["non_preferred_output"]}), has_template, side=side)


def read_text(row: Row, has_template: bool) -> Example:  # noqa: ARG001 - every format has this signature
    """`text`: trained as it is, without a template."""
    text = _text(row, "text")
    if not text.strip():
        raise BadRow("empty text", "the text is empty", where=row.id, fix="drop the row")
    return Example(row.id, text=text)


# ---------------------------------------------------------------- what they share


def _answered(row: Row, asked: str, answered: str, has_template: bool) -> Example:
    """A prompt, not trained, and its answer, which is: two strings, or lists of messages."""
    prompt, answer = row.data[asked], row.data[answered]
    strings = isinstance(prompt, str) and isinstance(answer, str)
    if strings and not answer.strip():
        raise BadRow("empty answer", f"the {answered} is empty", where=row.id, fix="write the answer, or drop the row")
    if strings and not has_template:
        return Example(row.id, text=answer, prompt=prompt)
    _need_template(row, has_template)
    before = read_turns(row.id, _as_turns(row.id, prompt, "user", asked), asked, trained=False)
    after = read_turns(row.id, _as_turns(row.id, answer, "assistant", answered), answered)
    return _conversation(row, before + after)


def _conversation(row: Row, turns: Turns) -> Example:
    """The rules that hold for a whole conversation."""
    last = turns[-1][0]["role"]
    if last != "assistant":
        what = f"the last turn is `{last}`: after it there is nothing to train"
        fix = "add the assistant's answer, or drop that turn"
        raise BadRow("no answer at the end", what, where=row.id, fix=fix)
    if not any(weight for _, weight in turns):
        what = "no turn is trained: all are `train: false` or have weight 0"
        fix = "train at least one assistant turn, or drop the row"
        raise BadRow("nothing trained", what, where=row.id, fix=fix)
    messages, weights = zip(*turns, strict=True)
    return Example(row.id, messages, weights, read_tools(row))


def _is_conversation(value: Any) -> bool:
    """Whether a list of messages holds what the user said, too."""
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human") for turn in turns)


def _as_turns(where: str, value: Any, role: str, key: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    fix = "write both as strings, or both as lists of messages"
    what = f"`{key}` is {_kind(value)}, neither a string nor a list of messages"
    raise BadRow("not messages", what, where=where, fix=fix)


def _turn(role: str, content: str) -> tuple[Json, float]:
    """A turn that is not trained."""
    return {"role": role, "content": content}, 0.0


def _text(row: Row, key: str) -> str:
    text = row.data[key]
    if not isinstance(text, str):
        raise BadRow("not text", f"`{key}` is {_kind(text)}, not a string", where=row.id, fix="write a string")
    return text


def _optional_text(row: Row, key: str) -> str:
    return "" if row.data.get(key) is None else _text(row, key)


def _need_template(row: Row, has_template: bool) -> None:
    """A matter of the model, not of the row."""
    if not has_template:
        fix = "name one with `template:`, or write the rows as `text`, or as `prompt` and `completion` strings"
        raise InputError("messages need a chat template, and this model has none", where=row.id, fix=fix)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


ASKED = ("prompt", "conversations", "messages")  # what the sides of a preference row answer
_TOOLS = {"tools", "functions"}
_CHOSEN_ONLY = "stage sft trains on the chosen answers, the rejected ones are not trained"

# The first format whose keys a row has wins.
FORMATS = {
    "messages": Format(("messages",), frozenset({"messages", *_TOOLS}), read_messages),
    "completion": Format(("prompt", "completion"), frozenset({"prompt", "completion", *_TOOLS}), read_completion),
    "preference": Format(
        ("chosen", "rejected"), frozenset({*ASKED, "chosen", "rejected", *_TOOLS}), read_side, _CHOSEN_ONLY
    ),
    "openai_preference": Format(
        ("input", "preferred_output", "non_preferred_output"),
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        read_openai_preference,
        _CHOSEN_ONLY,
    ),
    "sharegpt": Format(("conversations",), frozenset({"conversations", "system", *_TOOLS}), read_sharegpt),
    "alpaca": Format(
        ("instruction", "output"),
        frozenset({"instruction", "input", "output", "system", "history", *_TOOLS}),
        read_alpaca,
        "`input` stands below the instruction in one user turn",
    ),
    "text": Format(("text",), frozenset({"text"}), read_text),
}

# What reads either side of a preference row.
SIDES: dict[str, Callable[..., Example]] = {"preference": read_side, "openai_preference": read_openai_preference}
