"""The first layers of a model with made-up weights: as fast as the real ones, and nothing to say.

In: a model folder, of which config.json is enough. Out: the stock network with fewer layers. For measuring how long a
step takes before there are weights, or without waiting for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.model.adapters import linears, replace
from tunesmith.model.lora import QuantizedLinear
from tunesmith.model.quantization import skeleton

VALUE = 0.01  # of every weight: neither zero nor subnormal, which some processors multiply at another speed


def part_of(folder: Path, dtype: torch.dtype, layers: int, *, quantized: bool) -> PreTrainedModel:
    """`layers` of them, in 4 bits if `quantized`."""
    network = skeleton(folder, dtype, layers)
    small = linears(network) if quantized else {}
    for name, parameter in list(network.named_parameters()):
        path, _, last = name.rpartition(".")
        made = torch.full(parameter.shape, VALUE, dtype=dtype)
        if last == "weight" and path in small:
            replace(network, path, QuantizedLinear(made, None, dtype))
        elif path not in small:
            setattr(network.get_submodule(path), last, nn.Parameter(made))
    network.tie_weights()
    placed: Any = network
    return placed.eval().requires_grad_(False)
