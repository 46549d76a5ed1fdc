"""The first layers of a model with made-up weights: as fast as the real ones, and nothing to say.

In: a model folder, of which config.json is enough. Out: the stock network with fewer layers. For
measuring how long a step takes before there are weights, or without waiting for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.model.adapters import find_linears, replace_module
from tunesmith.model.lora import QuantizedLinear
from tunesmith.model.quantization import build_empty_network

# of every weight: neither zero nor subnormal, which some processors multiply at another speed
FILL_VALUE = 0.01


def build_truncated_network(
    folder: Path, dtype: torch.dtype, num_layers: int, *, is_quantized: bool
) -> PreTrainedModel:
    """`layers` of them, in 4 bits if `quantized`."""
    network = build_empty_network(folder, dtype, num_layers)
    quantized_linears = find_linears(network) if is_quantized else {}
    for name, parameter in list(network.named_parameters()):
        path, _, tensor_name = name.rpartition(".")
        weight = torch.full(parameter.shape, FILL_VALUE, dtype=dtype)
        if tensor_name == "weight" and path in quantized_linears:
            replace_module(network, path, QuantizedLinear(weight, None, dtype))
        elif path not in quantized_linears:
            setattr(network.get_submodule(path), tensor_name, nn.Parameter(weight))
    network.tie_weights()
    model: Any = network
    return model.eval().requires_grad_(False)
