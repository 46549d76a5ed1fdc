"""The facts that advice stands on.

    flags, a YAML file, a recipe with its rows, or answers to questions -> Situation

`QUESTIONS` is the list of facts: how each is asked for and how its value is read. A fact that is
not given is None, and counts as not there. Left out: what follows from the facts (rubric.py)."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tunesmith.core.errors import InputError
from tunesmith.data.readers.sources import open_source
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe, Stages, select_sources
from tunesmith.recipe.yaml_lines import read_yaml

Need = Literal["facts", "format", "tone", "latency", "domain", "skill"]
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
}
MAX_COUNT = 10**15


@dataclass(frozen=True)
class Requirements:
    need: tuple[Need, ...]
    facts_change: ChangeFrequency | None = None
    raw_text: int | None = None  # bytes of text in the domain's language, or that holds the facts
    paraphrases: int | None = None  # ways in which the rows say each fact
    examples: int | None = None  # questions with answers as they should be
    pairs: int | None = None  # questions with a better and a worse answer
    prompt: PromptQuality | None = None  # how the best prompt did
    requests_month: int | None = None
    private: bool | None = None  # the text may not reach everybody who may use the model


@dataclass(frozen=True)
class FormQuestion:
    """`needs`: the needs that it matters for."""

    text: str
    parse: Callable[[Any], Any]
    needs: tuple[Need, ...] = NEEDS


def read_requirements(path: Path | None, arguments: Mapping[str, Any]) -> Requirements:
    """`given` wins over the file at `path`, which holds facts or is a recipe, whose rows are
    counted. InputError for what is unknown, cannot be, or contradicts itself."""
    file_values, counted_values = ({}, {}) if path is None else _read_file(path)
    argument_values = _parse_mapping(
        arguments, lambda key: key if key.startswith("--") else f"argument {key}"
    )
    for name in argument_values.keys() & counted_values.keys():
        if argument_values[name] != counted_values[name]:
            message = f"{name} is {argument_values[name]}, and the data of {path} has {counted_values[name]}"
            raise InputError(message, where=str(path), fix="leave it out: it is counted")
    values: dict[str, Any] = {**file_values, **counted_values, **argument_values}
    if not values.get("need"):
        fix = f"say what the model lacks: --need {'|'.join(NEEDS)}, several with commas"
        raise InputError("what is needed is not said", where=str(path or "advise"), fix=fix)
    if problem := next(_iter_contradictions(values), None):
        raise InputError(problem, where=str(path or "advise"), fix="change one of the two")
    return Requirements(**values)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The facts that a file tells, and those that are counted in the data of a recipe."""
    document = read_yaml(path)
    if is_recipe(path):
        return {}, count_rows(path)
    if document.duplicates:
        key, line = document.duplicates[0]
        raise InputError(
            f"'{key}' stands here a second time", where=f"{path}:{line}", fix="keep one"
        )
    return _parse_mapping(document.values, lambda key: document.format_location((key,))), {}


def is_recipe(path: Path) -> bool:
    return bool({"data", "model"} & read_yaml(path).values.keys())


def count_rows(path: Path) -> dict[str, int]:
    """Rows of a recipe's data as they stand in its files, nothing rendered; of several stages the
    sum."""
    recipe = load_recipe(path)
    counted: Counter[str] = Counter()
    for stage in recipe.recipes if isinstance(recipe, Stages) else (recipe,):
        counted.update(_count_stage_rows(stage))
    return dict(counted)


def _count_stage_rows(recipe: Recipe) -> dict[str, int]:
    """The better answers of pairs are examples too; of continued pretraining it is the bytes that
    count."""
    sources = [open_source(source.path) for source in select_sources(recipe, "data")]
    if recipe.stage == "cpt":
        return {
            "raw_text": sum(
                source.read_raw(row, 0)[1] for source in sources for row in range(len(source))
            )
        }
    rows = sum(len(source) for source in sources)
    rows = rows if recipe.max_examples is None else min(rows, recipe.max_examples)
    return {"examples": rows, "pairs": rows} if recipe.stage == "preference" else {"examples": rows}


