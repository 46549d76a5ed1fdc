"""The facts that advice is based on, and how to parse the value of each.

    parse_facts(mapping, locate) -> values

FACTS lists them. An unknown fact is None and counts as absent. Left out: reading them from
files and recipes (requirements.py), and what follows from them (rubric.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name

Need = Literal[
    "facts",
    "format",
    "tone",
    "latency",
    "domain",
    "skill",
    "safety",
    "on-device",
    "translation",
    "long-context",
    "tool-calling",
]
ChangeFrequency = Literal["never", "yearly", "monthly", "weekly", "daily"]
PromptQuality = Literal["untried", "bad", "close", "good"]

NEEDS: tuple[Need, ...] = get_args(Need)
CHANGE_FREQUENCIES: tuple[ChangeFrequency, ...] = get_args(ChangeFrequency)
PROMPT_QUALITIES: tuple[PromptQuality, ...] = get_args(PromptQuality)
NEED_ALIASES: dict[str, Need] = {
    **dict.fromkeys(("knowledge", "new-facts"), "facts"),
    **dict.fromkeys(("json", "xml", "output-format"), "format"),
    **dict.fromkeys(("persona", "style", "voice"), "tone"),
    **dict.fromkeys(("cost", "speed", "price"), "latency"),
    **dict.fromkeys(("language", "vocabulary", "jargon"), "domain"),
    **dict.fromkeys(("reasoning", "task"), "skill"),
    **dict.fromkeys(("tools", "function-calling", "tool-use"), "tool-calling"),
    **dict.fromkeys(("edge", "mobile"), "on-device"),
    **dict.fromkeys(("refusals", "moderation"), "safety"),
}
MAX_COUNT = 10**15


@dataclass(frozen=True)
class Requirements:
    """The facts; None is unknown."""

    need: tuple[Need, ...]
    facts_change: ChangeFrequency | None = None
    raw_text: int | None = None  # bytes of text in the domain's language, or with the facts
    paraphrases: int | None = None  # wordings of each fact in the rows
    examples: int | None = None  # questions with correct answers
    pairs: int | None = None  # questions with a chosen and a rejected answer
    prompt: PromptQuality | None = None  # of the best prompt so far
    requests_month: int | None = None
    private: bool | None = None  # the text is confidential to some users of the model
    context: int | None = None  # tokens of the longest request
    base_context: int | None = None  # tokens that the base model accepts
    params: int | None = None  # of the base model
    device_memory: int | None = None  # bytes for the model
    base_language: bool | None = None  # the base model knows the language
    base_at_chance: bool | None = None  # its choices by likelihood are no better than chance


@dataclass(frozen=True)
class Fact:
    """How a fact is parsed, and the needs for which it matters."""

    parse: Callable[[Any], Any]
    needs: tuple[Need, ...] = NEEDS


def parse_facts(mapping: Mapping[str, Any], locate: Callable[[str], str]) -> dict[str, Any]:
    """Parse facts; `locate` says where a key is. Raises InputError for an invalid one."""
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in FACTS:
            raise InputError(_describe_unknown("fact", name, FACTS), where=locate(key))
        if name in values:
            raise InputError(f"duplicate fact '{name}'", where=locate(key), fix="keep one")
        if value is None:
            continue
        try:
            values[name] = FACTS[name].parse(value)
        except ValueError as error:
            raise InputError(str(error), where=locate(key)) from None
    return values


# ---------------------------------------------------------------- values


def _parse_needs(value: Any) -> tuple[Need, ...]:
    words: list[Any] = [value]
    if isinstance(value, str):
        words = re.split(r"[,\s]+", value.strip(" ,[]"))
    elif isinstance(value, (list, tuple)):
        words = list(cast("Collection[Any]", value))
    needs = [_parse_need(str(word).lower().replace("_", "-")) for word in words if word != ""]
    if not needs:
        raise ValueError(f"no need is named; choose from {', '.join(NEEDS)}")
    return tuple(need for need in NEEDS if need in needs)


def _parse_need(word: str) -> Need:
    needs_by_word: Mapping[str, Need] = {**{need: need for need in NEEDS}, **NEED_ALIASES}
    if word not in needs_by_word:
        raise ValueError(_describe_unknown("need", word, needs_by_word, NEEDS))
    return needs_by_word[word]


def _make_choice_parser(options: tuple[str, ...]) -> Callable[[Any], str]:
    def parse_choice(value: Any) -> str:
        word = str(value).lower()
        if word not in options:
            raise ValueError(_describe_unknown("answer", word, options))
        return word

    return parse_choice


def _parse_count(value: Any) -> int:
    text = re.sub(r"(?<=\d)[,_](?=\d)", "", str(value).strip())
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,16}", text, re.ASCII):
        raise ValueError(f"{str(value)!r:.60} is not a whole number")
    if int(text) < 0:
        raise ValueError(f"{text} is negative")
    if int(text) > MAX_COUNT:
        raise ValueError(f"{text} is too large")
    return int(text)


def _parse_bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b", str(value).strip().lower(), re.ASCII)
    if match is None:
        try:
            return _parse_count(value)
        except ValueError as error:
            raise ValueError(f"{error}; write a size as 300KB or 20MB") from None
    exponent = " kmgt".index(match[2] or " ")
    return _parse_count(round(float(match[1]) * 1000**exponent))


def _parse_params(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mb])", str(value).strip().lower(), re.ASCII)
    if match is None:
        raise ValueError(f"{str(value)!r:.60} is not a model size; write 135M or 7B")
    return _parse_count(round(float(match[1]) * {"m": 10**6, "b": 10**9}[match[2]]))


def _parse_bool(value: Any) -> bool:
    values = {"yes": True, "true": True, "no": False, "false": False}
    if (word := str(value).lower()) not in values:
        raise ValueError(f"{word!r:.60} is neither yes nor no")
    return values[word]


def _describe_unknown(
    kind: str, word: str, options: Collection[str], listed: Collection[str] = ()
) -> str:
    choices = f"choose from {', '.join(listed or options)}"
    hint = suggest_name(word, options, default=choices, quote="'")
    return f"unknown {kind} {word!r:.60}; {hint}"


# ---------------------------------------------------------------- facts

FACTS: dict[str, Fact] = {
    "need": Fact(_parse_needs),
    "facts_change": Fact(_make_choice_parser(CHANGE_FREQUENCIES), ("facts",)),
    "raw_text": Fact(_parse_bytes, ("facts", "domain", "translation")),
    "paraphrases": Fact(_parse_count, ("facts",)),
    "examples": Fact(_parse_count),
    "pairs": Fact(_parse_count, ("tone", "skill", "safety")),
    "prompt": Fact(_make_choice_parser(PROMPT_QUALITIES)),
    "requests_month": Fact(_parse_count, ("latency",)),
    "private": Fact(_parse_bool),
    "context": Fact(_parse_count, ("long-context",)),
    "base_context": Fact(_parse_count, ("long-context",)),
    "params": Fact(_parse_params, ("on-device", "latency")),
    "device_memory": Fact(_parse_bytes, ("on-device", "latency")),
    "base_language": Fact(_parse_bool),
    "base_at_chance": Fact(_parse_bool),
}


def select_facts(needs: tuple[Need, ...]) -> list[str]:
    """Return the names of the facts that matter for these needs."""
    return [name for name, fact in FACTS.items() if set(fact.needs) & set(needs)]


def needs_value(flag: str) -> bool:
    """Return whether a flag is a fact that is not yes or no."""
    fact = FACTS.get(flag.replace("-", "_"))
    return fact is not None and fact.parse is not _parse_bool
