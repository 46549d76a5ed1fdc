"""The facts that advice stands on.

    flags, a YAML file, a recipe with its rows, or answers to questions -> Situation

`QUESTIONS` is the list of facts: how each is asked for and how its value is read. A fact that is not given is None, and
counts as not there. Left out: what follows from the facts (rubric.py).
"""

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
from tunesmith.recipe.schema import Recipe, Stages, sources_of
from tunesmith.recipe.yaml_lines import read_yaml

Need = Literal["facts", "format", "tone", "latency", "domain", "skill"]
Pace = Literal["never", "yearly", "monthly", "weekly", "daily"]
Prompted = Literal["untried", "bad", "close", "good"]

NEEDS: tuple[Need, ...] = get_args(Need)
PACES: tuple[Pace, ...] = get_args(Pace)
PROMPTED: tuple[Prompted, ...] = get_args(Prompted)
ALSO: dict[str, Need] = {
    **dict.fromkeys(("knowledge", "new-facts"), "facts"),
    **dict.fromkeys(("json", "xml", "output-format"), "format"),
    **dict.fromkeys(("persona", "style", "voice"), "tone"),
    **dict.fromkeys(("cost", "speed", "price"), "latency"),
    **dict.fromkeys(("language", "vocabulary", "jargon"), "domain"),
    **dict.fromkeys(("reasoning", "task"), "skill"),
}
MOST = 10**15


@dataclass(frozen=True)
class Situation:
    need: tuple[Need, ...]
    facts_change: Pace | None = None
    raw_text: int | None = None  # bytes of text in the domain's language, or that holds the facts
    paraphrases: int | None = None  # ways in which the rows say each fact
    examples: int | None = None  # questions with answers as they should be
    pairs: int | None = None  # questions with a better and a worse answer
    prompt: Prompted | None = None  # how the best prompt did
    requests_month: int | None = None
    private: bool | None = None  # the text may not reach everybody who may use the model


@dataclass(frozen=True)
class Question:
    """`needs`: the needs that it matters for."""

    asks: str
    read: Callable[[Any], Any]
    needs: tuple[Need, ...] = NEEDS


def read_situation(path: Path | None, given: Mapping[str, Any]) -> Situation:
    """`given` wins over the file at `path`, which holds facts or is a recipe, whose rows are counted. InputError for
    what is unknown, cannot be, or contradicts itself."""
    written, counted = ({}, {}) if path is None else _of_file(path)
    told = _of_mapping(given, lambda key: key if key.startswith("--") else f"argument {key}")
    for name in told.keys() & counted.keys():
        if told[name] != counted[name]:
            what = f"{name} is {told[name]}, and the data of {path} has {counted[name]}"
            raise InputError(what, where=str(path), fix="leave it out: it is counted")
    facts: dict[str, Any] = {**written, **counted, **told}
    if not facts.get("need"):
        fix = f"say what the model lacks: --need {'|'.join(NEEDS)}, several with commas"
        raise InputError("what is needed is not said", where=str(path or "advise"), fix=fix)
    if problem := next(_contradictions(facts), None):
        raise InputError(problem, where=str(path or "advise"), fix="change one of the two")
    return Situation(**facts)


def _of_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The facts that a file tells, and those that are counted in the data of a recipe."""
    document = read_yaml(path)
    if is_recipe(path):
        return {}, count_rows(path)
    if document.duplicates:
        key, line = document.duplicates[0]
        raise InputError(f"'{key}' stands here a second time", where=f"{path}:{line}", fix="keep one")
    return _of_mapping(document.values, lambda key: document.where((key,))), {}


def is_recipe(path: Path) -> bool:
    return bool({"data", "model"} & read_yaml(path).values.keys())


def count_rows(path: Path) -> dict[str, int]:
    """Rows of a recipe's data as they stand in its files, nothing rendered; of several stages the sum."""
    recipe = load_recipe(path)
    counted: Counter[str] = Counter()
    for stage in recipe.recipes if isinstance(recipe, Stages) else (recipe,):
        counted.update(_counted(stage))
    return dict(counted)


def _counted(recipe: Recipe) -> dict[str, int]:
    """The better answers of pairs are examples too; of continued pretraining it is the bytes that count."""
    sources = [open_source(source.path) for source in sources_of(recipe, "data")]
    if recipe.stage == "cpt":
        return {"raw_text": sum(source.raw(row, 0)[1] for source in sources for row in range(len(source)))}
    rows = sum(len(source) for source in sources)
    rows = rows if recipe.max_examples is None else min(rows, recipe.max_examples)
    return {"examples": rows, "pairs": rows} if recipe.stage == "preference" else {"examples": rows}


