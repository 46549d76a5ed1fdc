"""Convert a GGUF file to a folder that plain transformers loads: bf16 safetensors, config and
tokenizer.

In: one .gguf file of a dense Llama, Qwen2, Qwen3 or Gemma 3 text model. Out: config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
chat_template.jinja. The weights are dequantized and rounded to bf16: numbers measured on a model
from a Q4_1 file describe that model, not the original. Names and shapes come from the network that
transformers builds from the config, and llama.cpp's names for its parameters. transformers' own
reader of GGUF gives equal weights, but holds the model in fp32, and its configs lack the head size
of Qwen3 and the rope scaling of Llama 3. Left out: mixtures of experts, and writing GGUF
(export/gguf.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile, TensorInfo, read_gguf, read_tensor
from tunesmith.model.gguf.tokenizer import find_special_id, write_tokenizer
from tunesmith.model.hub.text_class import list_expected_headers
from tunesmith.model.hub.validate import TensorHeader, read_model_json
from tunesmith.model.merge import write_weights

ROTATED_WEIGHTS = (".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias")
USE_SAFETENSORS_FIX = "use the model's safetensors folder"
# Llama 3 stores its rope scaling as a tensor; it becomes a part of config.json
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufArchitecture:
    """The transformers classes of a GGUF architecture.

    `has_interleaved_qk`: rows of q and k are stored interleaved. `has_shifted_norms`: norms are
    stored plus 1. `is_written_only`: an export is read back, but no file is converted to a base.
    `pre_tokenizer`: the only pre-tokenizer that transformers' tokenizer class for this model type
    supports, whatever tokenizer.json says; empty if it loads that file unchanged."""

    model_type: str
    class_name: str
    has_interleaved_qk: bool = False
    has_shifted_norms: bool = False
    pre_tokenizer: str = ""
    is_written_only: bool = False


def convert(source: Path, folder: Path) -> None:
    """Write the model in `source` to the existing `folder`, one tensor at a time.

    Raises InputError for an architecture, tensor, quantization, rope or tokenizer without an exact
    equivalent."""
    file = read_gguf(source)
    architecture = _read_architecture(file)
    if architecture.is_written_only:
        message = f"a GGUF of {architecture.model_type} cannot be converted to a base"
        raise InputError(message, where=str(source), fix=USE_SAFETENSORS_FIX)
    write_settings(file, folder)
    expected = list_expected_headers(folder)
    _write_weights(file, _match_tensors(file, expected), expected, folder)


def write_settings(file: GgufFile, folder: Path) -> None:
    """Write everything but the weights: config, generation config, tokenizer, chat template.

    Raises the errors of `convert`."""
    config = _build_config(file, _read_architecture(file))
    write_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _build_generation_config(file))


def estimate_bytes(source: Path) -> int:
    """Return the disk space that `convert` needs: two bytes per value, and 32 MiB for the rest."""
    return sum(2 * prod(tensor.shape) for tensor in read_gguf(source).tensors) + 32 * 2**20


def _read_architecture(file: GgufFile) -> GgufArchitecture:
    where = str(file.path)
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(n for n, a in ARCHITECTURES.items() if not a.is_written_only))
        message = f"the GGUF architecture {name!r} is not supported; supported: {supported}"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    num_splits = file.get("split.count", int, 0)
    if num_splits > 1:
        message = f"the file is one of {num_splits} parts"
        raise InputError(message, where=where, fix="merge them: `llama-gguf-split --merge`")
    if file.get(f"{name}.expert_count", int, 0) and name != QWEN3_MOE:
        message = "a mixture of experts cannot be converted from GGUF"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    architecture = ARCHITECTURES[name]
    pre_tokenizer = file.get("tokenizer.ggml.pre", str, "(missing)")
    if architecture.pre_tokenizer not in ("", pre_tokenizer):
        message = (
            f"transformers splits text for {name} models as {architecture.pre_tokenizer!r}, "
            f"but this file needs {pre_tokenizer!r}"
        )
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    return architecture


def _build_config(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    prefix = file.require("general.architecture", str)
    names = {tensor.name for tensor in file.tensors}
    heads = file.get_count(f"{prefix}.attention.head_count")
    hidden_size = file.get_count(f"{prefix}.embedding_length")
    head_dim = file.get_count(f"{prefix}.attention.key_length", hidden_size // heads or 1)
    rms_norm_eps = file.require(f"{prefix}.attention.layer_norm_rms_epsilon", float)
    num_layers = file.get_count(f"{prefix}.block_count")
    if num_layers > len(file.tensors):
        message = f"{prefix}.block_count is {num_layers:,}, but there are {len(names):,} tensors"
        raise InputError(message, where=str(file.path), fix="use a valid GGUF file")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": file.get_count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _count_kv_heads(file, prefix, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.get_count(f"{prefix}.context_length"),
        "rms_norm_eps": _shorten_float(rms_norm_eps),
        "hidden_act": "silu",
        "vocab_size": _read_vocab_size(file),
        "rope_parameters": _build_rope(file, prefix, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "bfloat16",
        **_find_special_ids(file),
    }
    if architecture.model_type not in (
        "qwen2",
        "lfm2",
    ):  # Qwen2 always has a bias on q, k and v, none on o
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if prefix == QWEN3_MOE:
        config |= {
            "num_experts": file.get_count(f"{prefix}.expert_count"),
            "num_experts_per_tok": file.get_count(f"{prefix}.expert_used_count"),
            "moe_intermediate_size": file.get_count(f"{prefix}.expert_feed_forward_length"),
            "norm_topk_prob": True,  # as llama.cpp computes it
        }
    if prefix == LFM2:
        config |= {
            "norm_eps": config.pop("rms_norm_eps"),
            "conv_L_cache": file.get_count(f"{prefix}.shortconv.l_cache"),
            "block_auto_adjust_ff_dim": False,
            "layer_types": _read_lfm2_layers(file),
        }
    if prefix == GEMMA3:
        config |= _describe_gemma3(file, config)
    return config


def _describe_gemma3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return what Gemma 3 adds: layers with a window, which have a rotation of their own."""
    del config["hidden_act"]  # the class knows another key, and its value
    sliding_theta = _shorten_float(file.get(f"{GEMMA3}.rope.freq_base_swa", float, 10000.0))
    # as in llama.cpp, of the 27B
    is_largest = config["num_hidden_layers"] == 62
    heads = config["num_attention_heads"]
    return {
        "sliding_window": file.get_count(f"{GEMMA3}.attention.sliding_window"),
        "query_pre_attn_scalar": (
            config["hidden_size"] // heads if is_largest else config["head_dim"]
        ),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding_theta},
        },
    }


