"""Compare a saved adapter with the one in memory, which was trained and is measured.

In: the network, and the folder that `save_adapter` wrote. Out: nothing, or GateError with the layer
that differs. The scores of a run are those of the network in memory, and whoever serves the adapter
reads the files: a factor that training applies and adapter_config.json does not say, or a tensor
that was written otherwise, would be in no score. Left out: whether other libraries read the files
in the same way (export/parity.py, `tunesmith verify`).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from tunesmith.core.errors import GateError
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.hub.adapter_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    ALPHA_PATTERN,
    RANK_PATTERN,
    compute_scaling,
)
from tunesmith.model.hub.validate import read_model_json
from tunesmith.model.save import collect_adapter_tensors, read_adapter_tensors

WHERE = "adapter"  # the folder has a temporary name until it is complete
FIX = "no adapter was written; please report this"
MAX_SCALE_ERROR = 1e-6  # relative: rounding of a division and a root


def check_saved_adapter(network: nn.Module, folder: Path) -> None:
    """Raise GateError unless the files in `folder` are the adapter of `network`, at its scale."""
    _check_scales(network, folder)
    expected = collect_adapter_tensors(network)
    stored = read_adapter_tensors(folder / ADAPTER_WEIGHTS_FILE)
    if names := sorted(expected.keys() ^ stored.keys()):
        raise GateError(f"the saved adapter differs in {names[0]}", where=WHERE, fix=FIX)
    for name, tensor in expected.items():
        if not torch.equal(stored[name], tensor):
            message = f"the saved adapter has another {name} than the trained one"
            raise GateError(message, where=WHERE, fix=FIX)


def _check_scales(network: nn.Module, folder: Path) -> None:
    """Compare the scale of each adapted layer with that of adapter_config.json. Layers that a
    pattern of it may name are left out."""
    config = read_model_json(folder / ADAPTER_CONFIG_FILE)
    if config.get(RANK_PATTERN) or config.get(ALPHA_PATTERN):
        return
    scale = compute_scaling(
        config["r"], config["lora_alpha"], use_rslora=bool(config.get("use_rslora"))
    )
    for path, layer in find_lora_layers(network).items():
        if not math.isclose(layer.scale, scale, rel_tol=MAX_SCALE_ERROR):
            message = (
                f"{path} was trained and measured with an adapter scale of {layer.scale:g}, but "
                f"{ADAPTER_CONFIG_FILE} says {scale:g}"
            )
            raise GateError(message, where=WHERE, fix=FIX)
