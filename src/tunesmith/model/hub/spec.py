"""Read a `ModelSpec` from a model folder.

In: a folder that passed `validate.check_folder`. Out: the spec, from config.json and the
safetensors headers, or from config.json alone if there are no weights. No weight is read.
transformers is imported for families whose layers differ from each other, and for shapes without
weights: both are in its code. A model that tunesmith cannot train exactly is refused by name:
layers that carry state from token to token (packing would leak it), inputs other than text without
a text part, and model types without a proven equivalence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, ModelSpec
from tunesmith.model.hub.config_values import check_config_values, check_rotation
from tunesmith.model.hub.families import (
    ATTENTION,
    CAPACITY_KEYS,
    CAPACITY_REASON,
    EXPERTS,
    FAMILY_FIX,
    NO_MIXER,
    READY,
    REFUSED_TYPES,
    TEXT_FAMILIES,
    Family,
    count_experts,
    count_experts_per_token,
    find_family,
    find_layer_mixers,
    find_text_type,
)
from tunesmith.model.hub.packed_tensors import (
    MXFP4_DTYPE,
    find_packing,
    pack_expected_headers,
)
from tunesmith.model.hub.part_shapes import (
    count_cache_values,
    find_recurrent_shape,
    measure_norms,
    measure_parts,
)
from tunesmith.model.hub.stored_tensors import (
    has_equal_values,
    read_text_tensors,
)
from tunesmith.model.hub.validate import TensorHeader, has_weights, read_model_json
from tunesmith.model.target_modules import (
    RECURRENT,
    find_embedding,
    find_layer,
)

# fmt: off
OTHER_INPUTS = (
    "vision_config", "audio_config", "video_config", "speech_config", "image_token_id",
    "audio_token_id",
)
# fmt: on
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MAX_SIZE = 2**24
MAX_SIZE_BY_KEY = {"num_hidden_layers": 512}
MAX_PARAMETERS = 10**13
UNIFORM_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings"),
)
SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
USED_SPECIAL_IDS = {
    "config.json": ("pad_token_id",),  # by transformers' embedding
    "generation_config.json": SPECIAL_ID_KEYS,
}
NO_PADDING = -1  # of old configs
FULL_CLASS = "ForConditionalGeneration"  # of a multimodal checkpoint
MLP_OUTPUTS = (
    *(".down_proj.weight", ".w2.weight", ".output_linear.weight"),
    *(".mlp.fc2.weight", ".mlp.c_proj.weight", ".mlp.dense_4h_to_h.weight"),
)
PER_LAYER_EMBEDDING = "embed_tokens_per_layer"  # of Gemma 4
PER_LAYER_TYPES = ("gemma4", "gemma4_text")
# of what transformers makes a list when it reads a config, or a module for each
MAX_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "n_layer", "n_layers"), 512),
    "num_labels": 10_000,  # of a classifier, which any config may have
}
DOWNLOAD_CONFIG_FIX = "download config.json again"
DOWNLOAD_MODEL_FIX = "download the model again"


@dataclass(frozen=True)
class _ModelConfig:
    """A config.json of a supported kind: `content` as it is written, `text` what describes the text
    part, with transformers' defaults unless the family is uniform."""

    path: Path
    content: Json
    family: Family
    text_type: str
    text: Json

    @property
    def where(self) -> str:
        return str(self.path / "config.json")


