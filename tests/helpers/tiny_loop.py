"""Settings and documents for training loops on the tiny model, and comparisons of their weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from plan_configs import make_config
from tiny_models import make_tiny_document
from tunesmith.core.events import Event, TrainStep
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms

STEPS = 6
SETTINGS = make_config(
    pack_length=60, learning_rate=2e-3, warmup_ratio=1 / 3, weight_decay=0.01, seed=5
)
LENGTHS = (5, 17, 1, 31, 17, 2, 13)


def make_step_documents(step: int) -> Sequence[Document]:
    """Return the documents of a step; each step has different ones."""
    return [make_tiny_document(length, 100 * step + i) for i, length in enumerate(LENGTHS)]


def compute_step(
    model: PackedCausalLM,
    documents: Sequence[Document],
    objective: LossConfig,
    pack_length: int = 10**6,
    *,
    share: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of one step and its gradients by parameter name."""
    normalizer = LossNormalizer.from_documents(documents)
    total = 0.0
    for pack in pack_step(documents, pack_length, should_share=share):
        terms = compute_step_terms(model, collate(pack), normalizer, objective).values()
        loss = torch.stack([term.coefficient * term.sum / term.count for term in terms]).sum()
        loss.backward()
        total += float(loss.detach())
    gradients = collect_gradients(model)
    model.network.zero_grad(set_to_none=True)
    return total, gradients


def collect_gradients(model: PackedCausalLM) -> dict[str, Tensor]:
    parameters = get_trainable_parameters(model.network)
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def copy_weights(model: PackedCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in get_trainable_parameters(model.network).items()}


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def select_steps(events: Sequence[Event]) -> list[TrainStep]:
    return [event for event in events if isinstance(event, TrainStep)]


def run_straight_and_resumed(
    make_loop: Callable[[], TrainingLoop], folder: Path
) -> tuple[TrainingLoop, TrainingLoop]:
    """Return two finished loops: an uninterrupted one, and one resumed after three steps."""
    straight = make_loop()
    list(straight)
    first = make_loop()
    for _ in range(3):
        next(first)
    first.save(folder)
    second = make_loop()
    second.restore(folder)
    list(second)
    return straight, second
