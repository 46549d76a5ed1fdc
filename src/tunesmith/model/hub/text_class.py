"""The text class of a model folder, as transformers builds it.

    load_text_config(folder)       the config of the text part, with all defaults
    read_text_config(folder)       the same as a plain mapping
    build_meta_network(folder)     the network without memory for weights
    list_expected_headers(folder)  the headers of weights that do not exist yet
    build_network(config)          the network as transformers builds it, linears [O, I]
    use_torch_code(network)        without the kernels of other packages

In: a folder that `validate.check_folder` has checked. A multimodal checkpoint has a text part; its
other parts are not built. Verbs that only plan import this module for models whose layers differ,
since only transformers knows their shapes; it takes two to three seconds. Left out: the values of
the weights (model/text_network.py)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from tunesmith.core.errors import InputError, raise_if_machine_failed
from tunesmith.core.types import Json
from tunesmith.model.hub.families import (
    FAMILY_FIX,
    SPARSE_WORDS,
    TEXT_FAMILIES,
    find_text_type,
    get_tensor_prefix,
)
from tunesmith.model.hub.transformers_families import find_causal_class
from tunesmith.model.hub.validate import AUTO_MAP_KEY, DTYPE_BYTES, TensorHeader
from tunesmith.model.machine_errors import explain_error
from tunesmith.model.target_modules import CONV1D_TYPES

T = TypeVar("T", bound=nn.Module)

# of the positions of images, which text does not have
IMAGE_ROTATION_KEYS = ("mrope_section", "mrope_interleaved")
# what a text part always does, and the type that computes the same can be set to
FIXED_VALUES = {"qwen3_moe": {"norm_topk_prob": True}}
SIZE_NAMES = (
    *("layer_types", "num_hidden_layers", "hidden_size"),
    *("num_attention_heads", "max_position_embeddings"),
)
PREFIX_ATTRIBUTE = "tensor_prefix"  # of the config of a text part
TIED_ATTRIBUTE = "tie_word_embeddings"
LENGTH_ATTRIBUTE = "exact_length"  # up to which sparse attention sees all keys
# parts of layers that carry a state or choose keys, which no mixer of tunesmith computes here
UNKNOWN_PARTS = ("A_log", "dt_bias", "conv1d", "conv", "short_conv", "decay", "indexer")
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
    except (*LOAD_ERRORS, RuntimeError) as error:
        if isinstance(error, RuntimeError) and explain_error(error) is not None:
            raise
        raise_if_machine_failed(error, folder)
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
        text: Any = config.get_text_config()
        text_type = find_text_type({"model_type": config.model_type, "text_config": text.to_dict()})
        if text.model_type != text_type:
            text = _convert_config(text, text_type)
        _see_all_keys(text)
        if prefix := get_tensor_prefix({"model_type": config.model_type}):
            if hasattr(config, TIED_ATTRIBUTE):
                text.tie_word_embeddings = config.tie_word_embeddings
            setattr(text, PREFIX_ATTRIBUTE, prefix)
    return text


def _see_all_keys(text: Any) -> None:
    """Let layers of sparse attention see all keys, and note up to which length that is the same."""
    lengths: list[int] = []
    words = list(getattr(text, "layer_types", None) or ())
    for word, keys in SPARSE_WORDS.items():
        sizes: list[Any] = [getattr(text, key, None) for key in keys]
        if word in words and all(type(size) is int and size > 0 for size in sizes):
            lengths.append(prod(sizes))
            words = ["full_attention" if other == word else other for other in words]
    if lengths:
        text.layer_types = words
        setattr(text, LENGTH_ATTRIBUTE, min(lengths))


def get_context_length(config: Any) -> int:
    """Return how many tokens a document can have: what the model was made for, and not more than
    what is computed exactly."""
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in ("max_position_embeddings", LENGTH_ATTRIBUTE)]
    return min((length for length in lengths if length), default=0)


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
    """Return the text config as a mapping with the names of `SIZE_NAMES`, whatever its model type
    calls them."""
    config: Any = load_text_config(folder)
    dtype = str(config.dtype or "").removeprefix("torch.")
    with transformers_errors(folder):  # layers of different sizes have none for all
        sizes = {name: getattr(config, name, None) for name in SIZE_NAMES}
    sizes["max_position_embeddings"] = get_context_length(config)
    return config.to_dict() | sizes | {"dtype": dtype}


def build_meta_network(folder: Path) -> PreTrainedModel:
    """Build the text class with weights that have a shape and no values."""
    config = load_text_config(folder)
    with transformers_errors(folder), torch.device("meta"):
        return build_network(config)


def build_network(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """Return transformers' network, with the linears of GPT-2 as those of all other families."""
    if config.model_type in TEXT_FAMILIES:
        network = AutoModelForCausalLM.from_config(config, **settings)
    else:
        causal: Any = find_causal_class(type(config))
        network = causal._from_config(config, **settings)
        _refuse_unknown_layers(network)
    if config.model_type in CONV1D_TYPES:
        transpose_linears(network)
    return network


