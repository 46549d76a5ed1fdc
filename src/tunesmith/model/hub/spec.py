"""What a model folder says about itself, as a `ModelSpec`.

In: a folder that `folder.check_folder` has passed. Out: the spec, from config.json and the
safetensors headers, or from config.json alone where there are no weights; no weight is read and
transformers is not imported. A model that tunesmith cannot train exactly is refused here by name:
layers that carry state from token to token (packing would leak it), mixtures of experts, other
inputs than text, and model types that nobody has proven yet."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import ModelSpec
from tunesmith.model.hub.expected_tensors import HEAD_DIMS, ModelDimensions, build_expected_headers
from tunesmith.model.hub.validate import TensorHeader, has_weights, read_headers, read_json

# Dense decoders of text with gated MLPs and softmax attention, whose sizes are what the config
# says. Model type -> the one class that transformers loads for it. fmt: off
SUPPORTED_CLASSES = {
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "ernie4_5": "Ernie4_5",
    "exaone4": "Exaone4",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "glm": "Glm",
    "glm4": "Glm4",
    "granite": "Granite",
    "helium": "Helium",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "llama": "Llama",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
}
STATEFUL_TYPES = [
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
    "zaya",
]
# fmt: on
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHER_INPUTS = (
    "vision_config",
    "audio_config",
    "video_config",
    "speech_config",
    "image_token_id",
    "audio_token_id",
)
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MAX_SIZE = 2**24
MAX_SIZE_BY_KEY = {"num_hidden_layers": 4096}
MAX_PARAMETERS = 10**13
TENSOR_SUFFIX = re.compile(
    r"(embed_tokens|layers\.\d+)\..*"
)  # of a name, whatever prefix the model type puts before it
# of the classifier that any config may carry: transformers makes a name for each
MAX_LABELS = 10_000


def read_spec(path: Path, *, name: str = "") -> ModelSpec:
    """The spec of the model in folder `path`, called `name` (the folder's own name if empty).

    InputError: a missing or absurd field, weights that do not fit the config, or a kind of model
    that is refused."""
    config = read_json(path / "config.json")
    where = str(path / "config.json")
    model_type = _check_model_type(config, where)
    sizes = _ConfigSizes(config, where)
    heads, hidden = sizes.require("num_attention_heads"), sizes.require("hidden_size")
    headers = _load_headers(config, model_type, path)
    output_projection = _find_tensor(headers, "self_attn.o_proj.weight", path)
    spec = ModelSpec(
        name=name or path.name,
        path=path,
        architecture=_check_architecture(config, model_type, where),
        model_type=model_type,
        num_layers=sizes.require("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", heads),
        head_dim=sizes.get(
            "head_dim", output_projection.shape[-1] // heads
        ),  # the default differs between model types
        intermediate_size=sizes.require("intermediate_size"),
        vocab_size=sizes.require("vocab_size"),
        context_length=sizes.require("max_position_embeddings"),
        tie_word_embeddings=_has_tied_head(config, headers, where),
        parameters=sum(prod(tensor.shape) for tensor in headers.values()),
        dtype=_find_dtype(headers, path),
        origin=_read_origin(path),
    )
    _check_sizes(spec, headers, where)
    return spec


def read_model_headers(path: Path) -> dict[str, TensorHeader]:
    """Of the weights of a model folder; where there are none, of those that its config.json
    promises."""
    config = read_json(path / "config.json")
    return _load_headers(config, _check_model_type(config, str(path / "config.json")), path)


def _load_headers(config: dict[str, Any], model_type: str, path: Path) -> dict[str, TensorHeader]:
    if has_weights(path):
        return read_headers(path)
    where = str(path / "config.json")
    sizes = _ConfigSizes(config, where)
    hidden, heads = sizes.require("hidden_size"), sizes.require("num_attention_heads")
    if config.get("head_dim") is None and model_type not in HEAD_DIMS and hidden % heads:
        message = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        raise InputError(message, where=where, fix="correct one of them, or give head_dim")
    dimensions = ModelDimensions(
        num_layers=sizes.require("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", heads),
        head_dim=sizes.get("head_dim", HEAD_DIMS.get(model_type, hidden // heads)),
        intermediate_size=sizes.require("intermediate_size"),
        vocab_size=sizes.require("vocab_size"),
    )
    expected = build_expected_headers(config, model_type, dimensions, path / "config.json")
    parameters = sum(prod(tensor.shape) for tensor in expected.values())
    if parameters > MAX_PARAMETERS:
        message = f"a model of these sizes has {parameters:,} parameters: {dimensions}"
        raise InputError(message, where=where, fix="correct the size that is too large")
    return expected


class _ConfigSizes:
    """Reads whole positive numbers of config.json, or says which one is missing or absurd."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def require(self, key: str) -> int:
        if self.config.get(key) is None:
            raise InputError(
                f"config.json has no {key}",
                where=self.where,
                fix=f"add {key}, or download it again",
            )
        return self.get(key, 0)

    def get(self, key: str, default: int) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        limit = MAX_SIZE_BY_KEY.get(key, MAX_SIZE)
        if type(value) is not int or not 1 <= value <= limit:
            message = f"{key} is {str(value)[:80]}, not a whole number from 1 to {limit}"
            raise InputError(
                message, where=self.where, fix=f"correct {key}, or download config.json again"
            )
        return value


def _check_model_type(config: dict[str, Any], where: str) -> str:
    """The model type, or an InputError that names why this kind of model is refused."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            "config.json has no model_type", where=where, fix="download config.json again"
        )
    layers = config.get("layer_types") or []
    unsupported = (
        sorted({str(layer) for layer in layers} - ATTENTION_LAYERS)
        if isinstance(layers, list)
        else [str(layers)]
    )
    experts = [key for key in EXPERT_KEYS if isinstance(config.get(key), int) and config[key] > 1]
    other_inputs = [key for key in OTHER_INPUTS if config.get(key)]
    fix = f"choose a dense text model; known model types: {', '.join(SUPPORTED_CLASSES)}"
    if model_type in STATEFUL_TYPES or unsupported:
        layer = (
            f"layers of type {', '.join(unsupported)}"
            if unsupported
            else "layers that carry state from token to token"
        )
        raise InputError(
            f"{model_type} has {layer}: packed documents would leak through them",
            where=where,
            fix=fix,
        )
    if other_inputs:
        raise InputError(
            f"{model_type} reads more than text ({other_inputs[0]})", where=where, fix=fix
        )
    if config.get("is_encoder_decoder") or "t5" in model_type:
        raise InputError(
            f"{model_type} is an encoder with a decoder; only decoders are trained",
            where=where,
            fix=fix,
        )
    if experts or "moe" in model_type:
        raise InputError(
            f"{model_type} is a mixture of experts, which is not supported yet",
            where=where,
            fix=fix,
        )
    if model_type not in SUPPORTED_CLASSES:
        raise InputError(
            f"the model type {model_type!r} is not one that tunesmith knows", where=where, fix=fix
        )
    labels = config.get("num_labels")
    if labels is not None and not (isinstance(labels, int) and 0 <= labels <= MAX_LABELS):
        raise InputError(
            f"num_labels is {labels!r:.80}, not a number up to {MAX_LABELS:,}",
            where=where,
            fix="remove it",
        )
    if config.get("quantization_config"):
        method = str(config["quantization_config"])[:80]
        fix = "give the unquantised model; QLoRA quantises it while loading"
        raise InputError(f"the weights are quantised already ({method})", where=where, fix=fix)
    return model_type


def _check_architecture(config: dict[str, Any], model_type: str, where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"architectures is {names!r:.80}, not one class name", where=where)
    if not names[0].endswith("ForCausalLM"):
        fix = "give a causal language model, a class whose name ends in ForCausalLM"
        raise InputError(f"{names[0]} is not a language model with a head", where=where, fix=fix)
    if names[0] != f"{SUPPORTED_CLASSES[model_type]}ForCausalLM":
        message = f"architectures says {names[0][:80]}, but a model of type {model_type} is a {SUPPORTED_CLASSES[model_type]}ForCausalLM"
        raise InputError(message, where=where, fix="download config.json again")
    return names[0]


def _has_tied_head(config: dict[str, Any], headers: dict[str, TensorHeader], where: str) -> bool:
    has_lm_head = "lm_head.weight" in headers
    configured = config.get("tie_word_embeddings")
    if configured is False and not has_lm_head:
        message = (
            "config.json says that the head has its own weights, but there is no lm_head.weight"
        )
        raise InputError(message, where=where, fix="download the model again")
    return not has_lm_head if configured is None else bool(configured)


def _find_dtype(headers: dict[str, TensorHeader], path: Path) -> str:
    unsupported = next(
        (name for name, tensor in headers.items() if tensor.dtype not in DTYPES), None
    )
    if unsupported is not None:
        message = f"the tensor {unsupported} is {headers[unsupported].dtype}; weights must be BF16, F16 or F32"
        raise InputError(message, where=str(path), fix="give the unquantised model")
    bytes_by_dtype = Counter[str]()
    for tensor in headers.values():
        bytes_by_dtype[tensor.dtype] += tensor.end - tensor.begin
    if not bytes_by_dtype:
        raise InputError(
            "the weight files hold no tensor", where=str(path), fix="download the model again"
        )
    return DTYPES[bytes_by_dtype.most_common(1)[0][0]]


def _read_origin(path: Path) -> str:
    """What the manifest says that tunesmith writes beside a model it made."""
    manifest = path / "manifest.json"
    return str(read_json(manifest).get("origin", "")) if manifest.is_file() else ""


def _check_sizes(spec: ModelSpec, headers: dict[str, TensorHeader], where: str) -> None:
    if spec.num_heads % spec.num_kv_heads:
        message = f"{spec.num_heads} heads cannot share {spec.num_kv_heads} key and value heads"
        raise InputError(message, where=where, fix="download config.json again")
    if spec.num_layers > len(headers):
        message = (
            f"config.json has {spec.num_layers:,} layers, the weights {len(headers):,} tensors"
        )
        raise InputError(message, where=where, fix="download the model again")
    expected = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        expected |= {
            f"layers.{layer}.self_attn.o_proj.weight": (
                spec.hidden_size,
                spec.num_heads * spec.head_dim,
            ),
            f"layers.{layer}.mlp.down_proj.weight": (spec.hidden_size, spec.intermediate_size),
        }
    by_suffix = {
        match[0]: tensor
        for name, tensor in headers.items()
        if (match := TENSOR_SUFFIX.search(name))
    }
    for suffix, expected_shape in expected.items():
        actual_shape = (by_suffix.get(suffix) or _find_tensor(headers, suffix, spec.path)).shape
        if actual_shape != expected_shape:
            message = f"the tensor {suffix} has shape {list(actual_shape)}, config.json says {list(expected_shape)}"
            raise InputError(message, where=where, fix="download the model again")
    extra_tensor = next((name for name in headers if f"layers.{spec.num_layers}." in name), None)
    if extra_tensor is not None:
        raise InputError(
            f"config.json has {spec.num_layers} layers but there is {extra_tensor}", where=where
        )


def _find_tensor(headers: dict[str, TensorHeader], suffix: str, path: Path) -> TensorHeader:
    """The first tensor whose name ends in `end`, whatever prefix the model type puts before it."""
    name = next((name for name in headers if name == suffix or name.endswith(f".{suffix}")), None)
    if name is None:
        raise InputError(
            f"the weights have no {suffix}", where=str(path), fix="download the model again"
        )
    return headers[name]
