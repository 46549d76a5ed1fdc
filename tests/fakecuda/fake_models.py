"""Models and training loops on the GPU that is not there, and what one step asks of it."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from plan_configs import make_config
from recorder import Record, recording
from tiny_models import LORA, SIZES, make_tiny_documents
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document, NewToken
from tunesmith.model.adapters import METHODS, find_linears, replace_module
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.hub.text_class import build_network
from tunesmith.model.lora import QuantizedLinear
from tunesmith.model.new_embeddings import init_new_rows
from tunesmith.train.loop import TrainingLoop

PLAIN = LlamaConfig(**SIZES | {"head_dim": 64})
BF16 = torch.bfloat16


def make_network(config: PreTrainedConfig, dtype: torch.dtype = BF16) -> Any:
    """Return a stock network on the fake GPU, whose weights need no values."""
    with torch.device("cuda"), no_init_weights():
        network: Any = build_network(copy.deepcopy(config), dtype=dtype)
        network.tie_weights()  # which belongs to the initial values
    return network.eval().requires_grad_(False)


def make_model(
    config: PreTrainedConfig = PLAIN,
    *,
    dtype: torch.dtype = BF16,
    method: str = "lora",
    backend: str = "varlen",
    gradient_checkpointing: str = "none",
    **settings: Any,
) -> PackedCausalLM:
    """Return a wrapped model on the fake GPU."""
    network = make_network(config, dtype)
    if "add_tokens" in settings:
        tokens = [NewToken(text, id, (5, 6)) for text, id in settings["add_tokens"].items()]
        init_new_rows(network, tokens)
    if method == "qlora":
        quantize(network, dtype)
    METHODS[method](network, LORA | settings)
    return wrap_model(network, dtype, backend, gradient_checkpointing=gradient_checkpointing)


_models: dict[str, PackedCausalLM] = {}


def get_model(config: PreTrainedConfig = PLAIN, **settings: Any) -> PackedCausalLM:
    """Return a wrapped model, which cases with equal settings share: no step changes what has no
    values."""
    key = repr((id(config), settings))
    if key not in _models:
        with recording():  # which is faster
            _models[key] = make_model(config, **settings)
    return _models[key]


def quantize(network: Any, dtype: torch.dtype) -> None:
    """Keep the linears in 4 bits, as `load_quantized` does."""
    for path, linear in find_linears(network).items():
        replace_module(network, path, QuantizedLinear(linear.weight, linear.bias, dtype))


def make_loop(
    model: PackedCausalLM, documents: Sequence[Document] = (), **settings: Any
) -> TrainingLoop:
    documents = documents or make_tiny_documents()

    def load_documents(step: int) -> list[Document]:
        del step
        return [dataclasses.replace(document) for document in documents]

    return TrainingLoop(model, load_documents, make_config(**settings), steps=3)


def take_step(loop: TrainingLoop) -> None:
    event = next(loop)
    assert isinstance(event, TrainStep), event


def record_step(loop: TrainingLoop) -> Record:
    with recording() as record:
        take_step(loop)
    record.step_kernels = record.num_kernels
    return record