def _refuse_unknown_layers(network: Any) -> None:
    """Raise InputError unless all that mixes tokens in the layers is attention that is called
    through transformers' interface."""
    decoder = network.base_model
    layers = getattr(decoder, "layers", None)
    kind = type(decoder).__name__
    where = str(network.config.name_or_path)
    if not isinstance(layers, nn.ModuleList) or not decoder._supports_attention_backend:
        message = f"{kind} of transformers has no layers of attention that can be packed"
        raise InputError(message, where=where, fix=FAMILY_FIX)
    for name, _ in [*layers.named_modules(), *layers.named_parameters()]:
        if name.rpartition(".")[2] in UNKNOWN_PARTS:
            message = f"{kind} has {name}: packed documents could leak through it"
            raise InputError(message, where=where, fix=FAMILY_FIX)


def transpose_linears(network: Any) -> None:
    """Replace each Conv1D, a linear whose weight is [I, O], by a linear [O, I], and call the layers
    `layers`, too. Both compute the same."""
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Conv1D):
                linear = nn.Linear(module.nx, module.nf, device="meta")
                weight_OI = module.weight.detach().t().contiguous()
                linear.weight = nn.Parameter(weight_OI, module.weight.requires_grad)
                linear.bias = module.bias
                setattr(parent, name, linear)
    network.base_model.__class__ = _Gpt2Decoder


class _Gpt2Decoder(GPT2Model):
    @property
    def layers(self) -> nn.ModuleList:
        return self.h

    def warn_if_padding_and_no_attention_mask(self, input_ids: Any, attention_mask: Any) -> None:
        """Do nothing: packs are not padded, and the check would wait for the GPU."""
        del input_ids, attention_mask


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


def use_torch_code(network: T) -> T:
    """Let the modules of a stock network call the torch code of transformers, and return it.

    Where flash-linear-attention, mamba-ssm or causal-conv1d are installed, transformers calls their
    kernels: on a CPU too, where they cannot run, and as the reference of what it should check. The
    modules get subclasses of their own; methods of each module would refer to it, so that its
    weights would outlive the network."""
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for module in network.modules():
        kind = type(module)
        if kind not in classes:
            classes[kind] = _make_torch_class(kind)
        module.__class__ = classes[kind]
    return network


def _make_torch_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of the same name that calls torch code; the class itself if it does."""
    methods = dict(_iter_torch_methods(kind))
    if not methods:
        return kind
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def _iter_torch_methods(kind: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """Yield copies, with torch code, of the methods that call what another package has taken
    over."""
    attributes: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        attributes |= vars(parent)
    for name, function in attributes.items():
        if isinstance(function, FunctionType):
            # what decorates it translates old arguments and loads offloaded weights
            innermost = inspect.unwrap(function)
            torch_functions = _find_torch_functions(innermost)
            if torch_functions:
                yield name, _copy_function(innermost, torch_functions)


def _find_torch_functions(function: FunctionType) -> dict[str, Any]:
    """Return the torch code of the functions that one calls by name and that another package has
    taken over."""
    torch_functions: dict[str, Any] = {}
    for name in function.__code__.co_names:
        called = _get_function(function.__globals__.get(name))
        if called is not None and _is_taken_over(called):
            torch_functions[name] = inspect.unwrap(called)
    return torch_functions


def _get_function(value: Any) -> FunctionType | None:
    """Return the value if it is a function, or the function that it calls if it is a module: where
    the package `kernels` is installed, transformers makes modules of such functions."""
    if isinstance(value, nn.Module):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    return value if isinstance(value, FunctionType) else None


def _is_taken_over(function: FunctionType) -> bool:
    """Return whether a function of transformers calls the kernel of another package instead."""
    if not hasattr(function, "__wrapped__"):
        return False
    return bool(inspect.getclosurevars(function).nonlocals.get("is_new_implementation"))


def _copy_function(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Return a copy of a function that finds other values under some names."""
    scope = {**function.__globals__, **names}
    closure = function.__closure__
    copied = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
