"""A run of the tests' model: its settings, its documents, and what it leaves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny import tiny_document
from tunesmith.model.adapters import trainable
from tunesmith.model.load import LanguageModel
from tunesmith.train.training import Settings
from tunesmith.types import Document, Event, StepResult

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
