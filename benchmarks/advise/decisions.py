"""How often `advise --measure` advises wrongly: simulated answers with known truths.

    python -m benchmarks.advise.decisions [--repeats 200] [--write docs/results/advise-decisions.md]

An item is of one difficulty for all approaches, so that their answers correlate. Prompts come in 7
equal wordings. A third of the first items chooses, the others judge. From 20 items on, twice as
many each time answer until it is decided, as the command lets them while the minutes last."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.verdict import (
    choose_options,
    compute_width_factor,
    count_looks,
    make_decision,
    split_items,
)
from tunesmith.evaluate.results import MetricValues

WORDINGS = tuple(Arm(shots=4, seed=seed) for seed in range(7))
RETRIEVAL = Arm(passages=3)
LORA = Arm(examples=100)
FIRST_ITEMS = 20
MOST_ITEMS = (20, 50, 160, 640)
SHARED_DIFFICULTY = 0.5  # share of its variance that an item has in common for all approaches
NOT_SHOWN = ("prompt", "retrieval", "sft", "nothing")


@dataclass(frozen=True)
class Answers:
    """A grade is the mean over the parts of an answer; items of a group share their luck."""

    name: str
    parts: int = 1
    group_size: int = 1


BINARY = Answers("right or wrong")
GRADED = Answers("graded", parts=4)
GROUPED = Answers("groups of 4", group_size=4)


@dataclass(frozen=True)
class Case:
    """The truths, the target, and the conclusions that are wrong."""

    prompt: float
    lora: float
    wrong: tuple[str, ...]
    retrieval: float | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        retrieval = "" if self.retrieval is None else f"retrieval {self.retrieval:g}, "
        target = "" if self.target is None else f"; target {self.target:g}"
        return f"prompt {self.prompt:g}, {retrieval}LoRA {self.lora:g}{target}"


# at the margin or the target neither side is right
MARGIN_CASES = (
    Case(0.7, 0.8, NOT_SHOWN),
    Case(0.2, 0.3, NOT_SHOWN),
    Case(0.85, 0.95, NOT_SHOWN),
    Case(0.7, 0.8, NOT_SHOWN, retrieval=0.8),
    Case(0.6, 0.8, NOT_SHOWN, retrieval=0.7),
    Case(0.8, 0.8, NOT_SHOWN, target=0.8),
    Case(0.9, 0.9, NOT_SHOWN, target=0.9),
    Case(0.8, 0.95, ("prompt", "nothing"), target=0.8),
)
OTHER_CASES = (
    Case(0.7, 0.9, ("prompt", "nothing")),
    Case(0.7, 0.9, ("prompt", "nothing"), target=0.8),
    Case(0.85, 1.0, ("prompt", "nothing"), target=0.9),
    Case(0.7, 0.84, ("prompt", "nothing")),
    Case(0.7, 0.76, ("sft", "nothing")),
    Case(0.8, 0.8, ("sft", "nothing")),
    Case(0.95, 0.95, ("sft", "nothing")),
    Case(0.4, 0.9, ("prompt", "sft", "nothing"), retrieval=0.9),
    Case(0.4, 0.9, ("prompt", "retrieval", "nothing"), retrieval=0.6),
    Case(0.12, 0.12, ("sft", "nothing")),
)


def draw_grades(
    truths: dict[Arm, float], items: int, kind: Answers, random: np.random.Generator
) -> dict[Arm, np.ndarray]:
    """Return the grades of the items by arm, whose means over all items are the truths."""

    def draw(columns: int) -> np.ndarray:
        groups = random.standard_normal((items // kind.group_size + 1, columns))
        of_item = random.standard_normal((items, columns))
        share = 0.5 if kind.group_size > 1 else 0.0
        of_group = np.repeat(groups, kind.group_size, axis=0)[:items]
        return np.sqrt(share) * of_group + np.sqrt(1 - share) * of_item

    difficulty_N1 = np.sqrt(SHARED_DIFFICULTY) * draw(1)
    grades: dict[Arm, np.ndarray] = {}
    for arm, truth in truths.items():
        luck_NP = np.sqrt(1 - SHARED_DIFFICULTY) * draw(kind.parts)
        grades[arm] = (difficulty_N1 + luck_NP < ndtri(truth)).mean(axis=1)
    return grades


def simulate(
    case: Case, most_items: int, kind: Answers, random: np.random.Generator
) -> tuple[str, int]:
    """Return the conclusion of one measurement, and the items that it took."""
    truths = dict.fromkeys(WORDINGS, case.prompt) | {LORA: case.lora}
    if case.retrieval is not None:
        truths[RETRIEVAL] = case.retrieval
    ids = tuple(f"row:{n}" for n in range(most_items))
    groups = tuple(f"group:{n // kind.group_size}" for n in range(most_items))
    if kind.group_size == 1:
        groups = ()
    grades = draw_grades(truths, most_items, kind, random)
    items = FIRST_ITEMS
    looks = count_looks(items, most_items)
    choosing = split_items(ids[:items], groups[:items])
    while True:
        values: dict[Arm, MetricValues] = {}
        for arm, each in grades.items():
            shown = tuple(each[:items].tolist())
            values[arm] = MetricValues(
                "items", "exact_match", ids[:items], shown, groups=groups[:items]
            )
        options = choose_options(values, choosing)
        conclusion = make_decision(options, case.target, looks=looks).conclusion
        if conclusion != "undecided" or items >= most_items:
            return conclusion, items
        grades = {option.arm: grades[option.arm] for option in options}  # the others stop here
        items = min(2 * items, most_items)


def build_table(cases: tuple[Case, ...], repeats: int) -> str:
    lines = [
        "| truth | at most | answers | wrong | conclusions | items used |",
        "|---|---|---|---|---|---|",
    ]
    random = np.random.default_rng(0)
    for case in cases:
        for most_items in MOST_ITEMS:
            for kind in (BINARY, GRADED, GROUPED):
                runs = [simulate(case, most_items, kind, random) for _ in range(repeats)]
                counts = Counter(conclusion for conclusion, _ in runs)
                wrong = sum(counts[name] for name in case.wrong) / repeats
                shares = ", ".join(f"{name} {n / repeats:.1%}" for name, n in counts.most_common())
                used = np.mean([items for _, items in runs])
                lines.append(
                    f"| {case.name} | {most_items} | {kind.name} | {wrong:.1%} | {shares} | "
                    f"{used:.0f} |"
                )
    return "\n".join(lines)


def build_price_table() -> str:
    lines = ["| looks | width of an interval | items for the same width |", "|---|---|---|"]
    for looks in range(1, 8):
        factor = compute_width_factor(looks, degrees=100)
        lines.append(f"| {looks} | {factor:.2f} | {factor**2:.1f} |")
    return "\n".join(lines)


def build_page(repeats: int) -> str:
    command = f"python -m benchmarks.advise.decisions --repeats {repeats}"
    return (
        "# How often `advise --measure` is wrong\n\n"
        "By simulation with a margin of 0.1 and 7 equal wordings of the prompt; from 20 items on, "
        "twice as many until it is\ndecided, at most as many as the table says; 3 December 2026: "
        f"`{command}`.\n\n## At the margin or the target\n\nWhere the truth lies exactly there, "
        "any conclusion on it is wrong. With intervals for a\nsingle look, 20% were at 0.7 against "
        "0.8 with up to 640 items.\n\n"
        f"{build_table(MARGIN_CASES, repeats)}\n\n## Elsewhere\n\n"
        f"{build_table(OTHER_CASES, repeats)}\n\n## What repeated looks cost\n\n"
        "Against intervals for a single look:\n\n"
        f"{build_price_table()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    page = build_page(arguments.repeats)
    print(page)
    if arguments.write:
        arguments.write.write_text(page)


if __name__ == "__main__":
    main()
