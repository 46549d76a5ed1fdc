"""Whether the weights of a folder are those that transformers will ask for, told before there is
room for any.

    check_fit(folder)               names and shapes of every parameter against the safetensors headers
    with its_errors(folder): ...    what transformers raises about a folder becomes an InputError

The network is built without memory, so nothing that a config.json says can fill it. transformers
itself would start missing weights at random and say so in a table only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import TensorHeader, read_headers

MAX_BUFFER_VALUES = 2**24  # values of a table that is no weight, such as rotation frequencies
LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """For a folder that has passed every check here and is still not understood there."""
    try:
        yield
    except (*LOAD_ERRORS, StrictDataclassError) as error:
        detail = " ".join(str(error).split())[:300]
        message = f"transformers cannot load this model: {type(error).__name__}: {detail}"
        raise InputError(message, where=str(folder), fix="download the model again") from error


def check_weight_shapes(folder: Path) -> None:
    """InputError that names the first tensor which is missing, or has another shape than
    config.json says."""
    with transformers_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    headers = read_headers(folder)
    tied_head = (
        network.get_output_embeddings() if config.get_text_config().tie_word_embeddings else None
    )
    for name, parameter in network.named_parameters():
        if tied_head is not None and parameter is tied_head.weight and name not in headers:
            continue
        tensor = find_header(headers, name)
        if tensor is None:
            message = f"the weights have no {name}, which config.json asks for"
            raise InputError(message, where=str(folder), fix="download the model again")
        if tensor.shape != tuple(parameter.shape):
            message = f"the tensor {name} has shape {list(tensor.shape)}, config.json says {list(parameter.shape)}"
            raise InputError(message, where=str(tensor.file), fix="download the model again")
    for name, buffer in network.named_buffers():
        if buffer.numel() > MAX_BUFFER_VALUES:
            message = f"config.json asks for a table {name} of {buffer.numel():,} values"
            raise InputError(message, where=str(folder), fix="download config.json again")


def find_header(headers: dict[str, TensorHeader], name: str) -> TensorHeader | None:
    """Where a parameter lies; weights of the decoder alone have no `model.` in front."""
    return headers.get(name) or headers.get(name.partition(".")[2])
