"""Read a `ModelSpec` from a model folder.

In: a folder that passed `validate.check_folder`. Out: the spec, from config.json and the
safetensors headers, or from config.json alone if there are no weights. No weight is read and
transformers is not imported. A model that tunesmith cannot train exactly is refused by name: layers
that carry state from token to token (packing would leak it), mixtures of experts, inputs other than
text, and model types without a proven equivalence."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import ModelSpec
from tunesmith.model.hub.expected_tensors import HEAD_DIMS, ModelDimensions, build_expected_headers
from tunesmith.model.hub.families import (
    ATTENTION_WORDS,
    EXPERT_KEYS,
    FAMILIES,
    FAMILY_FIX,
    find_layer_mixers,
)
from tunesmith.model.hub.validate import TensorHeader, has_weights, read_headers, read_model_json

# fmt: off
STATEFUL_TYPES = {
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
    "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h",
    "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
}
OTHER_INPUTS = (
    "vision_config", "audio_config", "video_config", "speech_config", "image_token_id",
    "audio_token_id",
)
# fmt: on
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MAX_SIZE = 2**24
MAX_SIZE_BY_KEY = {"num_hidden_layers": 4096}
MAX_PARAMETERS = 10**13
SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
USED_SPECIAL_IDS = {
    "config.json": ("pad_token_id",),  # by transformers' embedding
    "generation_config.json": SPECIAL_ID_KEYS,
}
NO_PADDING = -1  # of old configs
# the part of a tensor's name after the prefix that the model type adds
TENSOR_SUFFIX = re.compile(r"(embed_tokens|layers\.\d+)\..*")
# any config may have labels for a classifier, and transformers makes a name for each
MAX_LABELS = 10_000
DOWNLOAD_CONFIG_FIX = "download config.json again"
DOWNLOAD_MODEL_FIX = "download the model again"


def read_spec(path: Path, *, name: str = "") -> ModelSpec:
    """Return the spec of the model in folder `path`, called `name` (default: the folder's name).

    Raises InputError for a missing or implausible field, weights that do not match the config, or
    an unsupported kind of model."""
    config = read_model_json(path / "config.json")
    where = str(path / "config.json")
    model_type = _check_model_type(config, where)
    sizes = _ConfigSizes(config, where)
    heads = sizes.require("num_attention_heads")
    hidden_size = sizes.require("hidden_size")
    headers = _load_headers(config, model_type, path)
    block_parameters = _count_block_parameters(headers)
    # transformers' default differs between model types
    default_head_dim = _find_tensor(headers, "self_attn.o_proj.weight", path).shape[-1] // heads
    spec = ModelSpec(
        name=name or path.name,
        path=path,
        architecture=_check_architecture(config, model_type, where),
        model_type=model_type,
        num_layers=sizes.require("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", heads),
        head_dim=sizes.get("head_dim", default_head_dim),
        intermediate_size=sizes.require("intermediate_size"),
        vocab_size=sizes.require("vocab_size"),
        context_length=sizes.require("max_position_embeddings"),
        tie_word_embeddings=_has_tied_head(config, headers, where),
        parameters=_count_parameters(headers),
        dtype=_find_dtype(headers, path),
        origin=_read_origin(path),
        block_parameters=block_parameters,
        active_parameters=block_parameters,
        layer_mixers=find_layer_mixers(config, FAMILIES[model_type], where),
    )
    _check_sizes(spec, headers, where)
    _check_token_ids(spec)
    return spec


def read_model_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the headers of a model folder's weights, or those that its config.json implies if
    there are none."""
    config = read_model_json(path / "config.json")
    return _load_headers(config, _check_model_type(config, str(path / "config.json")), path)


def _load_headers(config: dict[str, Any], model_type: str, path: Path) -> dict[str, TensorHeader]:
    if has_weights(path):
        return read_headers(path)
    where = str(path / "config.json")
    sizes = _ConfigSizes(config, where)
    hidden_size = sizes.require("hidden_size")
    heads = sizes.require("num_attention_heads")
    has_head_dim = config.get("head_dim") is not None or model_type in HEAD_DIMS
    if not has_head_dim and hidden_size % heads:
        message = (
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, "
            "and there is no head_dim"
        )
        raise InputError(message, where=where, fix="correct one of them, or add head_dim")
    dimensions = ModelDimensions(
        num_layers=sizes.require("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", heads),
        head_dim=sizes.get("head_dim", HEAD_DIMS.get(model_type, hidden_size // heads)),
        intermediate_size=sizes.require("intermediate_size"),
        vocab_size=sizes.require("vocab_size"),
    )
    headers = build_expected_headers(config, model_type, dimensions, path / "config.json")
    parameters = _count_parameters(headers)
    if parameters > MAX_PARAMETERS:
        message = f"a model of these sizes has {parameters:,} parameters: {dimensions}"
        raise InputError(message, where=where, fix="correct the size that is too large")
    return headers


def _count_parameters(headers: dict[str, TensorHeader]) -> int:
    return sum(prod(tensor.shape) for tensor in headers.values())


def _count_block_parameters(headers: dict[str, TensorHeader]) -> int:
    """Count the parameters of the matrices in the layers."""
    total = 0
    for name, tensor in headers.items():
        is_matrix = len(tensor.shape) >= 2 and ".layers." in f".{name}"
        total += prod(tensor.shape) if is_matrix else 0
    return total


class _ConfigSizes:
    """Reads positive integers of config.json, and raises InputError for one that is missing or
    implausible."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def require(self, key: str) -> int:
        if self.config.get(key) is None:
            fix = f"add {key}, or {DOWNLOAD_CONFIG_FIX}"
            raise InputError(f"config.json has no {key}", where=self.where, fix=fix)
        return self.get(key, 0)

    def get(self, key: str, default: int) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        limit = MAX_SIZE_BY_KEY.get(key, MAX_SIZE)
        if type(value) is not int or not 1 <= value <= limit:
            message = f"{key} is {str(value)[:80]}, not an integer from 1 to {limit}"
            fix = f"correct {key}, or {DOWNLOAD_CONFIG_FIX}"
            raise InputError(message, where=self.where, fix=fix)
        return value


def _check_model_type(config: dict[str, Any], where: str) -> str:
    """Return the model type. Raise InputError for an unsupported kind of model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError("config.json has no model_type", where=where, fix=DOWNLOAD_CONFIG_FIX)
    reason = _find_unsupported_feature(config, model_type)
    if reason is None and not (model_type in FAMILIES and FAMILIES[model_type].is_uniform):
        reason = f"the model type {model_type!r} is not supported"
    if reason is not None:
        raise InputError(reason, where=where, fix=FAMILY_FIX)
    labels = config.get("num_labels")
    if labels is not None and not (isinstance(labels, int) and 0 <= labels <= MAX_LABELS):
        message = f"num_labels is {labels!r:.80}, not a number up to {MAX_LABELS:,}"
        raise InputError(message, where=where, fix="remove it")
    if config.get("quantization_config"):
        method = str(config["quantization_config"])[:80]
        fix = "use the unquantised model; QLoRA quantises it while loading"
        raise InputError(f"the weights are already quantised ({method})", where=where, fix=fix)
    return model_type


def _find_unsupported_feature(config: dict[str, Any], model_type: str) -> str | None:
    layers = config.get("layer_types") or []
    unsupported = [str(layers)]
    if isinstance(layers, list):
        unsupported = sorted({str(layer) for layer in layers} - ATTENTION_WORDS)
    if model_type in STATEFUL_TYPES or unsupported:
        layer = "layers that carry state from token to token"
        if unsupported:
            layer = f"layers of type {', '.join(unsupported)}"
        return f"{model_type} has {layer}: packed documents would leak through them"
    for key in OTHER_INPUTS:
        if config.get(key):
            return f"{model_type} has inputs other than text ({key})"
    if config.get("is_encoder_decoder") or "t5" in model_type:
        return f"{model_type} is an encoder-decoder; only decoders can be trained"
    experts = [key for key in EXPERT_KEYS if isinstance(config.get(key), int) and config[key] > 1]
    if experts or "moe" in model_type:
        return f"{model_type} is a mixture of experts, which is not supported yet"
    return None


def _check_architecture(config: dict[str, Any], model_type: str, where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        message = f"architectures is {names!r:.80}, not one class name"
        raise InputError(message, where=where, fix=DOWNLOAD_CONFIG_FIX)
    if not names[0].endswith("ForCausalLM"):
        fix = "use a causal language model: a class whose name ends in ForCausalLM"
        raise InputError(f"{names[0]} is not a causal language model", where=where, fix=fix)
    expected = FAMILIES[model_type].causal_class
    if names[0] != expected:
        message = (
            f"architectures says {names[0][:80]}, but a model of type {model_type} is a {expected}"
        )
        raise InputError(message, where=where, fix=DOWNLOAD_CONFIG_FIX)
    return expected


def _has_tied_head(config: dict[str, Any], headers: dict[str, TensorHeader], where: str) -> bool:
    has_lm_head = "lm_head.weight" in headers
    configured = config.get("tie_word_embeddings")
    if configured is False and not has_lm_head:
        message = "config.json says the head is not tied, but there is no lm_head.weight"
        raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)
    return not has_lm_head if configured is None else bool(configured)


def _find_dtype(headers: dict[str, TensorHeader], path: Path) -> str:
    """Return the dtype of most of the bytes."""
    bytes_by_dtype = Counter[str]()
    for name, tensor in headers.items():
        if tensor.dtype not in DTYPES:
            message = f"the tensor {name} is {tensor.dtype}; weights must be BF16, F16 or F32"
            raise InputError(message, where=str(path), fix="use the unquantised model")
        bytes_by_dtype[tensor.dtype] += tensor.end - tensor.begin
    if not bytes_by_dtype:
        message = "the weight files hold no tensor"
        raise InputError(message, where=str(path), fix=DOWNLOAD_MODEL_FIX)
    return DTYPES[bytes_by_dtype.most_common(1)[0][0]]


def _read_origin(path: Path) -> str:
    """Return the origin from the manifest that tunesmith writes into a converted model."""
    manifest = path / "manifest.json"
    return str(read_model_json(manifest).get("origin", "")) if manifest.is_file() else ""


def _check_sizes(spec: ModelSpec, headers: dict[str, TensorHeader], where: str) -> None:
    if spec.num_heads % spec.num_kv_heads:
        message = f"{spec.num_heads} heads cannot share {spec.num_kv_heads} key and value heads"
        raise InputError(message, where=where, fix=DOWNLOAD_CONFIG_FIX)
    if spec.num_layers > len(headers):
        message = (
            f"config.json has {spec.num_layers:,} layers, the weights {len(headers):,} tensors"
        )
        raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)
    expected = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    o_proj_shape = (spec.hidden_size, spec.num_heads * spec.head_dim)
    down_proj_shape = (spec.hidden_size, spec.intermediate_size)
    for layer in range(spec.num_layers):
        expected[f"layers.{layer}.self_attn.o_proj.weight"] = o_proj_shape
        expected[f"layers.{layer}.mlp.down_proj.weight"] = down_proj_shape
    by_suffix: dict[str, TensorHeader] = {}
    for name, tensor in headers.items():
        if f"layers.{spec.num_layers}." in name:
            message = f"config.json has {spec.num_layers} layers but the weights have {name}"
            raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)
        if match := TENSOR_SUFFIX.search(name):
            by_suffix[match[0]] = tensor
    for suffix, shape in expected.items():
        tensor = by_suffix.get(suffix) or _find_tensor(headers, suffix, spec.path)
        if tensor.shape != shape:
            actual_shape = list(tensor.shape)
            message = (
                f"the tensor {suffix} has shape {actual_shape}, config.json says {list(shape)}"
            )
            raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)


def _check_token_ids(spec: ModelSpec) -> None:
    """Raise InputError for a special token that is no integer or has no row in the embedding.

    Nothing uses the bos and eos of config.json, which are often those of a larger vocabulary."""
    for name, used_keys in USED_SPECIAL_IDS.items():
        path = spec.path / name
        config = read_model_json(path) if path.is_file() else {}
        for key in SPECIAL_ID_KEYS:
            value = config.get(key)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is None or (type(token_id) is int and key not in used_keys):
                    continue
                if type(token_id) is int and NO_PADDING <= token_id < spec.vocab_size:
                    continue
                message = (
                    f"{key} {token_id!r:.80} is no token of the model, whose embedding has "
                    f"{spec.vocab_size:,} rows"
                )
                fix = f"correct {key}, or download {name} again"
                raise InputError(message, where=str(path), fix=fix)


def _find_tensor(headers: dict[str, TensorHeader], suffix: str, path: Path) -> TensorHeader:
    """Return the first tensor whose name ends in `suffix`, whatever prefix the model type adds."""
    for name, tensor in headers.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return tensor
    raise InputError(f"the weights have no {suffix}", where=str(path), fix=DOWNLOAD_MODEL_FIX)
