"""A run of the tests' model: its settings, its documents, and what it leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from plan_configs import make_config
from tiny_models import make_tiny_document
from tunesmith.core.events import Event, TrainStep
from tunesmith.core.types import Document
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.loop import TrainingLoop

STEPS = 6
SETTINGS = make_config(
    pack_length=60, learning_rate=2e-3, warmup_ratio=1 / 3, weight_decay=0.01, seed=5
)
LENGTHS = (5, 17, 1, 31, 17, 2, 13)


def make_step_documents(step: int) -> Sequence[Document]:
    """Other documents at every step."""
    return [make_tiny_document(length, 100 * step + place) for place, length in enumerate(LENGTHS)]


def copy_weights(model: PackedCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in get_trainable_parameters(model.network).items()}


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def select_steps(events: Sequence[Event]) -> list[TrainStep]:
    return [event for event in events if isinstance(event, TrainStep)]


def run_straight_and_resumed(
    fresh: Callable[[], TrainingLoop], folder: Path
) -> tuple[TrainingLoop, TrainingLoop]:
    """Two whole runs; the second was saved after three steps and went on in another object."""
    straight, first, second = fresh(), fresh(), fresh()
    list(straight)
    for _ in range(3):
        next(first)
    first.save(folder)
    second.restore(folder)
    list(second)
    return straight, second
