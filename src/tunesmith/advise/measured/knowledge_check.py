"""Whether the base knows already what it would be taught.

    Subject -> Knowledge: of training answers, the share that is known highly, maybe, weakly, not at all

A training question is asked with other training rows as examples, SETS times, greedily and SAMPLED times at a
temperature. Known is what is contained in the answer: always under greedy choice (highly), sometimes (maybe), only
when sampled (weakly), never (unknown). The categories are SliCK's (Gekhman 2024), with fewer sets and samples; the
same work found that learning unknown facts teaches to make things up. Left out: answers that are no short facts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.prompting import answer_of, prompted
from tunesmith.advise.measured.run_arm import Subject, drawn, generated
from tunesmith.core.types import Example, Request
from tunesmith.evaluate.generate_until import answer_length, questions_of
from tunesmith.evaluate.intervals import wilson
from tunesmith.evaluate.text_metrics import contains

ROWS, SHOTS, SETS, SAMPLED, TEMPERATURE = 40, 4, 4, 4, 0.7
LONGEST_FACT, LEAST_DIFFERENT = 12, 0.5  # words of an answer; share of answers that differ from all others
LEVELS = ("highly", "maybe", "weakly", "unknown")


@dataclass(frozen=True)
class Knowledge:
    """`counts`: rows of each level; `share`: of rows whose answer is unknown, with its interval."""

    rows: int
    counts: dict[str, int]
    share: float
    low: float
    high: float
    sets: int = SETS
    sampled: int = SAMPLED


def no_facts(subject: Subject) -> str:
    """Why the training answers are no short facts; nothing if they are."""
    if subject.facts.schema is not None:
        return "answers follow a schema"
    answers = [answer_of(example).strip() for example in drawn(subject.rows, 0, 4 * ROWS)]
    if len(answers) <= SHOTS + 1:
        return f"{len(answers)} training rows"
    if statistics.median(len(answer.split()) for answer in answers) > LONGEST_FACT:
        return f"half of the answers have more than {LONGEST_FACT} words"
    if len(set(answers)) < LEAST_DIFFERENT * len(answers):
        return "many answers are alike, as labels are"
    return ""


def check_knowledge(subject: Subject, rows: int = ROWS) -> Knowledge:
    """Of the first `rows` training rows; the model is as it was before any training."""
    pool = drawn(subject.rows, 0, rows + SETS * SHOTS)
    asked, others = pool[:rows], pool[rows:]
    if len(others) < SHOTS:  # few rows: the others that are asked are shown
        asked, others = pool, pool
    greedy: Counter[int] = Counter()
    sampled: Counter[int] = Counter()
    for number in range(SETS):
        for place, right, by_chance in _answered(subject, asked, others, number):
            (sampled if by_chance else greedy)[place] += right
    levels = Counter(_level(greedy[place], sampled[place]) for place in range(len(asked)))
    low, high = wilson(levels["unknown"], len(asked))
    counts = {level: levels[level] for level in LEVELS}
    return Knowledge(len(asked), counts, levels["unknown"] / len(asked), low, high)


def _level(greedy: int, sampled: int) -> str:
    if greedy:
        return "highly" if greedy == SETS else "maybe"
    return "weakly" if sampled else "unknown"


def _answered(subject: Subject, asked: Sequence[Example], others: Sequence[Example], number: int):
    """(place of the row, whether its answer is right, whether it was drawn by chance)."""
    prompts = [prompted(example, _shown(others, number, example)) for example in asked]
    questions = questions_of(prompts, subject.facts.renderer)
    room = answer_length(questions)
    requests = [Request(question.prompt, room) for question in questions]
    for seed in range(SAMPLED):
        drawn_by = {"temperature": TEMPERATURE, "seed": 1000 * number + seed}
        requests += [Request(question.prompt, room, **drawn_by) for question in questions]
    subject.model.network.eval()
    for index, found in enumerate(generated(subject, requests)):
        place = index % len(questions)
        right = contains(found.text, questions[place].expected, None)
        yield place, int(right), index >= len(questions)


def _shown(others: Sequence[Example], number: int, example: Example) -> list[Example]:
    """SHOTS of the others, never the row itself."""
    turned = [others[(number * SHOTS + step) % len(others)] for step in range(SHOTS + 1)]
    return [other for other in turned if other.id != example.id][:SHOTS]
