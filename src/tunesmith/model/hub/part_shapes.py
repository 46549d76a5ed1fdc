"""The sizes of the parts of a model's layers, from which memory and time are predicted.

In: one header per parameter, and the text part of config.json. Out: PartShapes by the words of
`lora_target_modules` (target_modules.py), the NormShape, and the RecurrentShape of layers that
carry a state; the modules in model/mixers read the same numbers from the weights (a test compares
both). Left out: what is made of them (plan/memory.py)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.model_spec import NormShape, PartShape, RecurrentShape
from tunesmith.model.hub.stored_tensors import TRANSPOSED_STACKS
from tunesmith.model.hub.validate import TensorHeader
from tunesmith.model.target_modules import (
    ATTENTION,
    EXPERTS,
    ROUTER,
    find_layer,
    find_part,
    has_adapter_format,
    is_linear_weight,
    is_norm,
)

# linears and stacked experts whose output has the hidden size; the others read the hidden states
OUTPUT_LINEARS = {
    *("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2"),
    *("w2", "output_linear", "dense_4h_to_h", "fc2_latent_proj"),
}

# norms of each head, whose weights are shared by the heads
QUERY_NORMS = {"q_norm", "q_layernorm", "query_layernorm"}
KEY_NORMS = {"k_norm", "k_layernorm", "key_layernorm"}
GATED_NORMS = {"norm", "o_norm"}  # of the output of a recurrent mixer

# mixer -> size -> the names that it has in configs
RECURRENT_SIZES = {
    "delta": {
        "num_groups": ("linear_num_key_heads",),
        "num_heads": ("linear_num_value_heads",),
        "key_size": ("linear_key_head_dim",),
        "value_size": ("linear_value_head_dim",),
        "num_taps": ("linear_conv_kernel_dim",),
    },
    "mamba2": {
        "num_groups": ("mamba_n_groups", "n_groups"),
        "num_heads": ("mamba_n_heads", "mamba_num_heads"),
        "key_size": ("mamba_d_state", "ssm_state_size"),
        "value_size": ("mamba_d_head", "mamba_head_dim"),
        "num_taps": ("mamba_d_conv", "conv_kernel"),
    },
    "conv": {"num_channels": ("hidden_size",), "num_taps": ("conv_L_cache",)},
}
# the activation after the convolutions of delta and mamba2
SILU_NAMES = ("silu", "swish")


def measure_parts(
    headers: Mapping[str, TensorHeader],
    model_type: str,
    num_experts_per_token: int = 0,
) -> dict[str, PartShape]:
    """Return part of the layers -> its shape. Routers belong to none; linears that PEFT could not
    adapt have no inputs and outputs."""
    shapes: dict[str, list[PartShape]] = defaultdict(list)
    for name, tensor in headers.items():
        path = name.removesuffix(".weight")
        part = find_part(path)
        layer = find_layer(name)
        is_linear = is_linear_weight(name, tensor)
        is_stack = part == EXPERTS and len(tensor.shape) == 3
        if layer is None or part == ROUTER or not (is_linear or is_stack):
            continue
        shape = _measure_matrices(path, tensor.shape, model_type, num_experts_per_token)
        values = shape.inner_outputs + shape.inner_inputs
        shapes[part].append(replace(shape, layer_values={layer.number: values}))
    return {part: _sum_shapes(shapes[part]) for part in shapes}


def _sum_shapes(shapes: Sequence[PartShape]) -> PartShape:
    layer_values = Counter[int]()
    for shape in shapes:
        layer_values.update(shape.layer_values)
    return PartShape(
        layer_values=dict(sorted(layer_values.items())),
        inputs=sum(shape.inputs for shape in shapes),
        outputs=sum(shape.outputs for shape in shapes),
        inner_outputs=sum(shape.inner_outputs for shape in shapes),
        inner_inputs=sum(shape.inner_inputs for shape in shapes),
    )


def _measure_matrices(
    path: str, shape: tuple[int, ...], model_type: str, num_experts_per_token: int
) -> PartShape:
    """Measure a linear [O, I], or the stacked experts of a layer, [E, O, I] or [E, I, O]."""
    is_stack = len(shape) == 3
    count, outputs, inputs = shape if is_stack else (1, *shape)
    if is_stack and model_type in TRANSPOSED_STACKS:
        outputs, inputs = inputs, outputs
    is_output = path.rpartition(".")[2] in OUTPUT_LINEARS
    can_adapt = is_stack or has_adapter_format(path, model_type)
    active = num_experts_per_token if is_stack else 1
    return PartShape(
        layer_values={},
        inputs=count * inputs if can_adapt else 0,
        outputs=count * outputs if can_adapt else 0,
        inner_outputs=0 if is_output else active * outputs,
        inner_inputs=active * inputs if is_output else 0,
    )


def measure_norms(headers: Mapping[str, TensorHeader], model_type: str) -> NormShape:
    """Return what the norms of all layers read, apart from those that norm a mixer's output."""
    hidden = 0
    inner_values = 0
    for name, tensor in headers.items():
        module, _, norm = name.removesuffix(".weight").rpartition(".")
        is_weight = name.endswith(".weight") and len(tensor.shape) in (1, 2)
        if not is_weight or not is_norm(norm) or find_layer(name) is None:
            continue
        if module.rpartition(".")[2].isdecimal():  # the layer itself
            hidden += 1
        elif norm in QUERY_NORMS:
            inner_values += _find_width(headers, module, OUTPUT_LINEARS, axis=1)
        elif norm in KEY_NORMS:
            # Gemma 4 also norms the values, without a weight
            num_norms = 2 if model_type.startswith("gemma4") else 1
            fused_size = _find_width(headers, module, {"query_key_value"}, axis=0)
            size = _find_width(headers, module, {"k_proj"}, axis=0) or fused_size // 3
            inner_values += num_norms * size
        elif norm not in GATED_NORMS:
            inner_values += tensor.shape[0]
    return NormShape(hidden, inner_values)


