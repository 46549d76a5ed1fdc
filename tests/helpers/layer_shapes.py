"""The linears of a model as the plan sees them: of a dense model's sizes, and of a network."""

import dataclasses
from pathlib import Path

from torch import nn

from tunesmith.core.model_spec import ModelSpec, NormShape, PartShape
from tunesmith.model.hub.validate import TensorHeader


def make_headers(network: nn.Module) -> dict[str, TensorHeader]:
    """Return the headers of the files that the network would be saved to."""
    headers: dict[str, TensorHeader] = {}
    for name, parameter in network.named_parameters():
        headers[name] = TensorHeader(Path("m"), "F32", tuple(parameter.shape), 0, 0)
    return headers


def describe_layers(
    spec: ModelSpec, *, mlp_inputs: int = 2, norms: NormShape | None = None
) -> ModelSpec:
    """Return the spec with what follows from the sizes of a dense model. `norms`: two per layer,
    and those of q and k."""
    hidden, layers, mlp = spec.hidden_size, spec.num_layers, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = PartShape(
        layer_values=dict.fromkeys(range(layers), 2 * (q + kv)),
        inputs=layers * (3 * hidden + q),
        outputs=layers * (q + 2 * kv + hidden),
        inner_outputs=layers * (q + 2 * kv),
        inner_inputs=layers * q,
    )
    gated = PartShape(
        layer_values=dict.fromkeys(range(layers), (mlp_inputs + 1) * mlp),
        inputs=layers * (mlp_inputs * hidden + mlp),
        outputs=layers * (mlp_inputs * mlp + hidden),
        inner_outputs=layers * mlp_inputs * mlp,
        inner_inputs=layers * mlp,
    )
    has_inner_norms = spec.model_type in ("gemma3_text", "qwen3")
    parameters = layers * hidden * (2 * q + 2 * kv + (mlp_inputs + 1) * mlp)
    return dataclasses.replace(
        spec,
        parts={"attention": attention, "mlp": gated},
        layer_mixers=("attention",) * layers,
        norms=norms or NormShape(2 * layers, layers * (q + kv) * has_inner_norms),
        cache_values=2 * layers * kv,
        block_parameters=parameters,
        active_parameters=parameters,
    )