def _parse_mapping(mapping: Mapping[str, Any], locate: Callable[[str], str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in QUESTIONS:
            raise InputError(_describe_unknown("fact", name, QUESTIONS), where=locate(key))
        if name in values:
            raise InputError(f"{name} is given twice", where=locate(key), fix="keep one")
        if value is None:
            continue
        try:
            values[name] = QUESTIONS[name].parse(value)
        except ValueError as error:
            raise InputError(str(error), where=locate(key)) from None
    return values


def _iter_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    if "facts" not in values["need"]:
        if values.get("facts_change", "never") != "never":
            yield f"the facts change {values['facts_change']}, but no facts are needed"
        if values.get("paraphrases"):
            yield "paraphrases are of facts, but no facts are needed"
    if "latency" in values["need"] and values.get("requests_month") == 0:
        yield "each request is to cost less, but there are none"


# ---------------------------------------------------------------- values


def _parse_needs(value: Any) -> tuple[Need, ...]:
    words: list[Any] = (
        re.split(r"[,\s]+", value.strip(" ,[]")) if isinstance(value, str) else _to_list(value)
    )
    needs = [_parse_need(str(word).lower().replace("_", "-")) for word in words if word != ""]
    if not needs:
        raise ValueError(f"nothing is named: there are {', '.join(NEEDS)}")
    return tuple(need for need in NEEDS if need in needs)


def _to_list(value: Any) -> list[Any]:
    return list(cast("Collection[Any]", value)) if isinstance(value, (list, tuple)) else [value]


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
        raise ValueError(f"{str(value)!r:.60} is no whole number")
    if not 0 <= int(text) <= MAX_COUNT:
        raise ValueError(
            f"{text} is {'less than nothing' if int(text) < 0 else 'more than there can be'}"
        )
    return int(text)


def _parse_bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b", str(value).strip().lower(), re.ASCII)
    if match is None:
        try:
            return _parse_count(value)
        except ValueError as error:
            raise ValueError(f"{error}; a size is written as 300KB or 20MB") from None
    return _parse_count(round(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")))


def _parse_bool(value: Any) -> bool:
    values = {"yes": True, "true": True, "no": False, "false": False}
    if (word := str(value).lower()) not in values:
        raise ValueError(f"{word!r:.60} is neither yes nor no")
    return values[word]


def _describe_unknown(
    kind: str, word: str, options: Collection[str], listed: Collection[str] = ()
) -> str:
    matches = difflib.get_close_matches(word, options, n=1)
    return f"unknown {kind} {word!r:.60}; " + (
        f"did you mean '{matches[0]}'?" if matches else f"there are {', '.join(listed or options)}"
    )


# ---------------------------------------------------------------- questions

QUESTIONS: dict[str, FormQuestion] = {
    "need": FormQuestion(
        f"What does the model lack? {', '.join(NEEDS)}; several with commas", _parse_needs
    ),
    "facts_change": FormQuestion(
        f"How often do the facts change? {', '.join(CHANGE_FREQUENCIES)}",
        _make_choice_parser(CHANGE_FREQUENCIES),
        ("facts",),
    ),
    "raw_text": FormQuestion(
        "How much plain text is there, in that language or with those facts? 300KB, 20MB",
        _parse_bytes,
        ("facts", "domain"),
    ),
    "paraphrases": FormQuestion(
        "In how many ways do the examples say each fact?", _parse_count, ("facts",)
    ),
    "examples": FormQuestion(
        "How many questions with answers as they should be are there?", _parse_count
    ),
    "pairs": FormQuestion(
        "How many questions with a better and a worse answer are there?",
        _parse_count,
        ("tone", "skill"),
    ),
    "prompt": FormQuestion(
        f"How well did the best prompt do? {', '.join(PROMPT_QUALITIES)}",
        _make_choice_parser(PROMPT_QUALITIES),
    ),
    "requests_month": FormQuestion(
        "How many requests come in a month?", _parse_count, ("latency",)
    ),
    "private": FormQuestion(
        "Is the text secret from some who may use the model? yes, no", _parse_bool
    ),
}


def select_questions(needs: tuple[Need, ...]) -> list[str]:
    """Names of the facts that matter for these needs."""
    return [name for name, question in QUESTIONS.items() if set(question.needs) & set(needs)]


def ask_questions(
    read_line: Callable[[str], str], report_error: Callable[[str], None]
) -> dict[str, Any]:
    """The facts, asked for one after the other: `answer` gets a question and gives a line. An empty
    one leaves it open, but for the need."""
    values: dict[str, Any] = {}
    for name, question in QUESTIONS.items():
        while name in ("need", *select_questions(values.get("need", ()))):
            line = read_line(question.text).strip()
            if not line and name != "need":
                break
            try:
                values[name] = question.parse(line)
                break
            except ValueError as error:
                report_error(str(error))
    return values


def needs_value(flag: str) -> bool:
    """Whether a flag is a fact that is not told by yes or no."""
    question = QUESTIONS.get(flag.replace("-", "_"))
    return question is not None and question.parse is not _parse_bool
