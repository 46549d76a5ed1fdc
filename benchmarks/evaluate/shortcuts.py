"""Measure how often the detector of constants speaks of healthy answers, and finds injected ones.

    python -m benchmarks.evaluate.shortcuts [--repeats 40] [--seed 0]

Out: the tables of docs/results/shortcuts.md. Ten healthy tasks: objects with flags, enums and free
fields, labels of equal and unequal frequency, numbers, names, extracts of the prompt, rewritten
texts. A healthy model is right in a share of the items; its errors are drawn from the expected
answers of other items, or, if it is biased, from the most frequent ones. A constant
replaces a field or the answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import TrainingValues
from tunesmith.core.types import Json
from tunesmith.evaluate.shortcuts import (
    AnswerItem,
    build_answer_items,
    find_constants,
)
from tunesmith.evaluate.training_answers import build_training_values

SIZES = (16, 64, 80, 400)
ACCURACIES = (0.3, 0.6, 0.9)
TRAINING_ROWS = 260
WORDS = [
    a + b
    for a in ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu")
    for b in ("lan", "ter", "mos", "vin", "rap")
]
Answer = str | Json
Item = tuple[str, Answer]  # prompt, expected answer


def write_words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=count))


def make_flags(chance: random.Random) -> Item:
    prompt = write_words(chance, 20)
    fields = {"urgent": chance.random() < 0.35, "public": chance.random() < 0.9}
    return prompt, {**fields, "title": " ".join(prompt.split()[:2])}


def make_enums(chance: random.Random) -> Item:
    prompt = write_words(chance, 15)
    upload = chance.choices(["maintainer", "team", "nmu"], [75, 15, 10])[0]
    return prompt, {"upload": upload, "words": len(prompt.split()), "tags": prompt.split()[:1]}


def make_nested(chance: random.Random) -> Item:
    prompt = write_words(chance, 15)
    person = {"name": prompt.split()[3], "active": chance.random() < 0.5}
    return prompt, {
        "person": person,
        "note": None if chance.random() < 0.7 else write_words(chance, 3),
    }


def make_labels(chance: random.Random) -> Item:
    return write_words(chance, 12), chance.choice(["value", "nothing", "generator"])


def make_rare_labels(chance: random.Random) -> Item:
    label = chance.choices(["bug", "question", "feature", "spam"], [70, 20, 8, 2])[0]
    # Labels occur in prompts by chance.
    return f"{write_words(chance, 10)} {chance.choice(['bug', 'feature', 'spam', 'thing'])}", label


def make_numbers(chance: random.Random) -> Item:
    first = chance.randrange(100)
    second = chance.randrange(100)
    return f"{first} + {second}", str(first + second)


def make_names(chance: random.Random) -> Item:
    words = chance.choices(WORDS, k=3)
    return f"Write the name {'_'.join(words)} in CamelCase.", "".join(map(str.title, words))


def make_extracts(chance: random.Random) -> Item:
    words = write_words(chance, 30).split()
    start = chance.randrange(20)
    return " ".join(words), " ".join(words[start : start + 4])


def make_rewrites(chance: random.Random) -> Item:
    words = write_words(chance, 30).split()
    rewritten = [*words[:13], chance.choice(WORDS), *words[14:]]
    return " ".join(words), " ".join(rewritten)


def make_texts(chance: random.Random) -> Item:
    return write_words(chance, 10), write_words(chance, 25)


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "flags": make_flags,
    "enums": make_enums,
    "nested": make_nested,
    "labels": make_labels,
    "rare labels": make_rare_labels,
    "numbers": make_numbers,
    "names": make_names,
    "extracts": make_extracts,
    "rewrites": make_rewrites,
    "texts": make_texts,
}


def format_answer(answer: Answer) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer)


def answer_items(
    items: Sequence[Item], accuracy: float, is_biased: bool, chance: random.Random
) -> list[Answer]:
    """Return the answers of a healthy model: each field is right in a share of the items."""
    expected = [answer for _, answer in items]
    answers: list[Answer] = []
    for answer in expected:
        if isinstance(answer, str):
            answers.append(
                pick_value(answer, [str(a) for a in expected], accuracy, is_biased, chance)
            )
            continue
        fields: Json = {}
        for name, value in answer.items():
            others = [json.dumps(other[name]) for other in expected if not isinstance(other, str)]
            picked = pick_value(json.dumps(value), others, accuracy, is_biased, chance)
            fields[name] = json.loads(picked)
        answers.append(fields)
    return answers


def pick_value(
    value: str, others: Sequence[str], accuracy: float, is_biased: bool, chance: random.Random
) -> str:
    if chance.random() < accuracy:
        return value
    if is_biased and chance.random() < 0.8:
        return Counter(others).most_common(1)[0][0]
    return chance.choice(others)


def detect_fields(
    items: Sequence[Item], answers: Sequence[Answer], training: TrainingValues
) -> set[str]:
    """Return the fields of the constants in these answers."""
    return {shortcut.field for shortcut in find_constants(pair_items(items, answers), training)}


def pair_items(items: Sequence[Item], answers: Sequence[Answer]) -> list[AnswerItem]:
    samples = [
        GenerationSample(1, str(index), prompt, format_answer(answer), format_answer(expected))
        for index, ((prompt, expected), answer) in enumerate(zip(items, answers, strict=True))
    ]
    return build_answer_items(samples)


def read_training(task: str, chance: random.Random) -> tuple[list[Answer], TrainingValues]:
    answers = [TASKS[task](chance)[1] for _ in range(TRAINING_ROWS)]
    return answers, build_training_values(map(format_answer, answers), TRAINING_ROWS)


def count_false_alarms(task: str, size: int, repeats: int, seed: int) -> tuple[int, int]:
    """Return (evaluations with an alarm, evaluations) over accuracies and kinds of errors."""
    alarms = total = 0
    for repeat in range(repeats):
        chance = random.Random(f"{task} {size} {repeat} {seed}")
        _, training = read_training(task, chance)
        items = [TASKS[task](chance) for _ in range(size)]
        for accuracy in ACCURACIES:
            for is_biased in (False, True)[: 1 if accuracy < 0.5 else 2]:
                answers = answer_items(items, accuracy, is_biased, chance)
                alarms += bool(detect_fields(items, answers, training))
                total += 1
    return alarms, total


# ---------------------------------------------------------------- injected constants


def inject_constant(items: Sequence[Item], answers: list[Answer], name: str) -> list[Answer]:
    """Answer the most frequent value, in a field or as the answer."""
    if not name:
        expected = [format_answer(answer) for _, answer in items]
        return [Counter(expected).most_common(1)[0][0]] * len(answers)
    values = [json.dumps(answer[name]) for _, answer in items if not isinstance(answer, str)]
    constant = json.loads(Counter(values).most_common(1)[0][0])
    return [{**answer, name: constant} for answer in answers if not isinstance(answer, str)]


INJECTED_CONSTANTS = (
    ("flags", "urgent"),
    ("flags", "public"),
    ("enums", "upload"),
    ("enums", "tags"),
    ("nested", "note"),
    ("labels", ""),
    ("rare labels", ""),
    ("numbers", ""),
    ("texts", ""),
)


def count_constants(task: str, name: str, size: int, repeats: int, seed: int) -> tuple[int, int]:
    """Return (times that the injected constant was detected, times)."""
    detected = 0
    for repeat in range(repeats):
        chance = random.Random(f"{task} {name} {size} {repeat} {seed}")
        _, training = read_training(task, chance)
        items = [TASKS[task](chance) for _ in range(size)]
        answers = inject_constant(items, answer_items(items, 0.9, False, chance), name)
        detected += name in detect_fields(items, answers, training)
    return detected, repeats


def print_table(title: str, rows: Sequence[tuple[str, list[tuple[int, int]]]]) -> None:
    print(f"\n| {title} | {' | '.join(f'n = {size}' for size in SIZES)} |")
    print(f"|---|{'---|' * len(SIZES)}")
    for name, counts in rows:
        print(f"| {name} | {' | '.join(f'{count} of {total}' for count, total in counts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counting = (options.repeats, options.seed)
    rows = [(task, [count_false_alarms(task, size, *counting) for size in SIZES]) for task in TASKS]
    print_table("healthy task", rows)
    rows = []
    for task, name in INJECTED_CONSTANTS:
        counts = [count_constants(task, name, size, *counting) for size in SIZES]
        rows.append((f"{task}: {name or 'the answer'}", counts))
    print_table("injected constant", rows)


if __name__ == "__main__":
    main()
