"""Networks that are built without weights and then filled: 4-bit models and truncated ones.

In: a model folder that `hub/resolve.py` has checked. `load_quantized` returns the stock network
with a QuantizedLinear for each linear but the head, loaded one tensor at a time, so the model is
never in memory in full precision; embeddings, head and norms are in `dtype`. It holds the
dequantised weights, so it is the oracle of a quantised run. Weights are quantised from the values
in the file, for any `dtype`. `build_truncated_network` returns the first layers with dummy weights,
to measure how long a step takes. Left out: the 4-bit format (frozen_weight.py), adapters."""

from __future__ import annotations

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

# of dummy weights: neither zero nor subnormal, which some processors multiply at another speed
FILL_VALUE = 0.01


class _EmptyOnMeta(TorchFunctionMode):
    """Creates the tensors of torch.empty, which are weights, without memory. Computed tables stay
    real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build_empty_network(
    folder: Path, dtype: torch.dtype, num_layers: int | None = None
) -> PreTrainedModel:
    """Build the stock network, or its first `num_layers`, without memory for weights."""
    with transformers_errors(folder), _EmptyOnMeta():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if num_layers is not None:
            config.num_hidden_layers = num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:num_layers]
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_quantized(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Load a network like `load_network`, with the decoder's linears in 4 bits.

    Raises InputError without bitsandbytes, for weights that do not match the config, and for NaN or
    infinite values."""
    import_bitsandbytes()
    check_weight_shapes(folder)
    network = build_empty_network(folder, dtype)
    linears = find_linears(network)
    for name, header in _list_parameters(network, folder):
        tensor = read_tensor(header).to(device)
        if find_nonfinite({name: tensor}):
            message = f"the tensor {name} holds NaN or infinite values"
            raise InputError(message, where=str(folder), fix="download the model again")
        path, _, tensor_name = name.rpartition(".")
        if tensor_name == "weight" and path in linears:
            layer = QuantizedLinear(tensor, linears[path].bias, dtype)
            replace_module(network, path, layer)
        else:
            setattr(network.get_submodule(path), tensor_name, nn.Parameter(tensor.to(dtype)))
    network.tie_weights()
    model: Any = network
    return model.to(device).eval().requires_grad_(False)


def _list_parameters(network: PreTrainedModel, folder: Path) -> list[tuple[str, TensorHeader]]:
    """Return every stored parameter and its header, file by file; a tied head is not stored.

    Biases come before weights, because a QuantizedLinear takes its bias along."""
    headers = read_headers(folder)
    stored: list[tuple[str, TensorHeader]] = []
    for name, _ in network.named_parameters():
        header = find_header(headers, name)
        if header is not None:
            stored.append((name, header))
    stored.sort(key=lambda entry: (entry[1].file, entry[0].endswith(".weight"), entry[1].begin))
    return stored


def build_truncated_network(
    folder: Path, dtype: torch.dtype, num_layers: int, *, is_quantized: bool
) -> PreTrainedModel:
    """Build the first `num_layers` with dummy weights. Only config.json is needed."""
    network = build_empty_network(folder, dtype, num_layers)
    quantized_linears = find_linears(network) if is_quantized else {}
    for name, parameter in list(network.named_parameters()):
        path, _, tensor_name = name.rpartition(".")
        weight = torch.full(parameter.shape, FILL_VALUE, dtype=dtype)
        if path not in quantized_linears:
            setattr(network.get_submodule(path), tensor_name, nn.Parameter(weight))
        elif tensor_name == "weight":
            replace_module(network, path, QuantizedLinear(weight, None, dtype))
    network.tie_weights()
    model: Any = network
    return model.eval().requires_grad_(False)


def find_quantized_weights(network: nn.Module) -> dict[str, NF4Weight]:
    """Return path -> 4-bit weight, with or without an adapter."""
    weights: dict[str, NF4Weight] = {}
    for path, module in network.named_modules():
        if isinstance(module, LoraLinear | QuantizedLinear) and isinstance(
            module.frozen, NF4Weight
        ):
            weights[path] = module.frozen
    return weights


def roundtrip_nf4(weight_OI: Tensor) -> Tensor:
    """Quantise a weight to 4 bits and return its dequantised values in fp32."""
    return NF4Weight(weight_OI, torch.float32).weight
