"""Training loops that the tests of several ranks run in processes of their own."""

import dataclasses
from typing import Any

import numpy as np
import torch

from tiny_loop import SETTINGS, make_step_documents, select_steps
from tiny_models import continue_document, make_tiny_document, make_tiny_model
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import Document
from tunesmith.train.loop import TrainingLoop

STEPS = 20
KINDS = ("rows", "prefixes", "pairs", "full", "accumulated")


def make_documents(kind: str, step: int) -> list[Document]:
    if kind == "prefixes":  # two prompts, each with several answers
        documents: list[Document] = []
        for prompt_length in (40, 25):
            prompt = make_tiny_document(prompt_length, step)
            for seed in range(4):
                documents.append(continue_document(prompt, prompt_length, 5 + 3 * seed, seed))
        return documents
    documents = list(make_step_documents(step))
    if kind != "pairs":
        return documents
    pairs: list[Document] = []
    for number, document in enumerate(documents):
        rejected = make_tiny_document(4 + number, 100 * step + 50 + number)
        for side, one in (("chosen", document), ("rejected", rejected)):
            pairs.append(dataclasses.replace(one, id=f"{step}.{number}", side=side))
    return pairs


def make_loop(ranks: Ranks, kind: str) -> TrainingLoop:
    changes: dict[str, Any] = {"pack_length": 200}
    if kind == "accumulated":
        changes = {"pack_length": 20}
    if kind == "prefixes":
        changes["share_prefixes"] = True
    if kind == "pairs":
        changes |= {"loss": "simpo", "beta": 2.0, "gamma": 0.5, "nll_coefficient": 0.1}
    model = make_tiny_model(method="full" if kind == "full" else "lora")
    return TrainingLoop(
        model,
        lambda step: make_documents(kind, step),
        dataclasses.replace(SETTINGS, **changes),
        steps=STEPS,
        ranks=ranks,
    )


def train_loop(ranks: Ranks, kind: str) -> tuple[list[float], list[tuple[int, int]], np.ndarray]:
    """Return losses, counts of tokens, and the final weights. Every rank iterates by itself."""
    training = make_loop(ranks, kind)
    ranks.send = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    steps = select_steps(list(training))
    weights = torch.cat([p.detach().flatten() for p in training.parameters.values()]).numpy()
    counts = [(step.tokens, step.supervised_tokens) for step in steps]
    return [step.loss for step in steps], counts, weights
