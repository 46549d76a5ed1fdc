"""A GGUF file turned into the folder that plain transformers loads: bf16 safetensors, config and
tokenizer.

In: one .gguf file of a dense Llama, Qwen2 or Qwen3 architecture. Out: config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
chat_template.jinja. The weights are what the quantisation left of them: a model made from a Q4_1
file has dequantised Q4_1 weights, rounded to bf16, so every number measured on it is that model's
and not the original's. Left out: mixtures of experts, SentencePiece vocabularies, and writing GGUF
(`export/gguf.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile, TensorInfo, read_gguf, read_tensor
from tunesmith.model.gguf.tokenizer import find_special_id, write_tokenizer
from tunesmith.model.hub.validate import read_json

BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
ROTATED_TENSOR = re.compile(r"\.attn_[qk]\.(weight|bias)")
USE_SAFETENSORS_FIX = "use the model's safetensors folder"
CHUNK_VALUES = 2**23  # values in memory at a time
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Llama 3 keeps its rope scaling as a tensor; it becomes a part of config.json
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufArchitecture:
    """How a GGUF architecture is called in transformers.

    `rotated`: q and k rows are stored interleaved. `only_cut`: the one pre-tokenizer that
    transformers' tokenizer class for this model type has, whatever the tokenizer.json in the folder
    says; empty where it takes that file as it is."""

    model_type: str
    class_name: str
    has_interleaved_qk: bool = False
    pre_tokenizer: str = ""


def convert(source: Path, folder: Path) -> None:
    """Write the model in `source` to the existing `folder`; a few million values in memory at a
    time.

    InputError for an architecture, tensor, quantisation, rope or tokenizer that cannot be carried
    over exactly."""
    file = read_gguf(source)
    names = write_settings(file, folder)
    architecture, config = _read_architecture(file), read_json(folder / "config.json")
    _write_weights(
        file,
        names,
        folder / "model.safetensors",
        config["head_dim"] if architecture.has_interleaved_qk else 0,
    )


def write_settings(file: GgufFile, folder: Path) -> dict[str, str]:
    """Everything but the weights: config, generation config, tokenizer, chat template. GGUF ->
    transformers names of the tensors. InputError as `convert`."""
    config = _build_config(file, _read_architecture(file))
    names = {
        tensor.name: _map_name(file, tensor)
        for tensor in file.tensors
        if tensor.name != ROPE_FACTORS
    }
    _check_names(file, set(names.values()), config)
    write_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _build_generation_config(file))
    return names


def estimate_bytes(source: Path) -> int:
    """Disk that `convert` takes: two bytes for each value, and some for the tokenizer."""
    return sum(2 * prod(tensor.shape) for tensor in read_gguf(source).tensors) + 32 * 2**20


def _read_architecture(file: GgufFile) -> GgufArchitecture:
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise InputError(
            f"cannot convert a GGUF of architecture {name!r}; known: {', '.join(sorted(ARCHITECTURES))}",
            where=str(file.path),
            fix=USE_SAFETENSORS_FIX,
        )
    num_splits = file.get("split.count", int, 0)
    if num_splits > 1:
        fix = "join the parts with `llama-gguf-split --merge`"
        raise InputError(f"it is one of {num_splits} parts", where=str(file.path), fix=fix)
    if file.get(f"{name}.expert_count", int, 0):
        raise InputError(
            "a mixture of experts cannot be converted from GGUF",
            where=str(file.path),
            fix=USE_SAFETENSORS_FIX,
        )
    architecture, pre_tokenizer = (
        ARCHITECTURES[name],
        file.get("tokenizer.ggml.pre", str, "(missing)"),
    )
    if architecture.pre_tokenizer not in ("", pre_tokenizer):
        message = f"transformers cuts the text of {name} models as {architecture.pre_tokenizer!r}, this file needs {pre_tokenizer!r}"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    return architecture


def _build_config(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    prefix = file.require("general.architecture", str)
    names = {tensor.name for tensor in file.tensors}
    heads, hidden = (
        file.get_count(f"{prefix}.attention.head_count"),
        file.get_count(f"{prefix}.embedding_length"),
    )
    head_dim = file.get_count(f"{prefix}.attention.key_length", hidden // heads or 1)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.get_count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.get_count(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get_count(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.get_count(f"{prefix}.context_length"),
        "rms_norm_eps": _shorten_float(
            file.require(f"{prefix}.attention.layer_norm_rms_epsilon", float)
        ),
        "hidden_act": "silu",
        "vocab_size": _read_vocab_size(file),
        "rope_parameters": _build_rope(file, prefix, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "bfloat16",
        **_find_special_ids(file),
    }
    if architecture.model_type != "qwen2":  # Qwen2 always has a bias on q, k and v and none on o
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    return config


def _read_vocab_size(file: GgufFile) -> int:
    rows = next(
        (tensor.shape[0] for tensor in file.tensors if tensor.name == "token_embd.weight"), 0
    )
    tokens = len(file.get_strings("tokenizer.ggml.tokens"))
    if rows < tokens:
        raise InputError(
            f"{tokens} tokens but {rows} rows in token_embd.weight", where=str(file.path)
        )
    return rows


def _build_rope(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    theta = _shorten_float(file.get(f"{prefix}.rope.freq_base", float, 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotary_dim = file.get_count(f"{prefix}.rope.dimension_count", head_dim)
    scaling_type = file.get(f"{prefix}.rope.scaling.type", str, "none")
    if (
        rotary_dim != head_dim
        or head_dim % 2
        or theta <= 1
        or scaling_type not in ("none", "linear")
    ):
        message = f"rope over {rotary_dim} of {head_dim} dimensions, base {theta}, scaling {scaling_type!r} cannot be carried over"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    if scaling_type == "linear":
        rope |= {
            "rope_type": "linear",
            "factor": file.require(f"{prefix}.rope.scaling.factor", float),
        }
    factors = next((tensor for tensor in file.tensors if tensor.name == ROPE_FACTORS), None)
    return rope if factors is None else rope | _build_llama3_scaling(file, factors, theta, head_dim)


def _build_llama3_scaling(
    file: GgufFile, tensor: TensorInfo, theta: float, head_dim: int
) -> dict[str, Any]:
    """The rope scaling of Llama 3 from its per-frequency divisors; its other three constants have
    only one value."""
    factors = read_tensor(file, tensor)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        message = f"the rope divisors in {ROPE_FACTORS} are not those of Llama 3"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _build_generation_config(file: GgufFile) -> dict[str, Any]:
    stops = sorted(
        {index for name in STOP_TOKENS if (index := find_special_id(file, name)) is not None}
    )
    return (
        _find_special_ids(file) | {"eos_token_id": stops}
        if len(stops) > 1
        else _find_special_ids(file)
    )


def _find_special_ids(file: GgufFile) -> dict[str, int]:
    """The ids of the first, last and padding token. A chat model ends with its end of turn where
    the file has one."""
    eot, eos = find_special_id(file, "eot"), find_special_id(file, "eos")
    token_ids = {
        "bos": find_special_id(file, "bos"),
        "eos": eos if eot is None else eot,
        "pad": find_special_id(file, "padding"),
    }
    return {f"{name}_token_id": index for name, index in token_ids.items() if index is not None}


def _map_name(file: GgufFile, tensor: TensorInfo) -> str:
    if tensor.name in TOP_NAMES:
        return TOP_NAMES[tensor.name]
    match = BLOCK_TENSOR.fullmatch(tensor.name)
    if not match or match[2] not in BLOCK_NAMES:
        raise InputError(
            f"the tensor {tensor.name} is unknown", where=str(file.path), fix=USE_SAFETENSORS_FIX
        )
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"


def _check_names(file: GgufFile, names: set[str], config: dict[str, Any]) -> None:
    """Exactly the tensors that transformers makes for `config`; it would fill a missing one with
    random numbers."""
    model_type = config["model_type"]
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    suffixes = {
        f"{suffix}.weight"
        for suffix in BLOCK_NAMES.values()
        if model_type == "qwen3" or suffix not in norms
    }
    bias_projections = ["q", "k", "v"] if model_type == "qwen2" or config["attention_bias"] else []
    suffixes |= {
        f"self_attn.{name}_proj.bias"
        for name in bias_projections + ["o"] * (model_type != "qwen2" and bool(bias_projections))
    }
    suffixes |= {
        f"mlp.{name}_proj.bias" for name in ("gate", "up", "down") if config.get("mlp_bias")
    }
    expected = {
        f"model.layers.{layer}.{suffix}"
        for layer in range(config["num_hidden_layers"])
        for suffix in suffixes
    }
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    expected |= set() if config["tie_word_embeddings"] else {"lm_head.weight"}
    for problem, mismatched in (
        ("are missing", expected - names),
        ("do not belong to the model", names - expected),
    ):
        if mismatched:
            raise InputError(
                f"{len(mismatched)} tensors {problem}, first {min(mismatched)}",
                where=str(file.path),
                fix=USE_SAFETENSORS_FIX,
            )


def _write_weights(file: GgufFile, names: dict[str, str], path: Path, head_rows: int) -> None:
    """`head_rows`: rows of a head in the q and k matrices where they must be reordered, else 0."""
    tensors = [tensor for tensor in file.tensors if tensor.name in names]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * prod(tensor.shape)
        header[names[tensor.name]] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            permuted_rows = head_rows if ROTATED_TENSOR.search(tensor.name) else 0
            for values in _iter_values(file, tensor, permuted_rows):
                output.write(_to_bfloat16(values).tobytes())


def _iter_values(file: GgufFile, tensor: TensorInfo, head_rows: int) -> Iterator[np.ndarray]:
    """The tensor as transformers wants it, some whole heads or rows at a time."""
    row_unit = head_rows or 1
    if tensor.shape[0] % row_unit:
        raise InputError(
            f"the tensor {tensor.name} does not hold whole heads", where=str(file.path)
        )
    step = max(1, CHUNK_VALUES // (row_unit * prod(tensor.shape[1:]))) * row_unit
    for first in range(0, tensor.shape[0] if len(tensor.shape) > 1 else 1, step):
        values = read_tensor(file, tensor, slice(first, first + step))
        if not np.isfinite(values).all():
            raise InputError(
                f"the tensor {tensor.name} holds NaN or infinite values", where=str(file.path)
            )
        yield reverse_permute(values, head_rows) if head_rows else values


def reverse_permute(values: np.ndarray, head_rows: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (GGUF) to first and second half (transformers)."""
    pairs = values.reshape(-1, head_rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of finite float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _shorten_float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


STOP_TOKENS = ("eos", "eot", "eom")

ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", has_interleaved_qk=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", pre_tokenizer="qwen2"),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM"),
}
