"""Training state as files: trained weights, optimizer moments, position. No pickle.

In and out: a folder that core/run_dir.py writes atomically and verifies. The learning rate, the
order of rows and dropout are functions of the step, so no scheduler, sampler or random state is
stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as, read_json_object
from tunesmith.model.layer_shards import TrainedShard, cut_piece, get_complete_shape
from tunesmith.model.safetensors_io import write_tensors
from tunesmith.model.save import load_weights, name_state_file
from tunesmith.train.optimizer import MOMENTS, get_moments, restore_moments

TRAINER_STATE_FILE = "trainer_state.json"
WEIGHT = "weight"
PIECE_MOMENTS = ("exp_avg", "exp_avg_sq")  # those in 8 bits cannot be cut
STATES_IN_8_BITS = ("state1", "state2")
SCALES_OF_8_BITS = ("absmax1", "absmax2")
RESTORE_CHECKPOINT_FIX = "restore the checkpoint from a copy, or remove it to use an older one"


@dataclass(frozen=True)
class Updates:
    """How often the weights of a checkpoint were updated."""

    updates: NonNegativeInt


def write_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    layers: Sequence[TrainedShard] = (),
) -> None:
    """Write the state, with `layers` one file for each.

    Raise GateError if a weight or a moment is not finite, OSError if the disk refuses."""
    for number, tensors in enumerate(iter_state(parameters, optimizer, layers)):
        write_tensors(tensors, folder / name_state_file(number))
    updates = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    text = json.dumps({**position, "updates": updates}, indent=2)
    (folder / TRAINER_STATE_FILE).write_text(text + "\n", encoding="utf-8")


def iter_state(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    layers: Sequence[TrainedShard],
) -> Iterator[dict[str, Tensor]]:
    """Yield weights and moments under their names in a checkpoint. Where ranks hold `layers`
    together, `parameters` are pieces, and all ranks of a group iterate, layer by layer."""
    if not layers:
        tensors = {f"{WEIGHT}.{name}": p.detach() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            moments = get_moments(optimizer, parameter)
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        yield tensors
    names = {id(piece): name for name, piece in parameters.items()}
    for layer in layers:
        tensors: dict[str, Tensor] = {}
        for kind in (WEIGHT, *PIECE_MOMENTS):
            values = layer.gather_values(partial(_get_value, kind=kind, optimizer=optimizer))
            for index, tensor in values.items():
                tensors[f"{kind}.{names[id(layer.pieces[index])]}"] = tensor
        yield tensors


def _get_value(
    piece: nn.Parameter, *, kind: str, optimizer: torch.optim.Optimizer
) -> Tensor | None:
    return piece if kind == WEIGHT else get_moments(optimizer, piece).get(kind)


def read_state(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore weights and moments; return the position.

    Raise InputError if the folder belongs to another run, or lacks moments."""
    file = folder / TRAINER_STATE_FILE
    position = read_json_object(file, fix=RESTORE_CHECKPOINT_FIX, is_ours=True)
    updates = parse_as(Updates, position, where=str(file), fix=RESTORE_CHECKPOINT_FIX).updates
    tensors = load_weights(folder, parameters)
    for name, parameter in parameters.items():
        if not updates:
            optimizer.state.pop(parameter, None)
            continue
        moments = _select_moments(tensors, name, parameter, folder)
        if moments:
            restore_moments(optimizer, parameter, moments, updates)
        else:  # a weight that no step has updated
            optimizer.state.pop(parameter, None)
    return position


def _select_moments(
    tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter, folder: Path
) -> dict[str, Tensor]:
    """Return the moments of a weight. Raise InputError if one is missing, or of another shape."""
    moments = {
        moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors
    }
    has_8_bits = any(moment.dtype == torch.uint8 for moment in moments.values())
    is_complete = [scale in moments for scale in SCALES_OF_8_BITS] == 2 * [has_8_bits]
    for pair in (PIECE_MOMENTS, STATES_IN_8_BITS):
        shapes = [moments[moment].shape for moment in pair if moment in moments]
        is_complete = is_complete and shapes in ([], 2 * [get_complete_shape(parameter)])
    if not is_complete:
        message = f"the moments of {name} are incomplete, or of another shape"
        raise InputError(message, where=str(folder), fix=RESTORE_CHECKPOINT_FIX)
    return {moment: cut_piece(parameter, tensor) for moment, tensor in moments.items()}