def read_spec(path: Path, *, name: str = "") -> ModelSpec:
    """Return the spec of the model in folder `path`, called `name` (default: the folder's name).

    Raises InputError for a missing or implausible field, weights that do not match the config, or
    an unsupported kind of model."""
    config = _read_config(path)
    sizes = _ConfigSizes(config.text, config.where)
    heads = sizes.require("num_attention_heads")
    hidden_size = sizes.require("hidden_size")
    num_layers = sizes.require("num_hidden_layers")
    headers, omitted_bytes = _load_headers(config)
    blocks = {name: tensor for name, tensor in headers.items() if _is_block(name, tensor)}
    block_parameters = _count_parameters(blocks)
    experts = _count_parameters({name: blocks[name] for name in blocks if ".experts." in name})
    # a config can have a number of experts though all layers are dense
    num_experts = count_experts(config.text) if experts else 0
    num_experts_per_token = count_experts_per_token(config.text) if num_experts else 0
    layer_mixers = find_layer_mixers(config.text, config.family, config.where)
    num_kv_heads = sizes.get("num_key_value_heads", heads)
    head_dim = _find_head_dim(config, headers, sizes)
    check_rotation(config.text, config.text_type, config.where)
    num_attention_layers = sum("attention" in mixer for mixer in layer_mixers)
    spec = ModelSpec(
        name=name or path.name,
        path=path,
        architecture=_check_architecture(config),
        model_type=config.text_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_find_intermediate_size(config, headers, sizes),
        vocab_size=sizes.require("vocab_size"),
        per_layer_rows=_find_per_layer_rows(headers),
        context_length=sizes.require("max_position_embeddings"),
        tie_word_embeddings=_has_tied_head(config, headers),
        parameters=_count_parameters(headers),
        dtype=_find_dtype(headers, path),
        origin=_read_origin(path),
        block_parameters=block_parameters,
        packed_parameters=_count_parameters(
            {name: tensor for name, tensor in headers.items() if tensor.dtype == MXFP4_DTYPE}
        ),
        active_parameters=block_parameters
        - experts
        + experts * num_experts_per_token // (num_experts or 1),
        layer_mixers=layer_mixers,
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        tensor_prefix=config.family.tensor_prefix,
        omitted_bytes=omitted_bytes,
        parts=measure_parts(headers, config.text_type, num_experts_per_token),
        norms=measure_norms(headers, config.text_type),
        cache_values=count_cache_values(headers, num_attention_layers, num_kv_heads * head_dim),
        recurrent=find_recurrent_shape(config.text, layer_mixers, config.where),
    )
    _check_token_ids(spec, config.text)
    _check_layers(spec, headers, config.where)
    return spec


def read_model_headers(path: Path) -> dict[str, TensorHeader]:
    """Return one header for each parameter of the text class, from the weights of a model folder,
    or those that its config.json implies if there are none."""
    return _load_headers(_read_config(path))[0]


def _read_config(path: Path) -> _ModelConfig:
    """Read config.json. Raise InputError for an unsupported kind of model."""
    content = read_model_json(path / "config.json")
    where = str(path / "config.json")
    family = _check_model_type(content, where)
    text_type = find_text_type(content)
    text = content
    if not family.is_uniform:
        from tunesmith.model.hub.text_class import read_text_config

        text = read_text_config(path)
    return _ModelConfig(path, content, family, text_type, text)


def _check_nested_counts(content: Json, where: str) -> None:
    """Raise InputError for too many layers or labels in any part of a config."""
    pending: list[Any] = [content]
    while pending:
        part = pending.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                pending.append(value)
                continue
            limit = MAX_COUNTS.get(key)
            if limit is not None and type(value) is int and value > limit:
                message = f"{key} is {str(value)[:80]}, more than {limit:,}"
                raise InputError(message, where=where, fix=f"correct {key}")


def _find_head_dim(
    config: _ModelConfig, headers: Mapping[str, TensorHeader], sizes: _ConfigSizes
) -> int:
    """Return the size of a head of queries and keys."""
    rotated = config.text.get("qk_rope_head_dim")
    plain = config.text.get("qk_nope_head_dim")
    if isinstance(rotated, int) and isinstance(plain, int):  # multi-head latent attention
        return rotated + plain
    heads = sizes.require("num_attention_heads")
    default = sizes.require("hidden_size") // heads
    if config.family.is_uniform:  # transformers' default differs between model types
        o_proj = _find_tensor(headers, "self_attn.o_proj.weight", config.path)
        default = o_proj.shape[-1] // heads
    return sizes.get("head_dim", default)


def _load_headers(config: _ModelConfig) -> tuple[dict[str, TensorHeader], int]:
    """Return the header of each parameter, and the bytes of the tensors that are left out."""
    path = config.path
    if has_weights(path):
        tensors = read_text_tensors(path)
        headers = {name: stored.get_header() for name, stored in tensors.parameters.items()}
        omitted_bytes = sum(tensor.end - tensor.begin for tensor in tensors.omitted.values())
        return headers, omitted_bytes
    if config.family.is_uniform:  # transformers would take its default, which is of another model
        sizes = _ConfigSizes(config.content, config.where)
        for key in UNIFORM_SIZES:
            sizes.require(key)
    from tunesmith.model.hub.text_class import list_expected_headers

    packing = find_packing(config.content, config.text_type, config.where)
    headers = pack_expected_headers(list_expected_headers(path), packing)
    _refuse_absurd_size(headers, config)
    return headers, 0