def _find_width(
    headers: Mapping[str, TensorHeader], module: str, linears: set[str], *, axis: int
) -> int:
    """Return a width of the linear of a module that has one of these names, 0 without one."""
    for linear in linears:
        tensor = headers.get(f"{module}.{linear}.weight")
        if tensor is not None and len(tensor.shape) == 2:
            return tensor.shape[axis]
    return 0


def count_cache_values(
    headers: Mapping[str, TensorHeader], num_attention_layers: int, kv_size: int
) -> int:
    """Return the values of the keys and values of all attention layers for one token.

    A layer without keys of its own stores those of another with queries as wide (Gemma 4); one
    whose projections have other names (fused, latent) has `kv_size` values each."""
    queries: dict[str, int] = {}
    keys: dict[str, int] = {}
    for name, tensor in headers.items():
        module, _, linear = name.removesuffix(".weight").rpartition(".")
        if find_part(f"{module}.{linear}") == ATTENTION and len(tensor.shape) == 2:
            if linear == "q_proj":
                queries[module] = tensor.shape[0]
            elif linear == "k_proj":
                keys[module] = tensor.shape[0]
    keys_by_query = {queries[module]: size for module, size in keys.items() if module in queries}
    sizes = [keys.get(module) or keys_by_query.get(queries[module], kv_size) for module in queries]
    return 2 * (sum(sizes) + (num_attention_layers - len(sizes)) * kv_size)


# ---------------------------------------------------------------- recurrent layers


def find_recurrent_shape(
    config: Mapping[str, Any], mixers: Sequence[str], where: str
) -> RecurrentShape | None:
    """Return the shape of the layers that carry a state, None if there are none. `mixers` are the
    words of the layers."""
    for mixer in RECURRENT_SIZES:
        if any(mixer in word for word in mixers):
            if mixer != "conv":
                _refuse_other_activations(config, where)
            return read_recurrent_shape(config, mixer, where)
    return None


def _refuse_other_activations(config: Mapping[str, Any], where: str) -> None:
    key = "mamba_hidden_act" if config.get("model_type") == "nemotron_h" else "hidden_act"
    if config.get(key, "silu") not in SILU_NAMES:
        message = f"{key} is {config[key]!r:.80}, but recurrent layers are computed with silu only"
        raise InputError(message, where=where, fix="use a model whose recurrent layers have silu")


def read_recurrent_shape(config: Mapping[str, Any], mixer: str, where: str) -> RecurrentShape:
    """Return the shape of the layers with this mixer: delta, mamba2 or conv.

    Raises InputError for a size that the config lacks, and for heads that cannot share keys."""
    sizes = {
        size: _require(config, names, where=where) for size, names in RECURRENT_SIZES[mixer].items()
    }
    if mixer == "conv":
        return RecurrentShape(**sizes)
    if sizes["num_heads"] % sizes["num_groups"]:
        names = [RECURRENT_SIZES[mixer][size][0] for size in ("num_heads", "num_groups")]
        message = (
            f"{sizes['num_heads']} heads ({names[0]}) cannot share {sizes['num_groups']} keys "
            f"({names[1]})"
        )
        raise InputError(message, where=where, fix="download config.json again")
    keys = 2 * sizes.pop("num_groups") * sizes["key_size"]
    num_channels = keys + sizes["num_heads"] * sizes["value_size"]
    return RecurrentShape(num_channels=num_channels, **sizes)


def _require(config: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    message = f"config.json has no positive integer {' or '.join(names)}"
    raise InputError(message, where=where, fix="download config.json again")
