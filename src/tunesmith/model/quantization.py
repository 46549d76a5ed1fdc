"""A model whose decoder's matrices are in 4 bits, loaded tensor by tensor: never all of it in full precision.

In: a model folder that source.resolve has checked. Out: the stock network with a QuantizedLinear for each linear but
the head; embeddings, head and norms are in `dtype`. It is the stock model that holds the dequantised weights, so it is
the oracle of a quantised run. Weights are quantised from the values in the file, whatever `dtype` is. Left out: the
format (frozen.py), adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.core.errors import InputError
from tunesmith.model.adapters import linears, replace
from tunesmith.model.frozen_weight import Nf4, bitsandbytes
from tunesmith.model.hub.check_weights import check_fit, header_of, its_errors
from tunesmith.model.hub.validate import TensorHeader, read_headers
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.safetensors_io import first_not_finite, read_tensor


class _Weightless(TorchFunctionMode):
    """What is made with torch.empty has no memory: weights. Tables are computed, and stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def skeleton(folder: Path, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The stock network without its weights, or its first `layers`."""
    with its_errors(folder), _Weightless():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_quantized(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """As `load_network`, with the decoder's linears in 4 bits. Raises InputError without bitsandbytes, for weights that
    are not those of the config, and for values that are not finite."""
    bitsandbytes()
    check_fit(folder)
    network = skeleton(folder, dtype)
    small = linears(network)
    for name, header in _places(network, folder):
        tensor = read_tensor(header).to(device)
        if first_not_finite({name: tensor}):
            raise InputError(f"the tensor {name} holds values that are not finite", where=str(folder))
        path, _, last = name.rpartition(".")
        if last == "weight" and path in small:
            replace(network, path, QuantizedLinear(tensor, small[path].bias, dtype))
        else:
            setattr(network.get_submodule(path), last, nn.Parameter(tensor.to(dtype)))
    network.tie_weights()
    placed: Any = network
    return placed.to(device).eval().requires_grad_(False)


def _places(network: PreTrainedModel, folder: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Every parameter and where it lies, file by file; a tied head lies nowhere. Biases come before their weights,
    which take them along."""
    headers = read_headers(folder)
    found = [(name, header_of(headers, name)) for name, _ in network.named_parameters()]
    here = [(name, header) for name, header in found if header is not None]
    return iter(sorted(here, key=lambda place: (place[1].file, place[0].endswith(".weight"), place[1].begin)))


def quantized_weights(network: nn.Module) -> dict[str, Nf4]:
    """Path -> weight in 4 bits, with or without an adapter beside it."""
    layers = {path: m for path, m in network.named_modules() if isinstance(m, LoraLinear | QuantizedLinear)}
    return {path: layer.frozen for path, layer in layers.items() if isinstance(layer.frozen, Nf4)}


def dequantized(weight_OI: Tensor) -> Tensor:
    """What is left of a weight after it was quantised, in fp32."""
    return Nf4(weight_OI, torch.float32).weight