def _refuse_absurd_size(headers: Mapping[str, TensorHeader], config: _ModelConfig) -> None:
    parameters = _count_parameters(headers)
    if parameters > MAX_PARAMETERS:
        message = f"a model of these sizes has {parameters:,} parameters"
        raise InputError(message, where=config.where, fix="correct the size that is too large")


def _count_parameters(headers: Mapping[str, TensorHeader]) -> int:
    return sum(prod(tensor.shape) for tensor in headers.values())


def _find_per_layer_rows(headers: Mapping[str, TensorHeader]) -> int:
    """Return the rows of the embedding that all layers read beside their inputs, 0 without one."""
    tables = [tensor for name, tensor in headers.items() if PER_LAYER_EMBEDDING in name]
    return tables[0].shape[0] if tables else 0


def _is_block(name: str, tensor: TensorHeader) -> bool:
    """Whether a tensor is a matrix of a layer, or a stack of matrices: a short convolution, whose
    middle dimension is 1, is not."""
    is_matrix = len(tensor.shape) >= 2 and 1 not in tensor.shape[1:-1]
    return is_matrix and find_layer(name) is not None


def _find_intermediate_size(
    config: _ModelConfig, headers: Mapping[str, TensorHeader], sizes: _ConfigSizes
) -> int:
    """Return the width of the widest MLP, or of one expert in a model of experts only."""
    if config.family.is_uniform:
        return sizes.require("intermediate_size")
    widths: list[int] = []
    expert_widths: list[int] = []
    for name, tensor in headers.items():
        if name.endswith(".experts.down_proj"):
            expert_widths += [
                size for size in tensor.shape[1:] if size != config.text["hidden_size"]
            ]
        elif _is_block(name, tensor) and name.endswith(MLP_OUTPUTS):
            widths.append(tensor.shape[-1])
    return max(widths or expert_widths or [config.text["hidden_size"]])


class _ConfigSizes:
    """Reads positive integers of config.json, and raises InputError for one that is missing or
    implausible."""

    def __init__(self, config: Json, where: str) -> None:
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


