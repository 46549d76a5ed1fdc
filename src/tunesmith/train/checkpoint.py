"""The state of a run as files: trained weights, the optimizer's moments, the position. No pickle.

In and out: a folder that runfolder.py writes atomically and verifies. The learning rate, the order
of rows and dropout are functions of the step, so no state of a scheduler, a sampler or a random
generator has to be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.safetensors_io import write_tensors
from tunesmith.model.save import STATE_FILE, load_weights
from tunesmith.train.optimizer import MOMENTS, get_moments, restore_moments

POSITION_FILE = "position.json"


def write_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
) -> None:
    """Raises GateError when a weight or a moment is not finite, OSError when the disk refuses."""
    tensors: dict[str, Tensor] = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    updates = 0
    for name, parameter in parameters.items():
        if moment_tensors := get_moments(optimizer, parameter):
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in moment_tensors.items()}
            updates = int(optimizer.state[parameter]["step"])
    write_tensors(tensors, folder / STATE_FILE)
    text = json.dumps({**position, "updates": updates}, indent=2)
    (folder / POSITION_FILE).write_text(text + "\n", encoding="utf-8")


def read_state(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Puts weights and moments back; returns the position. Raises InputError when the folder is of
    another run."""
    tensors, position = (
        load_weights(folder, parameters),
        json.loads((folder / POSITION_FILE).read_text(encoding="utf-8")),
    )
    for name, parameter in parameters.items():
        moment_tensors = {
            moment: tensors[key] for moment in MOMENTS if (key := f"{moment}.{name}") in tensors
        }
        if position["updates"]:
            restore_moments(optimizer, parameter, moment_tensors, position["updates"])
        else:
            optimizer.state.pop(parameter, None)
    return position
