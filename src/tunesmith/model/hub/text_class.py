"""The text class of a model folder, as transformers builds it.

    load_text_config(folder)       the config of the text part, with all defaults
    read_text_config(folder)       the same as a plain mapping
    build_meta_network(folder)     the network without memory for weights
    list_expected_headers(folder)  the headers of weights that do not exist yet

In: a folder that `validate.check_folder` has checked. A multimodal checkpoint has a text part; its
other parts are not built. Verbs that only plan import this module for models whose layers differ,
since only transformers knows their shapes; it takes two to three seconds. Left out: the values of
the weights (model/text_network.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.model.hub.families import FAMILIES, find_text_type
from tunesmith.model.hub.validate import AUTO_MAP_KEY, DTYPE_BYTES, TensorHeader

# of the positions of images, which text does not have
IMAGE_ROTATION_KEYS = ("mrope_section", "mrope_interleaved")
# what a text part always does, and the type that computes the same can be set to
FIXED_VALUES = {"qwen3_moe": {"norm_topk_prob": True}}
PREFIX_ATTRIBUTE = "tensor_prefix"  # of the config of a text part
STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
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


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a folder, without the names of code that the repository brings: the
    classes of transformers are built from it, whoever reads it."""
    with transformers_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if hasattr(config, AUTO_MAP_KEY):
        delattr(config, AUTO_MAP_KEY)
    return config


def load_text_config(folder: Path) -> PreTrainedConfig:
    """Return the config of the class that is trained. For a multimodal checkpoint this is its text
    part; whether its head is the embedding is what the whole checkpoint says."""
    config = load_config(folder)
    with transformers_errors(folder):
        family = FAMILIES.get(config.model_type)
        if family is None or not family.tensor_prefix:
            return config
        text: Any = config.get_text_config()
        text_type = find_text_type({"model_type": config.model_type, "text_config": text.to_dict()})
        if text.model_type != text_type:
            text = _convert_config(text, text_type)
        text.tie_word_embeddings = config.tie_word_embeddings
        setattr(text, PREFIX_ATTRIBUTE, family.tensor_prefix)
    return text


def find_tensor_prefix(network: Any) -> str:
    """Return what stands before the names of a network's tensors on the whole model that it is the
    text part of, empty for a model of its own."""
    return getattr(network.config, PREFIX_ATTRIBUTE, "")


def _convert_config(text: PreTrainedConfig, text_type: str) -> PreTrainedConfig:
    """Return the config of a model type that computes the same on text."""
    values = text.to_dict()
    rotation = values.get("rope_parameters")
    if isinstance(rotation, dict):
        for key in IMAGE_ROTATION_KEYS:
            rotation.pop(key, None)
    del values["model_type"]
    return AutoConfig.for_model(text_type, **values | FIXED_VALUES.get(text_type, {}))


def read_text_config(folder: Path) -> Json:
    """Return the text config as a mapping with `layer_types` and `num_hidden_layers`, whatever its
    model type calls them."""
    config: Any = load_text_config(folder)
    dtype = str(config.dtype or "").removeprefix("torch.")
    return config.to_dict() | {
        "layer_types": getattr(config, "layer_types", None),
        "num_hidden_layers": config.num_hidden_layers,
        "dtype": dtype,
    }


def build_meta_network(folder: Path) -> PreTrainedModel:
    """Build the text class with weights that have a shape and no values."""
    config = load_text_config(folder)
    with transformers_errors(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def list_expected_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return name -> header of the weights that config.json implies."""
    network: Any = build_meta_network(folder)
    dtype = str(network.config.dtype or "").removeprefix("torch.")
    stored_dtype = STORED_DTYPES.get(dtype, "BF16")
    headers: dict[str, TensorHeader] = {}
    seen: set[int] = set()
    for name, parameter in network.state_dict(keep_vars=True).items():
        if id(parameter) in seen:  # a head that is the embedding
            continue
        seen.add(id(parameter))
        shape = tuple(parameter.shape)
        num_bytes = prod(shape) * DTYPE_BYTES[stored_dtype]
        headers[name] = TensorHeader(folder / "config.json", stored_dtype, shape, 0, num_bytes)
    return headers
