"""Training state as files: trained weights, optimizer moments, position. No pickle.

In and out: a folder that core/run_dir.py writes atomically and verifies. The learning rate, the
order of rows and dropout are functions of the step, so no scheduler, sampler or random state is
stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.safetensors_io import write_tensors
from tunesmith.model.save import STATE_FILE, load_weights
from tunesmith.train.optimizer import MOMENTS, get_moments, restore_moments

TRAINER_STATE_FILE = "trainer_state.json"


def write_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
) -> None:
    """Write the state.

    Raise GateError if a weight or a moment is not finite, OSError if the disk refuses."""
    tensors: dict[str, Tensor] = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    updates = 0
    for name, parameter in parameters.items():
        moments = get_moments(optimizer, parameter)
        if moments:
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
            updates = int(optimizer.state[parameter]["step"])
    write_tensors(tensors, folder / STATE_FILE)
    text = json.dumps({**position, "updates": updates}, indent=2)
    (folder / TRAINER_STATE_FILE).write_text(text + "\n", encoding="utf-8")


def read_state(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore weights and moments; return the position.

    Raise InputError if the folder belongs to another run."""
    tensors = load_weights(folder, parameters)
    position = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    for name, parameter in parameters.items():
        if not position["updates"]:
            optimizer.state.pop(parameter, None)
            continue
        moments = {
            moment: tensors[f"{moment}.{name}"]
            for moment in MOMENTS
            if f"{moment}.{name}" in tensors
        }
        restore_moments(optimizer, parameter, moments, position["updates"])
    return position
