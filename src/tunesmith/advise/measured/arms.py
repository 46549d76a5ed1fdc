"""What can be tried on the user's items: prompts, retrieval, a schema that is enforced, short trainings.

    what there is -> every Arm, in the order in which they are worth their time

An Arm says how each item is asked and what is trained before; it is plain values, so it names its result on disk. Arms
that differ only in form and seed are one row of the table. Left out: running them (asking.py), which fit (budget.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.advise.measured.prompting import FORMS

SHOTS = (2, 4, 8)
PROBES = (25, 50, 100, 200, 400)
SEEDS = (0, 1, 2)
PASSAGES = (1, 3)
USUAL_SHOTS, USUAL_FORM = 4, "turns"


@dataclass(frozen=True)
class Arm:
    """`seed`: which examples are shown or trained, and in which order."""

    shots: int = 0
    form: str = USUAL_FORM
    seed: int = 0
    passages: int = 0
    constrained: bool = False
    examples: int = 0  # trained on, before asking

    @property
    def row(self) -> Arm:
        """What it has in common with others in its row of the table."""
        return dataclasses.replace(self, form=USUAL_FORM, seed=0)

    @property
    def name(self) -> str:
        parts = [f"LoRA on {self.examples} examples"] if self.examples else []
        parts += [f"{self.shots} shots"] if self.shots else []
        parts += [f"retrieval of {self.passages} passage{'s' * (self.passages > 1)}"] if self.passages else []
        parts += ["schema enforced"] if self.constrained else []
        return ", ".join(parts) or "zero-shot"

    @property
    def variant(self) -> str:
        """What sets it apart within its row."""
        return f"{self.form}, seed {self.seed}" if self.shots else f"seed {self.seed}"

    @property
    def effort(self) -> tuple[bool, bool, int, bool, int, int]:
        """The order of cost: what must be trained after what must only be looked up, that after what must only be
        said, and there by how much."""
        return bool(self.examples), bool(self.passages), self.shots, self.constrained, self.examples, self.passages


@dataclass(frozen=True)
class Given:
    """What there is to try with."""

    rows: int  # training rows that can be shown or trained
    documents: bool
    schema: bool


def arms_of(given: Given) -> list[Arm]:
    """Each once; the first are worth their time the most."""
    return [arm for arm in dict.fromkeys(_in_turn()) if _possible(arm, given)]


def _in_turn() -> Iterator[Arm]:
    one, several = PASSAGES
    yield from (Arm(), Arm(constrained=True), Arm(passages=several), Arm(shots=USUAL_SHOTS), Arm(passages=one))
    yield from (Arm(examples=100), Arm(shots=USUAL_SHOTS, form="labelled"), Arm(examples=25))
    yield from (Arm(shots=USUAL_SHOTS, passages=several), Arm(shots=USUAL_SHOTS, constrained=True))
    yield Arm(shots=USUAL_SHOTS, passages=one)
    yield from (Arm(examples=50), Arm(examples=200))
    yield from (Arm(shots=shots) for shots in SHOTS)
    yield from (Arm(examples=100, passages=several), Arm(examples=400))
    for seed in SEEDS:
        yield from (Arm(shots=USUAL_SHOTS, form=form, seed=seed) for form in FORMS)
        yield from (Arm(examples=examples, seed=seed) for examples in PROBES[:3])
    for seed in SEEDS:
        yield from (Arm(shots=shots, form=form, seed=seed) for shots in SHOTS for form in FORMS)
        yield from (Arm(examples=examples, seed=seed) for examples in PROBES[3:])


def _possible(arm: Arm, given: Given) -> bool:
    return (
        arm.examples <= given.rows
        and arm.shots < max(1, given.rows)
        and (given.documents or not arm.passages)
        and (given.schema or not arm.constrained)
    )
