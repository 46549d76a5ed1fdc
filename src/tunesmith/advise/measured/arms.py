"""List what can be tried on the user's items: prompts, retrieval, a schema, a base, trainings.

    ArmOptions -> every Arm, the most useful first

An Arm says how each item is prompted and what is trained before; it holds plain values, so it is
the key of its result on disk. Arms that differ only in shot layout and seed share a row of the
table. Left out: running them (run_arm.py) and which fit in the time (experiment.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product

from tunesmith.advise.measured.prompting import SHOT_LAYOUTS

SHOT_COUNTS = (2, 4, 8)
TRAINING_SIZES = (25, 50, 100, 200, 400)
SEEDS = (0, 1, 2)
PASSAGE_COUNTS = (1, 3)
DEFAULT_SHOTS = 4
DEFAULT_LAYOUT = "turns"


@dataclass(frozen=True)
class Arm:
    """A way to answer the items; `seed` picks and orders the rows that are shown or trained on."""

    shots: int = 0
    shot_layout: str = DEFAULT_LAYOUT
    seed: int = 0
    passages: int = 0
    is_constrained: bool = False
    examples: int = 0  # rows to train on first
    base: str = ""  # another model that answers

    @property
    def row_key(self) -> Arm:
        """The arm without shot layout and seed, which identifies its row of the table."""
        return dataclasses.replace(self, shot_layout=DEFAULT_LAYOUT, seed=0)

    @property
    def name(self) -> str:
        parts: list[str] = []
        if self.examples:
            parts.append(f"LoRA on {self.examples} examples")
        if self.shots:
            parts.append(f"{self.shots} shots")
        if self.passages:
            parts.append(f"retrieval of {self.passages} passage{'s' * (self.passages > 1)}")
        if self.is_constrained:
            parts.append("schema enforced")
        name = ", ".join(parts) or "zero-shot"
        return f"{self.base}: {name}" if self.base else name

    @property
    def variant(self) -> str:
        """Name the arm among those of its row."""
        return f"{self.shot_layout}, seed {self.seed}" if self.shots else f"seed {self.seed}"

    @property
    def label(self) -> str:
        return f"{self.name} ({self.variant})" if self.shots else self.name

    @property
    def cost_key(self) -> tuple[bool, bool, bool, int, bool, int, int]:
        """Sort key by cost: training over another base over retrieval over prompting, then by
        amount."""
        return (
            bool(self.examples),
            bool(self.base),
            bool(self.passages),
            self.shots,
            self.is_constrained,
            self.examples,
            self.passages,
        )


@dataclass(frozen=True)
class ArmOptions:
    """The rows, documents, schema and other base model that arms can use."""

    rows: int  # training rows that can be shown or trained on
    has_documents: bool
    has_schema: bool
    base: str = ""


def build_arms(options: ArmOptions) -> list[Arm]:
    """Return each possible arm once, the most useful first."""
    return [arm for arm in dict.fromkeys(_list_arms(options.base)) if _is_possible(arm, options)]


def _list_arms(base: str) -> list[Arm]:
    single, several = PASSAGE_COUNTS
    arms = [
        Arm(),
        Arm(base=base),
        Arm(is_constrained=True),
        Arm(passages=several),
        Arm(shots=DEFAULT_SHOTS),
        Arm(shots=DEFAULT_SHOTS, base=base),
        Arm(passages=single),
        Arm(examples=100),
        Arm(shots=DEFAULT_SHOTS, shot_layout="labelled"),
        Arm(examples=25),
        Arm(shots=DEFAULT_SHOTS, passages=several),
        Arm(shots=DEFAULT_SHOTS, is_constrained=True),
        Arm(shots=DEFAULT_SHOTS, passages=single),
        Arm(examples=50),
        Arm(examples=200),
        *(Arm(shots=shots) for shots in SHOT_COUNTS),
        Arm(examples=100, passages=several),
        Arm(examples=400),
    ]
    for seed in SEEDS:
        arms += [Arm(shots=DEFAULT_SHOTS, shot_layout=name, seed=seed) for name in SHOT_LAYOUTS]
        arms += [Arm(examples=examples, seed=seed) for examples in TRAINING_SIZES[:3]]
        arms.append(Arm(shots=DEFAULT_SHOTS, shot_layout="labelled", seed=seed, base=base))
    for seed in SEEDS:
        for shots, name in product(SHOT_COUNTS, SHOT_LAYOUTS):
            arms.append(Arm(shots=shots, shot_layout=name, seed=seed))
        arms += [Arm(examples=examples, seed=seed) for examples in TRAINING_SIZES[3:]]
    return arms


def _is_possible(arm: Arm, options: ArmOptions) -> bool:
    return (
        arm.examples <= options.rows
        and arm.shots < max(1, options.rows)
        and (options.has_documents or not arm.passages)
        and (options.has_schema or not arm.is_constrained)
    )