def _count_kv_heads(file: GgufFile, prefix: str, heads: int) -> int:
    """Return the key and value heads of a layer; LFM2 lists them, 0 for convolutions."""
    if prefix == LFM2:
        return max(_list_kv_heads(file))
    return file.get_count(f"{prefix}.attention.head_count_kv", heads)


def _list_kv_heads(file: GgufFile) -> list[int]:
    return [int(count) for count in file.metadata[f"{LFM2}.attention.head_count_kv"]]


def _read_lfm2_layers(file: GgufFile) -> list[str]:
    return ["full_attention" if count else "conv" for count in _list_kv_heads(file)]


def _read_vocab_size(file: GgufFile) -> int:
    embedding = _find_tensor(file, "token_embd.weight")
    rows = 0 if embedding is None else embedding.shape[0]
    tokens = len(file.get_strings("tokenizer.ggml.tokens"))
    if rows < tokens:
        message = f"{tokens} tokens but {rows} rows in token_embd.weight"
        raise InputError(message, where=str(file.path))
    return rows


def _find_tensor(file: GgufFile, name: str) -> TensorInfo | None:
    for tensor in file.tensors:
        if tensor.name == name:
            return tensor
    return None


def _build_rope(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    theta = _shorten_float(file.get(f"{prefix}.rope.freq_base", float, 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotary_dim = file.get_count(f"{prefix}.rope.dimension_count", head_dim)
    scaling_type = file.get(f"{prefix}.rope.scaling.type", str, "none")
    is_full = rotary_dim == head_dim and head_dim % 2 == 0
    if not is_full or theta <= 1 or scaling_type not in ("none", "linear"):
        message = (
            f"rope over {rotary_dim} of {head_dim} dimensions, base {theta}, "
            f"scaling {scaling_type!r} is not supported"
        )
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    if scaling_type == "linear":
        rope["rope_type"] = "linear"
        rope["factor"] = file.require(f"{prefix}.rope.scaling.factor", float)
    factors = _find_tensor(file, ROPE_FACTORS)
    if factors is not None:
        rope |= _build_llama3_scaling(file, factors, theta, head_dim)
    return rope


def _build_llama3_scaling(
    file: GgufFile, tensor: TensorInfo, theta: float, head_dim: int
) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from its per-frequency divisors. The other three constants
    have one value in all Llama 3 models."""
    factors = read_tensor(file, tensor)
    factor = float(factors.max())
    low_freq_factor = 1.0
    high_freq_factor = 4.0
    original_length = 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ratios = (original_length / wavelengths - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    smooth = np.clip(ratios, 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        message = f"the rope divisors in {ROPE_FACTORS} are not those of Llama 3"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": original_length,
    }


def _build_generation_config(file: GgufFile) -> dict[str, Any]:
    config = _find_special_ids(file)
    end_ids: set[int] = set()
    for name in END_TOKENS:
        index = find_special_id(file, name)
        if index is not None:
            end_ids.add(index)
    if len(end_ids) > 1:
        config["eos_token_id"] = sorted(end_ids)
    return config


def _find_special_ids(file: GgufFile) -> dict[str, Any]:
    """Return the ids of the bos, eos and pad tokens. A chat model's eos is its end of turn."""
    eos = find_special_id(file, "eot")
    if eos is None:
        eos = find_special_id(file, "eos")
    ids = {
        "bos_token_id": find_special_id(file, "bos"),
        "eos_token_id": eos,
        "pad_token_id": find_special_id(file, "padding"),
    }
    return {key: index for key, index in ids.items() if index is not None}


def _match_tensors(file: GgufFile, expected: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Return GGUF -> transformers name. Require exactly the parameters of the network, in its
    shapes."""
    where = str(file.path)
    names = _name_tensors(file, expected)
    stored = {tensor.name: tensor for tensor in file.tensors if tensor.name != ROPE_FACTORS}
    if missing := names.keys() - stored.keys():
        message = f"tensors are missing: {len(missing)}, first {min(missing)}"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    if unexpected := stored.keys() - names.keys():
        message = f"tensors are not part of the model: {len(unexpected)}, first {min(unexpected)}"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    for gguf_name, name in names.items():
        shape = stored[gguf_name].shape
        if shape != expected[name].shape:
            message = f"{gguf_name} is {list(shape)}, the config says {list(expected[name].shape)}"
            raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    return names


def _name_tensors(file: GgufFile, expected: Iterable[str]) -> dict[str, str]:
    """Return llama.cpp's name of each parameter -> its name in transformers."""
    architecture = file.require("general.architecture", str)
    num_layers = file.get_count(f"{architecture}.block_count")
    name_map = get_tensor_name_map(MODEL_ARCH[architecture.upper()], num_layers)
    names: dict[str, str] = {}
    for name in expected:
        names[str(name_map.get_name(name, try_suffixes=(".weight", ".bias")))] = name
    return names


def _write_weights(
    file: GgufFile, names: dict[str, str], expected: Mapping[str, TensorHeader], folder: Path
) -> None:
    """Write model.safetensors, in the order of the file."""
    tensors = [tensor for tensor in file.tensors if tensor.name in names]
    headers = {names[tensor.name]: expected[names[tensor.name]] for tensor in tensors}
    head_rows = read_model_json(folder / "config.json")["head_dim"]
    values = (_read_values(file, tensor, names[tensor.name], head_rows) for tensor in tensors)
    write_weights(headers, values, folder / "model.safetensors")


def _read_values(file: GgufFile, tensor: TensorInfo, name: str, head_rows: int) -> torch.Tensor:
    """Return a parameter in transformers' layout."""
    architecture = _read_architecture(file)
    values = read_tensor(file, tensor)
    if not np.isfinite(values).all():
        message = f"the tensor {tensor.name} holds NaN or infinite values"
        raise InputError(message, where=str(file.path))
    if architecture.has_interleaved_qk and name.endswith(ROTATED_WEIGHTS):
        values = reverse_permute(values, head_rows)
    if architecture.has_shifted_norms and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(values)


def reverse_permute(values: np.ndarray, head_rows: int) -> np.ndarray:
    """Reorder the rows of each head from interleaved pairs (GGUF) to halves (transformers)."""
    pairs = values.reshape(-1, head_rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _shorten_float(value: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


END_TOKENS = ("eos", "eot", "eom")

QWEN3_MOE = "qwen3moe"
LFM2 = "lfm2"
GEMMA3 = "gemma3"
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", has_interleaved_qk=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", pre_tokenizer="qwen2"),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM"),
    QWEN3_MOE: GgufArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", is_written_only=True),
    GEMMA3: GgufArchitecture("gemma3_text", "Gemma3ForCausalLM", has_shifted_norms=True),
    LFM2: GgufArchitecture("lfm2", "Lfm2ForCausalLM", is_written_only=True),
}
