"""A GGUF file turned into the folder that plain transformers loads: bf16 safetensors, config and tokenizer.

In: one .gguf file of a dense Llama, Qwen2 or Qwen3 architecture. Out: config.json, generation_config.json,
model.safetensors, tokenizer.json, tokenizer_config.json and chat_template.jinja.
The weights are what the quantisation left of them: a model made from a Q4_1 file has dequantised Q4_1 weights, rounded
to bf16, so every number measured on it is that model's and not the original's.
Left out: mixtures of experts, SentencePiece vocabularies, and writing GGUF (`export/gguf.py`).
"""

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
from tunesmith.model.gguf.tokenizer import special_id, write_tokenizer
from tunesmith.model.hub.validate import read_json

BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
ROTATED = re.compile(r"\.attn_[qk]\.(weight|bias)")
USE_FOLDER = "use the model's safetensors folder"
CHUNK = 2**23  # values in memory at a time
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
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3 keeps its rope scaling as a tensor; it becomes a part of config.json


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is called in transformers.

    `rotated`: q and k rows are stored interleaved. `only_cut`: the one pre-tokenizer that transformers' tokenizer class
    for this model type has, whatever the tokenizer.json in the folder says; empty where it takes that file as it is.
    """

    model_type: str
    class_name: str
    rotated: bool = False
    only_cut: str = ""


def convert(source: Path, folder: Path) -> None:
    """Write the model in `source` to the existing `folder`; a few million values in memory at a time.

    InputError for an architecture, tensor, quantisation, rope or tokenizer that cannot be carried over exactly.
    """
    file = read_gguf(source)
    names = write_settings(file, folder)
    architecture, config = _architecture(file), read_json(folder / "config.json")
    _write_weights(file, names, folder / "model.safetensors", config["head_dim"] if architecture.rotated else 0)


def write_settings(file: GgufFile, folder: Path) -> dict[str, str]:
    """Everything but the weights: config, generation config, tokenizer, chat template. GGUF -> transformers names of
    the tensors. InputError as `convert`."""
    config = _config(file, _architecture(file))
    names = {tensor.name: _name(file, tensor) for tensor in file.tensors if tensor.name != ROPE_FACTORS}
    _check_names(file, set(names.values()), config)
    write_tokenizer(file, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(file))
    return names


def bytes_needed(source: Path) -> int:
    """Disk that `convert` takes: two bytes for each value, and some for the tokenizer."""
    return sum(2 * prod(tensor.shape) for tensor in read_gguf(source).tensors) + 32 * 2**20


def _architecture(file: GgufFile) -> Architecture:
    name = file.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise InputError(
            f"cannot convert a GGUF of architecture {name!r}; known: {', '.join(sorted(ARCHITECTURES))}",
            where=str(file.path),
            fix=USE_FOLDER,
        )
    parts = file.get("split.count", int, 0)
    if parts > 1:
        fix = "join the parts with `llama-gguf-split --merge`"
        raise InputError(f"it is one of {parts} parts", where=str(file.path), fix=fix)
    if file.get(f"{name}.expert_count", int, 0):
        raise InputError("a mixture of experts cannot be converted from GGUF", where=str(file.path), fix=USE_FOLDER)
    architecture, cut = ARCHITECTURES[name], file.get("tokenizer.ggml.pre", str, "(missing)")
    if architecture.only_cut not in ("", cut):
        what = f"transformers cuts the text of {name} models as {architecture.only_cut!r}, this file needs {cut!r}"
        raise InputError(what, where=str(file.path), fix=USE_FOLDER)
    return architecture


def _config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    prefix = file.need("general.architecture", str)
    names = {tensor.name for tensor in file.tensors}
    heads, hidden = file.count(f"{prefix}.attention.head_count"), file.count(f"{prefix}.embedding_length")
    head_dim = file.count(f"{prefix}.attention.key_length", hidden // heads or 1)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.count(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.count(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.count(f"{prefix}.context_length"),
        "rms_norm_eps": _short(file.need(f"{prefix}.attention.layer_norm_rms_epsilon", float)),
        "hidden_act": "silu",
        "vocab_size": _vocabulary_size(file),
        "rope_parameters": _rope(file, prefix, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "bfloat16",
        **_ends(file),
    }
    if architecture.model_type != "qwen2":  # Qwen2 always has a bias on q, k and v and none on o
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    return config


def _vocabulary_size(file: GgufFile) -> int:
    rows = next((tensor.shape[0] for tensor in file.tensors if tensor.name == "token_embd.weight"), 0)
    tokens = len(file.texts("tokenizer.ggml.tokens"))
    if rows < tokens:
        raise InputError(f"{tokens} tokens but {rows} rows in token_embd.weight", where=str(file.path))
    return rows


def _rope(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    theta = _short(file.get(f"{prefix}.rope.freq_base", float, 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotary = file.count(f"{prefix}.rope.dimension_count", head_dim)
    kind = file.get(f"{prefix}.rope.scaling.type", str, "none")
    if rotary != head_dim or head_dim % 2 or theta <= 1 or kind not in ("none", "linear"):
        what = f"rope over {rotary} of {head_dim} dimensions, base {theta}, scaling {kind!r} cannot be carried over"
        raise InputError(what, where=str(file.path), fix=USE_FOLDER)
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": file.need(f"{prefix}.rope.scaling.factor", float)}
    factors = next((tensor for tensor in file.tensors if tensor.name == ROPE_FACTORS), None)
    return rope if factors is None else rope | _llama3_scaling(file, factors, theta, head_dim)


def _llama3_scaling(file: GgufFile, tensor: TensorInfo, theta: float, head_dim: int) -> dict[str, Any]:
    """The rope scaling of Llama 3 from its per-frequency divisors; its other three constants have only one value."""
    factors = read_tensor(file, tensor)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        what = f"the rope divisors in {ROPE_FACTORS} are not those of Llama 3"
        raise InputError(what, where=str(file.path), fix=USE_FOLDER)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _generation_config(file: GgufFile) -> dict[str, Any]:
    stops = sorted({index for name in STOPS if (index := special_id(file, name)) is not None})
    return _ends(file) | {"eos_token_id": stops} if len(stops) > 1 else _ends(file)


def _ends(file: GgufFile) -> dict[str, int]:
    """The ids of the first, last and padding token. A chat model ends with its end of turn where the file has one."""
    eot, eos = special_id(file, "eot"), special_id(file, "eos")
    found = {"bos": special_id(file, "bos"), "eos": eos if eot is None else eot, "pad": special_id(file, "padding")}
    return {f"{name}_token_id": index for name, index in found.items() if index is not None}


def _name(file: GgufFile, tensor: TensorInfo) -> str:
    if tensor.name in TOP_NAMES:
        return TOP_NAMES[tensor.name]
    found = BLOCK.fullmatch(tensor.name)
    if not found or found[2] not in BLOCK_NAMES:
        raise InputError(f"the tensor {tensor.name} is unknown", where=str(file.path), fix=USE_FOLDER)
    return f"model.layers.{found[1]}.{BLOCK_NAMES[found[2]]}.{found[3]}"


def _check_names(file: GgufFile, names: set[str], config: dict[str, Any]) -> None:
    """Exactly the tensors that transformers makes for `config`; it would fill a missing one with random numbers."""
    kind = config["model_type"]
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    parts = {f"{part}.weight" for part in BLOCK_NAMES.values() if kind == "qwen3" or part not in norms}
    biased = ["q", "k", "v"] if kind == "qwen2" or config["attention_bias"] else []
    parts |= {f"self_attn.{name}_proj.bias" for name in biased + ["o"] * (kind != "qwen2" and bool(biased))}
    parts |= {f"mlp.{name}_proj.bias" for name in ("gate", "up", "down") if config.get("mlp_bias")}
    wanted = {f"model.layers.{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in parts}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= set() if config["tie_word_embeddings"] else {"lm_head.weight"}
    for what, found in (("are missing", wanted - names), ("do not belong to the model", names - wanted)):
        if found:
            raise InputError(f"{len(found)} tensors {what}, first {min(found)}", where=str(file.path), fix=USE_FOLDER)


def _write_weights(file: GgufFile, names: dict[str, str], path: Path, head_rows: int) -> None:
    """`head_rows`: rows of a head in the q and k matrices where they must be reordered, else 0."""
    tensors = [tensor for tensor in file.tensors if tensor.name in names]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * prod(tensor.shape)
        header[names[tensor.name]] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            rotated = head_rows if ROTATED.search(tensor.name) else 0
            for values in _values(file, tensor, rotated):
                output.write(_bfloat16(values).tobytes())


def _values(file: GgufFile, tensor: TensorInfo, head_rows: int) -> Iterator[np.ndarray]:
    """The tensor as transformers wants it, some whole heads or rows at a time."""
    unit = head_rows or 1
    if tensor.shape[0] % unit:
        raise InputError(f"the tensor {tensor.name} does not hold whole heads", where=str(file.path))
    step = max(1, CHUNK // (unit * prod(tensor.shape[1:]))) * unit
    for first in range(0, tensor.shape[0] if len(tensor.shape) > 1 else 1, step):
        values = read_tensor(file, tensor, slice(first, first + step))
        if not np.isfinite(values).all():
            raise InputError(f"the tensor {tensor.name} holds NaN or infinite values", where=str(file.path))
        yield halves(values, head_rows) if head_rows else values


def halves(values: np.ndarray, head_rows: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (GGUF) to first and second half (transformers)."""
    pairs = values.reshape(-1, head_rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of finite float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


STOPS = ("eos", "eot", "eom")

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", rotated=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", only_cut="qwen2"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
}
