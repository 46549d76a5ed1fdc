"""What can be tried on the user's items: prompts, retrieval, a schema that is enforced, short
trainings.

    what there is -> every Arm, in the order in which they are worth their time

An Arm says how each item is asked and what is trained before; it is plain values, so it names its
result on disk. Arms that differ only in form and seed are one row of the table. Left out: running
them (asking.py), which fit (budget.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.advise.measured.prompting import SHOT_LAYOUTS

SHOT_COUNTS = (2, 4, 8)
TRAINING_SIZES = (25, 50, 100, 200, 400)
SEEDS = (0, 1, 2)
PASSAGE_COUNTS = (1, 3)
DEFAULT_SHOTS, DEFAULT_LAYOUT = 4, "turns"


@dataclass(frozen=True)
class Arm:
    """`seed`: which examples are shown or trained, and in which order."""

    shots: int = 0
    shot_layout: str = DEFAULT_LAYOUT
    seed: int = 0
    passages: int = 0
    is_constrained: bool = False
    examples: int = 0  # trained on, before asking

    @property
    def row_key(self) -> Arm:
        """What it has in common with others in its row of the table."""
        return dataclasses.replace(self, shot_layout=DEFAULT_LAYOUT, seed=0)

    @property
    def name(self) -> str:
        parts = [f"LoRA on {self.examples} examples"] if self.examples else []
        parts += [f"{self.shots} shots"] if self.shots else []
        parts += (
            [f"retrieval of {self.passages} passage{'s' * (self.passages > 1)}"]
            if self.passages
            else []
        )
        parts += ["schema enforced"] if self.is_constrained else []
        return ", ".join(parts) or "zero-shot"

    @property
    def variant(self) -> str:
        """What sets it apart within its row."""
        return f"{self.shot_layout}, seed {self.seed}" if self.shots else f"seed {self.seed}"

    @property
    def cost_key(self) -> tuple[bool, bool, int, bool, int, int]:
        """The order of cost: what must be trained after what must only be looked up, that after
        what must only be said, and there by how much."""
        return (
            bool(self.examples),
            bool(self.passages),
            self.shots,
            self.is_constrained,
            self.examples,
            self.passages,
        )


@dataclass(frozen=True)
class ArmOptions:
    """What there is to try with."""

    rows: int  # training rows that can be shown or trained
    has_documents: bool
    has_schema: bool


def build_arms(options: ArmOptions) -> list[Arm]:
    """Each once; the first are worth their time the most."""
    return [arm for arm in dict.fromkeys(_iter_arms()) if _is_possible(arm, options)]


def _iter_arms() -> Iterator[Arm]:
    single, several = PASSAGE_COUNTS
    yield from (
        Arm(),
        Arm(is_constrained=True),
        Arm(passages=several),
        Arm(shots=DEFAULT_SHOTS),
        Arm(passages=single),
    )
    yield from (
        Arm(examples=100),
        Arm(shots=DEFAULT_SHOTS, shot_layout="labelled"),
        Arm(examples=25),
    )
    yield from (
        Arm(shots=DEFAULT_SHOTS, passages=several),
        Arm(shots=DEFAULT_SHOTS, is_constrained=True),
    )
    yield Arm(shots=DEFAULT_SHOTS, passages=single)
    yield from (Arm(examples=50), Arm(examples=200))
    yield from (Arm(shots=shots) for shots in SHOT_COUNTS)
    yield from (Arm(examples=100, passages=several), Arm(examples=400))
    for seed in SEEDS:
        yield from (
            Arm(shots=DEFAULT_SHOTS, shot_layout=shot_layout, seed=seed)
            for shot_layout in SHOT_LAYOUTS
        )
        yield from (Arm(examples=examples, seed=seed) for examples in TRAINING_SIZES[:3])
    for seed in SEEDS:
        yield from (
            Arm(shots=shots, shot_layout=shot_layout, seed=seed)
            for shots in SHOT_COUNTS
            for shot_layout in SHOT_LAYOUTS
        )
        yield from (Arm(examples=examples, seed=seed) for examples in TRAINING_SIZES[3:])


def _is_possible(arm: Arm, options: ArmOptions) -> bool:
    return (
        arm.examples <= options.rows
        and arm.shots < max(1, options.rows)
        and (options.has_documents or not arm.passages)
        and (options.has_schema or not arm.is_constrained)
    )