def _of_mapping(given: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in given.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in QUESTIONS:
            raise InputError(_unknown("fact", name, QUESTIONS), where=where(key))
        if name in facts:
            raise InputError(f"{name} is given twice", where=where(key), fix="keep one")
        if value is None:
            continue
        try:
            facts[name] = QUESTIONS[name].read(value)
        except ValueError as error:
            raise InputError(str(error), where=where(key)) from None
    return facts


def _contradictions(facts: Mapping[str, Any]) -> Iterator[str]:
    if "facts" not in facts["need"]:
        if facts.get("facts_change", "never") != "never":
            yield f"the facts change {facts['facts_change']}, but no facts are needed"
        if facts.get("paraphrases"):
            yield "paraphrases are of facts, but no facts are needed"
    if "latency" in facts["need"] and facts.get("requests_month") == 0:
        yield "each request is to cost less, but there are none"


# ---------------------------------------------------------------- values


def _needs(value: Any) -> tuple[Need, ...]:
    words: list[Any] = re.split(r"[,\s]+", value.strip(" ,[]")) if isinstance(value, str) else _list(value)
    found = [_need(str(word).lower().replace("_", "-")) for word in words if word != ""]
    if not found:
        raise ValueError(f"nothing is named: there are {', '.join(NEEDS)}")
    return tuple(need for need in NEEDS if need in found)


def _list(value: Any) -> list[Any]:
    return list(cast("Collection[Any]", value)) if isinstance(value, (list, tuple)) else [value]


def _need(word: str) -> Need:
    known: Mapping[str, Need] = {**{need: need for need in NEEDS}, **ALSO}
    if word not in known:
        raise ValueError(_unknown("need", word, known, NEEDS))
    return known[word]


def _one_of(options: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        word = str(value).lower()
        if word not in options:
            raise ValueError(_unknown("answer", word, options))
        return word

    return read


def _count(value: Any) -> int:
    text = re.sub(r"(?<=\d)[,_](?=\d)", "", str(value).strip())
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,16}", text, re.ASCII):
        raise ValueError(f"{str(value)!r:.60} is no whole number")
    if not 0 <= int(text) <= MOST:
        raise ValueError(f"{text} is {'less than nothing' if int(text) < 0 else 'more than there can be'}")
    return int(text)


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b", str(value).strip().lower(), re.ASCII)
    if match is None:
        try:
            return _count(value)
        except ValueError as error:
            raise ValueError(f"{error}; a size is written as 300KB or 20MB") from None
    return _count(round(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")))


def _switch(value: Any) -> bool:
    known = {"yes": True, "true": True, "no": False, "false": False}
    if (word := str(value).lower()) not in known:
        raise ValueError(f"{word!r:.60} is neither yes nor no")
    return known[word]


def _unknown(kind: str, word: str, known: Collection[str], shown: Collection[str] = ()) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown {kind} {word!r:.60}; " + (
        f"did you mean '{near[0]}'?" if near else f"there are {', '.join(shown or known)}"
    )


# ---------------------------------------------------------------- questions

QUESTIONS: dict[str, Question] = {
    "need": Question(f"What does the model lack? {', '.join(NEEDS)}; several with commas", _needs),
    "facts_change": Question(f"How often do the facts change? {', '.join(PACES)}", _one_of(PACES), ("facts",)),
    "raw_text": Question(
        "How much plain text is there, in that language or with those facts? 300KB, 20MB", _bytes, ("facts", "domain")
    ),
    "paraphrases": Question("In how many ways do the examples say each fact?", _count, ("facts",)),
    "examples": Question("How many questions with answers as they should be are there?", _count),
    "pairs": Question("How many questions with a better and a worse answer are there?", _count, ("tone", "skill")),
    "prompt": Question(f"How well did the best prompt do? {', '.join(PROMPTED)}", _one_of(PROMPTED)),
    "requests_month": Question("How many requests come in a month?", _count, ("latency",)),
    "private": Question("Is the text secret from some who may use the model? yes, no", _switch),
}


def questions_for(need: tuple[Need, ...]) -> list[str]:
    """Names of the facts that matter for these needs."""
    return [name for name, question in QUESTIONS.items() if set(question.needs) & set(need)]


def ask(answer: Callable[[str], str], complain: Callable[[str], None]) -> dict[str, Any]:
    """The facts, asked for one after the other: `answer` gets a question and gives a line. An empty one leaves it
    open, but for the need."""
    facts: dict[str, Any] = {}
    for name, question in QUESTIONS.items():
        while name in ("need", *questions_for(facts.get("need", ()))):
            line = answer(question.asks).strip()
            if not line and name != "need":
                break
            try:
                facts[name] = question.read(line)
                break
            except ValueError as error:
                complain(str(error))
    return facts


def needs_value(flag: str) -> bool:
    """Whether a flag is a fact that is not told by yes or no."""
    question = QUESTIONS.get(flag.replace("-", "_"))
    return question is not None and question.read is not _switch
