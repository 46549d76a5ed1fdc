"""Convert a GGUF file to a folder that plain transformers loads: bf16 safetensors, config and
tokenizer.

In: one .gguf file of a dense Llama, Qwen2 or Qwen3 architecture. Out: config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
chat_template.jinja. The weights are dequantized and rounded to bf16: numbers measured on a model
from a Q4_1 file describe that model, not the original. Left out: mixtures of experts, SentencePiece
vocabularies, and writing GGUF (export/gguf)."""

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
from tunesmith.model.hub.validate import read_model_json

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
DENSE_MLP = ("ffn_gate", "ffn_up", "ffn_down")
EXPERT_NAMES = {  # all experts in one tensor
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
LFM2_NAMES = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
LFM2_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}
LFM2_CONVOLUTION = {
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",  # the final norm of LFM2
    "output.weight": "lm_head.weight",
}
# Llama 3 stores its rope scaling as a tensor; it becomes a part of config.json
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufArchitecture:
    """The transformers classes of a GGUF architecture.

    `has_interleaved_qk`: rows of q and k are stored interleaved. `is_written_only`: an export is
    read back, but no file is converted to a base. `pre_tokenizer`: the only
    pre-tokenizer that transformers' tokenizer class for this model type supports, whatever
    tokenizer.json says; empty if it loads that file unchanged."""

    model_type: str
    class_name: str
    has_interleaved_qk: bool = False
    pre_tokenizer: str = ""
    is_written_only: bool = False


def convert(source: Path, folder: Path) -> None:
    """Write the model in `source` to the existing `folder`, a few million values at a time.

    Raises InputError for an architecture, tensor, quantization, rope or tokenizer without an exact
    equivalent."""
    file = read_gguf(source)
    architecture = _read_architecture(file)
    if architecture.is_written_only:
        message = f"a GGUF of {architecture.model_type} cannot be converted to a base"
        raise InputError(message, where=str(source), fix=USE_SAFETENSORS_FIX)
    names = write_settings(file, folder)
    head_rows = 0
    if architecture.has_interleaved_qk:
        head_rows = read_model_json(folder / "config.json")["head_dim"]
    _write_weights(file, names, folder / "model.safetensors", head_rows)


def write_settings(file: GgufFile, folder: Path) -> dict[str, str]:
    """Write everything but the weights: config, generation config, tokenizer, chat template.

    Returns GGUF -> transformers names of the tensors. Raises the errors of `convert`."""
    config = _build_config(file, _read_architecture(file))
    names: dict[str, str] = {}
    for tensor in file.tensors:
        if tensor.name != ROPE_FACTORS:
            names[tensor.name] = _map_name(file, tensor)
    _check_names(file, set(names.values()), config)
    write_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _build_generation_config(file))
    return names


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
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": file.get_count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.get_count(f"{prefix}.block_count"),
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
    return config


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


def _map_name(file: GgufFile, tensor: TensorInfo) -> str:
    if tensor.name in TOP_NAMES:
        return TOP_NAMES[tensor.name]
    match = BLOCK_TENSOR.fullmatch(tensor.name)
    architecture = file.require("general.architecture", str)
    names = BLOCK_NAMES | EXPERT_NAMES
    if architecture == LFM2:
        names = LFM2_NAMES | LFM2_ATTENTION | LFM2_CONVOLUTION
    if not match or match[2] not in names:
        message = f"the tensor {tensor.name} is unknown"
        raise InputError(message, where=str(file.path), fix=USE_SAFETENSORS_FIX)
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _check_names(file: GgufFile, names: set[str], config: dict[str, Any]) -> None:
    """Require exactly the tensors that transformers creates for `config`; it would fill a missing
    one with random numbers."""
    final_norm = "embedding_norm" if config["model_type"] == "lfm2" else "norm"
    expected = {"model.embed_tokens.weight", f"model.{final_norm}.weight"}
    if not config["tie_word_embeddings"]:
        expected.add("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        suffixes = _list_suffixes(config, layer)
        expected.update(f"model.layers.{layer}.{suffix}" for suffix in suffixes)
    where = str(file.path)
    if missing := expected - names:
        message = f"tensors are missing: {len(missing)}, first {min(missing)}"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)
    if unexpected := names - expected:
        message = f"tensors are not part of the model: {len(unexpected)}, first {min(unexpected)}"
        raise InputError(message, where=where, fix=USE_SAFETENSORS_FIX)


def _list_suffixes(config: dict[str, Any], layer: int) -> list[str]:
    """Return the ends of the names of a layer's tensors."""
    model_type = config["model_type"]
    if model_type == "lfm2":
        is_attention = config["layer_types"][layer] == "full_attention"
        mixer = LFM2_ATTENTION if is_attention else LFM2_CONVOLUTION
        return [f"{path}.weight" for path in (LFM2_NAMES | mixer).values()]
    paths = [path for name, path in BLOCK_NAMES.items() if name not in DENSE_MLP]
    mlp = EXPERT_NAMES if model_type == "qwen3_moe" else {n: BLOCK_NAMES[n] for n in DENSE_MLP}
    suffixes: list[str] = []
    for path in (*paths, *mlp.values()):
        if path not in QK_NORMS or model_type in ("qwen3", "qwen3_moe"):
            suffixes.append(f"{path}.weight")
    biased: list[str] = []
    if model_type == "qwen2":
        biased += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    elif config["attention_bias"]:
        biased += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    if config.get("mlp_bias"):
        biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return suffixes + [f"{path}.bias" for path in biased]


def _write_weights(file: GgufFile, names: dict[str, str], path: Path, head_rows: int) -> None:
    """Write model.safetensors. `head_rows`: rows of a head in the q and k matrices if they must be
    reordered, else 0."""
    tensors = [tensor for tensor in file.tensors if tensor.name in names]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin = end
        end += 2 * prod(tensor.shape)
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
    """Yield the tensor in transformers' layout, some heads or rows at a time."""
    row_unit = head_rows or 1
    if tensor.shape[0] % row_unit:
        message = f"the rows of the tensor {tensor.name} are not a multiple of the head size"
        raise InputError(message, where=str(file.path))
    step = max(1, CHUNK_VALUES // (row_unit * prod(tensor.shape[1:]))) * row_unit
    num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    for first in range(0, num_rows, step):
        values = read_tensor(file, tensor, slice(first, first + step))
        if not np.isfinite(values).all():
            message = f"the tensor {tensor.name} holds NaN or infinite values"
            raise InputError(message, where=str(file.path))
        yield reverse_permute(values, head_rows) if head_rows else values


def reverse_permute(values: np.ndarray, head_rows: int) -> np.ndarray:
    """Reorder the rows of each head from interleaved pairs (GGUF) to halves (transformers)."""
    pairs = values.reshape(-1, head_rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of finite float32 values rounded to bfloat16: nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _shorten_float(value: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


END_TOKENS = ("eos", "eot", "eom")

QWEN3_MOE = "qwen3moe"
LFM2 = "lfm2"
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", has_interleaved_qk=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", pre_tokenizer="qwen2"),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM"),
    QWEN3_MOE: GgufArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", is_written_only=True),
    LFM2: GgufArchitecture("lfm2", "Lfm2ForCausalLM", is_written_only=True),
}