def _check_model_type(config: Json, where: str) -> Family:
    """Return the family. Raise InputError for an unsupported kind of model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError("config.json has no model_type", where=where, fix=DOWNLOAD_CONFIG_FIX)
    if model_type in REFUSED_TYPES:
        message = f"{model_type} {REFUSED_TYPES[model_type]}"
        raise InputError(message, where=where, fix=FAMILY_FIX)
    family = find_family(model_type)
    reason = _find_unsupported_feature(config, model_type, family)
    if family is None or reason is not None:
        reason = reason or f"the model type {model_type!r} is not supported"
        raise InputError(reason, where=where, fix=_find_replacement(config))
    check_config_values(config, where)
    _check_nested_counts(config, where)
    find_packing(config, model_type, where)
    return family


def _find_replacement(config: Json) -> str:
    """Return what to use instead of a model that is refused: for a multimodal one, a text model of
    the type of its text part."""
    text = config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(text_type, str) or text_type in REFUSED_TYPES or not find_family(text_type):
        return FAMILY_FIX
    return f"use a text model of type {text_type}, which is its text part, or {FAMILY_FIX}"


def _find_unsupported_feature(config: Json, model_type: str, family: Family | None) -> str | None:
    """Return why a config is refused, as far as its own words say it."""
    if family is not None and family.tensor_prefix:
        text = config.get("text_config")
        if not isinstance(text, dict):
            return f"{model_type} has no text part: config.json has no text_config"
        text_type = find_text_type(config)
        text_family = None if text_type in REFUSED_TYPES else find_family(text_type)
        if text_family is None or text_family.tensor_prefix:
            reason = REFUSED_TYPES.get(text_type, "is not supported")
            return f"the text part of {model_type}, {text_type}, {reason}"
        return _find_unsupported_layer(text, model_type, text_family)
    for key in OTHER_INPUTS:
        if config.get(key):
            classes = config.get("architectures")
            name = classes[0] if isinstance(classes, list) and classes else model_type
            return f"{str(name)[:80]} of {model_type} has inputs other than text ({key})"
    if config.get("is_encoder_decoder") or "t5" in model_type:
        return f"{model_type} is an encoder-decoder; only decoders can be trained"
    return _find_unsupported_layer(config, model_type, family)


def _find_unsupported_layer(text: Json, model_type: str, family: Family | None) -> str | None:
    """Return why the layers of a text config are refused."""
    if family is not None and family.is_uniform and text.get("per_layer_config"):
        return f"{model_type} has layers of different sizes (per_layer_config)"
    if text.get("use_bidirectional_attention") in (True, "all"):
        return f"{model_type} attends in both directions"
    # transformers 5.24 fails on it: it slices the embeddings of layers that share keys
    has_no_embeddings = text.get("hidden_size_per_layer_input", 1) in (0, None)
    if model_type in PER_LAYER_TYPES and has_no_embeddings and text.get("num_kv_shared_layers"):
        return f"{model_type} has num_kv_shared_layers and hidden_size_per_layer_input 0"
    if any(text.get(key) for key in CAPACITY_KEYS):
        return f"{model_type} {CAPACITY_REASON}"
    can_have_experts = family is not None and family.has_experts and EXPERTS in READY
    if family is not None and count_experts(text) > 1 and not can_have_experts:
        return f"{model_type} has no experts, but config.json has {count_experts(text)}"
    return None


def _check_architecture(config: _ModelConfig) -> str:
    """Return transformers' class of what is trained. Raise InputError unless config.json names it,
    or the class of the whole multimodal model."""
    names = config.content.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        message = f"architectures is {names!r:.80}, not one class name"
        raise InputError(message, where=config.where, fix=DOWNLOAD_CONFIG_FIX)
    family = find_family(config.text_type)
    text_class = family.causal_class if family else ""
    is_multimodal = bool(config.family.tensor_prefix)
    is_full = names[0].endswith(FULL_CLASS)
    if (is_full and is_multimodal) or names[0] in (text_class, config.family.written_class):
        return text_class
    if is_multimodal:
        raise _refuse_foreign_class(config, names[0], text_class)
    if is_full:
        message = f"architectures says {names[0][:80]}, a multimodal class, but {config.text_type} "
        message += "is the type of a text model"
        fix = (
            f"use the whole model's config.json; for weights of the text alone, write {text_class}"
        )
        raise InputError(message, where=config.where, fix=fix)
    if not names[0].endswith("ForCausalLM"):
        fix = f"use the {text_class} of this model: its base, or its chat model"
        message = f"{names[0][:80]} is not a causal language model"
        raise InputError(message, where=config.where, fix=fix)
    message = (
        f"architectures says {names[0][:80]}, but a model of type {config.text_type} is a "
        f"{text_class}"
    )
    raise InputError(message, where=config.where, fix=DOWNLOAD_CONFIG_FIX)


def _refuse_foreign_class(config: _ModelConfig, name: str, text_class: str) -> InputError:
    """Return the refusal of a multimodal checkpoint that names a class of code of its own."""
    from tunesmith.model.hub.transformers_families import find_multimodal_class

    model_type = str(config.content["model_type"])
    full_class = find_multimodal_class(model_type) or f"a class that ends in {FULL_CLASS}"
    message = f"architectures says {name[:80]}, but transformers' {model_type} is {full_class}"
    fix = (
        f"use the folder that transformers reads without remote code (often named -hf), whose "
        f"architectures says {full_class}; its text part, {text_class}, is trained"
    )
    return InputError(message, where=config.where, fix=fix)


def _has_tied_head(config: _ModelConfig, headers: Mapping[str, TensorHeader]) -> bool:
    """Return whether head and embedding are one. As in transformers, two that are stored with
    different values are two, whatever a config says by its default."""
    has_lm_head = "lm_head.weight" in headers
    configured = config.text.get("tie_word_embeddings")
    embedding = headers.get(find_embedding([*headers]))
    if configured and has_lm_head and embedding and has_weights(config.path):
        return has_equal_values(headers["lm_head.weight"], embedding)
    if configured is False and not has_lm_head:
        message = "config.json says the head is not tied, but there is no lm_head.weight"
        raise InputError(message, where=config.where, fix=DOWNLOAD_MODEL_FIX)
    return not has_lm_head if configured is None else bool(configured)


def _find_dtype(headers: Mapping[str, TensorHeader], path: Path) -> str:
    """Return the dtype of most of the bytes; packed matrices are computed in bf16."""
    bytes_by_dtype = Counter[str]()
    for name, tensor in headers.items():
        if tensor.scales is not None:
            bytes_by_dtype["BF16"] += tensor.end - tensor.begin
            continue
        if tensor.dtype not in DTYPES:
            message = f"the tensor {name} is {tensor.dtype}; weights must be BF16, F16 or F32"
            raise InputError(message, where=str(path), fix="use the unquantized model")
        bytes_by_dtype[tensor.dtype] += tensor.end - tensor.begin
    if not bytes_by_dtype:
        message = "the weight files hold no tensor"
        raise InputError(message, where=str(path), fix=DOWNLOAD_MODEL_FIX)
    return DTYPES[bytes_by_dtype.most_common(1)[0][0]]


def _read_origin(path: Path) -> str:
    """Return the origin from the manifest that tunesmith writes into a converted model."""
    manifest = path / "manifest.json"
    return str(read_model_json(manifest).get("origin", "")) if manifest.is_file() else ""


def _check_layers(spec: ModelSpec, headers: Mapping[str, TensorHeader], where: str) -> None:
    """Raise InputError for weights of other layers than the config's, whose plan would be that of
    another model. All shapes are compared when the weights are loaded (text_network.py)."""
    if spec.num_heads % spec.num_kv_heads:
        message = f"{spec.num_heads} heads cannot share {spec.num_kv_heads} key and value heads"
        raise InputError(message, where=where, fix=DOWNLOAD_CONFIG_FIX)
    if spec.num_experts_per_token > spec.num_experts:
        message = f"each token goes to {spec.num_experts_per_token} experts of {spec.num_experts}"
        raise InputError(message, where=where, fix=DOWNLOAD_CONFIG_FIX)
    embedding = find_embedding([*headers])
    shape = headers[embedding].shape if embedding else ()
    if shape != (spec.vocab_size, spec.hidden_size):
        expected = [spec.vocab_size, spec.hidden_size]
        message = f"the embedding {embedding} has shape {list(shape)}, config.json says {expected}"
        raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)
    for name, tensor in headers.items():
        if len(tensor.shape) > 1 and 0 in tensor.shape:
            message = f"the tensor {name} holds no values: its shape is {list(tensor.shape)}"
            raise InputError(message, where=where, fix="choose a model without sizes of 0")
        layer = find_layer(name)
        if layer is not None and layer.number == spec.num_layers:
            message = f"config.json has {spec.num_layers} layers but the weights have {name}"
            raise InputError(message, where=where, fix=DOWNLOAD_MODEL_FIX)
    # without layer_types transformers' default may be of another model
    words = {
        ATTENTION: [mixer for mixer in spec.layer_mixers if ATTENTION in mixer],
        RECURRENT: [mixer for mixer in spec.layer_mixers if mixer not in (ATTENTION, NO_MIXER)],
    }
    for part, layers in words.items():
        actual = spec.parts[part].layers if part in spec.parts else 0
        if actual != len(layers):
            message = f"config.json says {len(layers)} {part} layers, the weights have {actual}"
            fix = "add layer_types to config.json, or download it again"
            raise InputError(message, where=where, fix=fix)
    if spec.model_type not in TEXT_FAMILIES:
        from tunesmith.model.hub.text_class import build_meta_network

        build_meta_network(spec.path)  # refuses layers that no mixer computes


def _check_token_ids(spec: ModelSpec, text: Json) -> None:
    """Raise InputError for a special token that is no integer or has no row in the embedding.

    Nothing uses the bos and eos of config.json, which are often those of a larger vocabulary."""
    for name, used_keys in USED_SPECIAL_IDS.items():
        path = spec.path / name
        config = text
        if name != "config.json":
            config = read_model_json(path) if path.is_file() else {}
        for key in SPECIAL_ID_KEYS:
            value = config.get(key)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is None or (type(token_id) is int and key not in used_keys):
                    continue
                if type(token_id) is int and NO_PADDING <= token_id < spec.token_rows:
                    continue
                message = (
                    f"{key} {token_id!r:.80} is not a token of the model, whose embedding has "
                    f"{spec.token_rows:,} rows"
                )
                fix = f"correct {key}, or download {name} again"
                raise InputError(message, where=str(path), fix=fix)


def _find_tensor(headers: Mapping[str, TensorHeader], suffix: str, path: Path) -> TensorHeader:
    """Return the first tensor whose name ends in `suffix`, whatever prefix the model type adds."""
    for name, tensor in headers.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return tensor
    raise InputError(f"the weights have no {suffix}", where=str(path), fix=DOWNLOAD_MODEL_FIX)
