"""Run models on the path of a GPU, or of a CPU, and write what comes out.

    python gpu_path.py FILE CASE...     with TRITON_INTERPRET=1, CPU tensors take the path of a GPU

FILE holds the losses, gradients and updated weights of each case. In fp32 both paths compute the
same up to the order of sums; no case is in bf16, to which the interpreter truncates."""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from plan_configs import make_config
from tiny_models import (
    collate_documents,
    compute_mean_loss,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document
from tunesmith.model.adapters import find_lora_layers, get_trainable_parameters
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.optimizer import LossScale, make_optimizer, step_optimizer


def train(family: str, *, steps: int = 1, **settings: Any) -> dict[str, Tensor]:
    """Return the losses, the first gradients and the weights after an update."""
    model = make_tiny_model(family, backend="sdpa", **settings)
    is_gpu_path = os.environ.get("TRITON_INTERPRET") == "1"
    for layer in find_lora_layers(model.network).values():
        assert (layer.buffer is not None) == is_gpu_path
    model.network.train()
    batch = collate_documents(make_tiny_documents((5, 17, 9)))
    parameters = get_trainable_parameters(model.network)
    optimizer = make_optimizer(parameters.values(), weight_decay=0.01)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        loss = compute_mean_loss(model, batch, 20.0)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, parameter in parameters.items():
            if step == 0 and parameter.grad is not None:
                found[f"gradient {name}"] = parameter.grad.clone()
        step_optimizer(optimizer, 1e-3)
        optimizer.zero_grad()
    return found | {name: value.detach().clone() for name, value in parameters.items()}


def train_with_a_bad_step() -> dict[str, Tensor]:
    """Return the losses and the weights of three steps, the second of which is not finite."""
    model = make_tiny_model("llama", backend="sdpa")

    def load_documents(step: int) -> list[Document]:
        documents = make_tiny_documents((5, 17))
        if step == 2:
            nan_L = np.where(documents[0].weights_L, np.nan, 0).astype(np.float32)
            documents[0] = dataclasses.replace(documents[0], weights_L=nan_L)
        return documents

    loop = TrainingLoop(model, load_documents, make_config(), steps=3)
    found: dict[str, Tensor] = {}
    for event in loop:
        if isinstance(event, TrainStep):
            found[f"loss {event.step}"] = torch.tensor(event.loss)
    assert len(found) == 2, "the second step is refused"
    updates = {float(state["step"]) for state in loop.optimizer.state.values()}
    assert updates == {2.0}
    return found | {name: value.detach().clone() for name, value in loop.parameters.items()}


def train_with_an_overflow() -> dict[str, Tensor]:
    """Train in fp16; the first step is repeated until its gradients are finite. How often that is
    depends on how they are summed."""
    model = make_tiny_model("llama", torch.float16, backend="sdpa")
    documents = make_tiny_documents((5, 17))
    loop = TrainingLoop(model, lambda _step: documents, make_config(), steps=2)
    loop.loss_scale = LossScale(2.0**24)
    steps = [event for event in loop if isinstance(event, TrainStep)]
    updates = {float(state["step"]) for state in loop.optimizer.state.values()}
    assert (len(steps), updates) == (2, {2.0})
    assert all(bool(torch.isfinite(value).all()) for value in loop.parameters.values())
    return {"is repeated": torch.tensor(float(loop.loss_scale.overflows > 0))}


CASES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "llama": partial(train, "llama"),
    "qwen3": partial(train, "qwen3", gradient_checkpointing="full"),
    "granite": partial(train, "granite"),
    "gemma2": partial(train, "gemma2", gradient_checkpointing="selective"),
    "dora": partial(train, "llama", use_dora=True),
    "full": partial(train, "qwen3", method="full"),
    "bad step": train_with_a_bad_step,
    "overflow in fp16": train_with_an_overflow,
}


def main(file: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    for name in names:
        for key, tensor in CASES[name]().items():
            found[f"{name}: {key}"] = tensor.contiguous()
    save_file(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
