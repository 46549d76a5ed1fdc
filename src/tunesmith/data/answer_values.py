"""The values of answers: the fields of a JSON object, or the answer as one value.

    '{"a": {"b": true}, "c": [1, 2]}' -> {"a.b": "true", "c": "[1, 2]"}

A list is one value, and so is what lies deeper than MAX_DEPTH. Values are equal where the metric
`field_f1` finds them equal: plain values of a list in any order, 1 and 1.0. Names and values are
strangers' texts of any length: long ones are cut and end in a digest, so that different ones stay
different. Left out: what values mean (evaluate/error_analysis.py, checks/labels.py)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, cast

from tunesmith.core.json_io import MAX_TEXT_VALUES, has_more_values

MAX_DEPTH = 4
MAX_FIELDS = 500  # of an answer; the others are counted as one
MAX_COUNTED_VALUES = 2_000  # different values of a field that are counted one by one
MAX_VALUE_CHARS = 60
MAX_NAME_CHARS = 60
OTHER_FIELDS = "(further fields)"
LOPSIDED_SHARE = 0.8  # of the most frequent value: above it, a constant would score well
ANSWER = ""  # the name of the answer as one value


def split_fields(text: str) -> dict[str, str] | None:
    """Return the fields of a JSON object with their values as JSON; None for any other text."""
    if has_more_values(text, MAX_TEXT_VALUES):
        return None
    try:
        value = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(value, dict) or not value:
            return None
        fields: dict[str, str] = {}
        _collect_fields(cast("dict[str, Any]", value), "", 1, fields)
    except (ValueError, RecursionError):
        return None
    return fields


def refuse_constant(constant: str) -> None:
    """Refuse NaN and infinities, which Python's json would accept."""
    raise ValueError(f"{constant} is not JSON")


def _collect_fields(value: dict[str, Any], prefix: str, depth: int, into: dict[str, str]) -> None:
    for key, item in value.items():
        name = prefix + format_field_name(key)
        if isinstance(item, dict) and item and depth < MAX_DEPTH:
            _collect_fields(cast("dict[str, Any]", item), f"{name}.", depth + 1, into)
            continue
        text = json.dumps(normalize_value(item), sort_keys=True, ensure_ascii=False)
        name = shorten(name, MAX_NAME_CHARS)
        if len(into) < MAX_FIELDS:
            into[name] = shorten(text, MAX_VALUE_CHARS)
        else:
            rest = f"{into.get(OTHER_FIELDS, '')}{name}={text};"
            into[OTHER_FIELDS] = _hash_text(rest)


def normalize_value(value: Any) -> Any:
    """Return a JSON value in one form: plain values of a list in order, 1.0 as 1."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: normalize_value(item) for key, item in items}
    if isinstance(value, list):
        values = [normalize_value(item) for item in cast("list[Any]", value)]
        has_order = any(isinstance(item, (dict, list)) for item in values)
        return values if has_order else sorted(values, key=json.dumps)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def format_field_name(key: str) -> str:
    """Return a key as a part of a path: quoted, with escapes, unless it is a plain word."""
    is_plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_plain else json.dumps(key)


def normalize_answer(text: str) -> str:
    """Return an answer as one value: white space and JSON's formatting do not count."""
    return shorten(" ".join(text.split()), MAX_VALUE_CHARS)


def shorten(text: str, max_chars: int) -> str:
    """Return the text, or its beginning with a digest, so that long texts still differ."""
    if len(text) <= max_chars:
        return text
    return f"{text[: max_chars - 10]}… {_hash_text(text)}"


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()


@dataclass
class ValueCounts:
    """Counts the values of each field over many answers, in bounded memory."""

    num_answers: int = 0
    num_objects: int = 0  # answers that are JSON objects
    counts: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    uncounted: dict[str, int] = field(default_factory=dict[str, int])  # of further values

    def add_answer(self, text: str) -> None:
        self.num_answers += 1
        fields = split_fields(text)
        if fields is not None:
            self.num_objects += 1
        for name, value in (fields or {ANSWER: normalize_answer(text)}).items():
            self.add_value(name, value)

    def add_value(self, name: str, value: str) -> None:
        if name not in self.counts:
            if len(self.counts) >= MAX_FIELDS:
                return
            self.counts[name] = {}
        values = self.counts[name]
        if value in values or len(values) < MAX_COUNTED_VALUES:
            values[value] = values.get(value, 0) + 1
        else:
            self.uncounted[name] = self.uncounted.get(name, 0) + 1

    def count_rows(self, name: str) -> int:
        """Return the number of answers that have a field."""
        return sum(self.counts.get(name, {}).values()) + self.uncounted.get(name, 0)

    def has_few_values(self, name: str, max_values: int) -> bool:
        """Return whether a field is categorical: a handful of values, each for many rows."""
        num_values = len(self.counts.get(name, {}))
        return 1 <= num_values <= min(max_values, max(2, self.count_rows(name) // 4))
