"""A run of the tests' model: its settings, its documents, and what it leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tiny import tiny_document
from tunesmith.core.events import Event, StepResult
from tunesmith.core.types import Document
from tunesmith.model.adapters import trainable
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.train.loop import Settings, Training

SETTINGS = Settings(
    steps=6,
    pack_length=60,
    learning_rate=2e-3,
    warmup_steps=2,
    schedule="linear",
    weight_decay=0.01,
    max_grad_norm=1.0,
    seed=5,
)
LENGTHS = (5, 17, 1, 31, 17, 2, 13)


def documents_of(step: int) -> Sequence[Document]:
    """Other documents at every step."""
    return [tiny_document(length, 100 * step + place) for place, length in enumerate(LENGTHS)]


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model.network).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(events: Sequence[Event]) -> list[StepResult]:
    return [event for event in events if isinstance(event, StepResult)]


def straight_and_resumed(fresh: Callable[[], Training], folder: Path) -> tuple[Training, Training]:
    """Two whole runs; the second was saved after three steps and went on in another object."""
    straight, first, second = fresh(), fresh(), fresh()
    list(straight)
    for _ in range(3):
        next(first)
    first.save(folder)
    second.restore(folder)
    list(second)
    return straight, second
