"""Checks that a folder's weights are the ones transformers will load, before memory is allocated.

    check_weight_shapes(folder)               every parameter against the safetensors headers
    with transformers_errors(folder): ...     turn errors of transformers into an InputError

The network is built on the meta device, so no config.json can fill the memory. transformers itself
would initialise missing weights at random and only print a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import TensorHeader, read_headers

MAX_BUFFER_VALUES = 2**24  # of a table that is no weight, such as rotary frequencies
# fmt: off
LOAD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError,
    ValueError, StrictDataclassError,
)
# fmt: on


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of transformers for a folder that passed all our checks into InputError."""
    try:
        yield
    except LOAD_ERRORS as error:
        detail = " ".join(str(error).split())[:300]
        message = f"transformers cannot load this model: {type(error).__name__}: {detail}"
        raise InputError(message, where=str(folder), fix="download the model again") from error


def check_weight_shapes(folder: Path) -> None:
    """Raise InputError naming the first tensor that is missing, or whose shape differs from
    config.json."""
    with transformers_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    fix = "download the model again"
    headers = read_headers(folder)
    tied_weight = None
    if config.get_text_config().tie_word_embeddings:
        tied_weight = network.get_output_embeddings().weight
    for name, parameter in network.named_parameters():
        if parameter is tied_weight and name not in headers:
            continue
        tensor = find_header(headers, name)
        if tensor is None:
            message = f"the weights have no {name}, which config.json requires"
            raise InputError(message, where=str(folder), fix=fix)
        expected_shape = list(parameter.shape)
        if list(tensor.shape) != expected_shape:
            message = (
                f"the tensor {name} has shape {list(tensor.shape)}, "
                f"config.json says {expected_shape}"
            )
            raise InputError(message, where=str(tensor.file), fix=fix)
    for name, buffer in network.named_buffers():
        if buffer.numel() > MAX_BUFFER_VALUES:
            message = f"config.json requires a table {name} of {buffer.numel():,} values"
            raise InputError(message, where=str(folder), fix="download config.json again")


def find_header(headers: dict[str, TensorHeader], name: str) -> TensorHeader | None:
    """Return the header of a parameter. Files of a decoder alone lack the prefix `model.`."""
    return headers.get(name) or headers.get(name.partition(".")[2])
