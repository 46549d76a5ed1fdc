"""A model whose decoder's matrices are in 4 bits, loaded tensor by tensor: never all of it in full
precision.

In: a model folder that source.resolve has checked. Out: the stock network with a QuantizedLinear
for each linear but the head; embeddings, head and norms are in `dtype`. It is the stock model that
holds the dequantised weights, so it is the oracle of a quantised run. Weights are quantised from
the values in the file, whatever `dtype` is. Left out: the format (frozen.py), adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.core.errors import InputError
from tunesmith.model.adapters import find_linears, replace_module
from tunesmith.model.frozen_weight import NF4Weight, import_bitsandbytes
from tunesmith.model.hub.check_weights import check_weight_shapes, find_header, transformers_errors
from tunesmith.model.hub.validate import TensorHeader, read_headers
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.safetensors_io import find_nonfinite, read_tensor


class _EmptyOnMeta(TorchFunctionMode):
    """What is made with torch.empty has no memory: weights. Tables are computed, and stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def build_empty_network(
    folder: Path, dtype: torch.dtype, num_layers: int | None = None
) -> PreTrainedModel:
    """The stock network without its weights, or its first `layers`."""
    with transformers_errors(folder), _EmptyOnMeta():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if num_layers is not None:
            config.num_hidden_layers = num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:num_layers]
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_quantized(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """As `load_network`, with the decoder's linears in 4 bits. Raises InputError without
    bitsandbytes, for weights that are not those of the config, and for values that are not
    finite."""
    import_bitsandbytes()
    check_weight_shapes(folder)
    network = build_empty_network(folder, dtype)
    decoder_linears = find_linears(network)
    for name, header in _iter_parameters(network, folder):
        tensor = read_tensor(header).to(device)
        if find_nonfinite({name: tensor}):
            raise InputError(
                f"the tensor {name} holds values that are not finite", where=str(folder)
            )
        path, _, tensor_name = name.rpartition(".")
        if tensor_name == "weight" and path in decoder_linears:
            replace_module(
                network, path, QuantizedLinear(tensor, decoder_linears[path].bias, dtype)
            )
        else:
            setattr(network.get_submodule(path), tensor_name, nn.Parameter(tensor.to(dtype)))
    network.tie_weights()
    model: Any = network
    return model.to(device).eval().requires_grad_(False)


def _iter_parameters(network: PreTrainedModel, folder: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Every parameter and where it lies, file by file; a tied head lies nowhere. Biases come before
    their weights, which take them along."""
    headers = read_headers(folder)
    candidates = [(name, find_header(headers, name)) for name, _ in network.named_parameters()]
    stored = [(name, header) for name, header in candidates if header is not None]
    return iter(
        sorted(
            stored, key=lambda entry: (entry[1].file, entry[0].endswith(".weight"), entry[1].begin)
        )
    )


def find_quantized_weights(network: nn.Module) -> dict[str, NF4Weight]:
    """Path -> weight in 4 bits, with or without an adapter beside it."""
    layers = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, LoraLinear | QuantizedLinear)
    }
    return {
        path: layer.frozen for path, layer in layers.items() if isinstance(layer.frozen, NF4Weight)
    }


def roundtrip_nf4(weight_OI: Tensor) -> Tensor:
    """What is left of a weight after it was quantised, in fp32."""
    return NF4Weight(weight_OI, torch.float32).weight
