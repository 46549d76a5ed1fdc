"""Exports for llama.cpp and engines built on it: a merged model as a GGUF file.

In: an ExportJob. Out: `model-TYPE.gguf`, written tensor by tensor. Matrices have the requested
type; vectors, and matrices with rows that do not fill its blocks, a wider one, as in llama.cpp's
own converter. Only families that our reader and llama.cpp support are written; others are refused
by name. A GGUF has only the name of a pre-tokenizer: the one that splits a probe text like the
original. Read back by transformers' own GGUF reader, with tokenizer and template from the file
alone. Left out: SentencePiece vocabularies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
    quantize,
)
from tokenizers import Tokenizer
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Json, ModelSpec
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.export.parity import ExportJob, ReloadedExport
from tunesmith.export.request import FALLBACK_HINT, TOKENIZER_FILE, refuse_unless_bpe
from tunesmith.model.gguf.convert import (
    ARCHITECTURES,
    LFM2,
    QWEN3_MOE,
    ROPE_FACTORS,
    write_settings,
)
from tunesmith.model.gguf.reader import GgufFile, read_gguf
from tunesmith.model.gguf.tokenizer import (
    CONTROL_TYPE,
    PRE_TOKENIZERS,
    UNUSED_TYPE,
    USER_DEFINED_TYPE,
    build_tokenizer,
    find_special_id,
)
from tunesmith.model.hub.families import count_experts, count_experts_per_token
from tunesmith.model.hub.validate import TensorHeader, read_headers, read_model_json
from tunesmith.model.merge import (
    WeightDeltas,
    iter_merged_tensors,
    merge_headers,
    refuse_packed_merge,
)
from tunesmith.model.reference_load import encode_stock_prompts, load_config_dict, load_gguf

NORMAL_TYPE = 1
# in llama.cpp, whose files of other architectures may have a bias of attn_output
ARCHITECTURES_WITHOUT_BIAS = ("qwen3", QWEN3_MOE)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Digits, contractions, white space, scripts, marks and symbols: every pre-tokenizer splits this
# text differently.
PROBE_TEXT = (
    "It's 7 77 777 7777 77777, 3.14e-05; WE'LL they'd i'M\n\n\n  x\t\ty \r\n\r\n"
    "    def f(a_b):\n\treturn a[1:]  \n"
    "naïve e\u0301te\u0301 Zürich-West straße 日本語テキスト 한국어 "
    "русский ไทย हिन्दी العربية 12٣٤ ½ Ⅷ "
    '🤗👩\u200d👩\u200d👧 !!??...  //  <b>x</b> {"k": [1,2]} a\u00a0b \u3000c '
    "HTTPServer2Go foo123bar 1st 2nd   "
)
TENSOR_TYPES = {name.lower(): GGMLQuantizationType[name] for name in ("F16", "Q8_0", "BF16", "F32")}
QUANTIZATION_VERSION = 2  # of the block formats
TensorSlot = tuple[str, tuple[int, ...], GGMLQuantizationType]  # name, shape, type in the file
EXPERT_NAME = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.+)")  # layer, expert, matrix
CONV_NAME = ".conv.conv.weight"  # of LFM2: [H, 1, K], in a GGUF [H, K]


def build_architecture(config: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    """Return the sizes under llama.cpp's keys, and the RoPE divisors of Llama 3, else None.

    Raises InputError for a model that cannot be written.
    """
    name = find_architecture(spec)
    where = str(spec.path / "config.json")
    if spec.tensor_prefix:
        message = "cannot write a GGUF of the text part of a multimodal model"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if config.get("hidden_act", "silu") != "silu":
        message = f"a GGUF of {name} cannot express this model's hidden_act"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if config.get("use_sliding_window"):
        message = f"a GGUF of {name} cannot express this model's sliding window"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    if name in ARCHITECTURES_WITHOUT_BIAS and config.get("attention_bias"):
        message = f"llama.cpp does not load a bias of o_proj in a {name}"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    rope, rope_factors = _build_rope(config["rope_parameters"], spec)
    sizes = {
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 0)),
        "vocab_size": spec.vocab_size,
        "rope.dimension_count": spec.head_dim,
        **rope,
    }
    if name == QWEN3_MOE:
        sizes |= _describe_experts(config, where)
    if name == LFM2:
        sizes |= _describe_convolutions(config, spec)
    return {f"{name}.{key}": value for key, value in sizes.items()}, rope_factors


def find_architecture(spec: ModelSpec) -> str:
    """Return llama.cpp's name for a model type. Raise InputError if we cannot write it."""
    names = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
    if spec.model_type not in names:
        message = f"cannot write a GGUF of {spec.model_type}; supported: {', '.join(names)}"
        raise InputError(message, where=str(spec.path), fix=FALLBACK_HINT)
    return names[spec.model_type]


def _describe_experts(config: Json, where: str) -> Json:
    """Return the sizes of experts in all layers, whose probabilities llama.cpp scales to a sum of
    1. Raise InputError for others."""
    is_mixed = bool(config["mlp_only_layers"]) or config["decoder_sparse_step"] != 1
    if is_mixed or not config["norm_topk_prob"]:
        problem = "layers without experts" if is_mixed else "norm_topk_prob: false"
        message = f"a GGUF of qwen3_moe cannot express {problem}"
        raise InputError(message, where=where, fix=FALLBACK_HINT)
    return {
        "expert_count": count_experts(config),
        "expert_used_count": count_experts_per_token(config),
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "feed_forward_length": config["intermediate_size"],
    }


def _describe_convolutions(config: Json, spec: ModelSpec) -> Json:
    """Return what LFM2 has besides attention. A layer without keys and values is a convolution."""
    if config.get("conv_bias"):
        message = "a GGUF of lfm2 cannot express the bias of convolutions"
        raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)
    if spec.num_heads * spec.head_dim != spec.hidden_size:
        message = (
            f"llama.cpp does not load an lfm2 with {spec.num_heads} heads of {spec.head_dim} in "
            f"hidden states of {spec.hidden_size}"
        )
        raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)
    heads = [spec.num_kv_heads if mixer == "attention" else 0 for mixer in spec.layer_mixers]
    return {
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "shortconv.l_cache": config["conv_L_cache"],
    }


def _build_rope(rope: Json, spec: ModelSpec) -> tuple[Json, np.ndarray | None]:
    rope_type = rope.get("rope_type", "default")
    theta = float(rope["rope_theta"])
    metadata: Json = {"rope.freq_base": theta}
    if rope.get("partial_rotary_factor", 1) == 1:
        if rope_type == "default":
            return metadata, None
        if rope_type == "linear":
            metadata["rope.scaling.type"] = "linear"
            metadata["rope.scaling.factor"] = float(rope["factor"])
            return metadata, None
        has_llama3_values = all(rope.get(key) == value for key, value in LLAMA3_ROPE.items())
        if rope_type == "llama3" and has_llama3_values:
            return metadata, _compute_llama3_divisors(theta, float(rope["factor"]), spec.head_dim)
    message = f"cannot write a GGUF with RoPE parameters {rope}"
    raise InputError(message, where=str(spec.path / "config.json"), fix=FALLBACK_HINT)


def _compute_llama3_divisors(theta: float, factor: float, head_dim: int) -> np.ndarray:
    """Return 1 for short wavelengths, `factor` for long ones, and values between for the rest."""
    low_freq_factor, high_freq_factor, original_length = LLAMA3_ROPE.values()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    position = original_length / wavelengths - low_freq_factor
    smooth = np.clip(position / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---------------------------------------------------------------- vocabulary


def build_vocabulary(folder: Path, renderer: Renderer, vocab_size: int) -> Json:
    """Return tokens, merges, pre-tokenizer, special tokens and chat templates.

    vocab_size: rows of the embedding, some without a token.
    """
    data = read_model_json(folder / TOKENIZER_FILE)
    config = read_model_json(folder / "tokenizer_config.json")
    added_tokens = _read_added_tokens(data, config, folder)
    texts = {index: text for text, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL_TYPE)
    for index, token in added_tokens.items():
        texts[index] = token["content"]
        types[index] = CONTROL_TYPE if token["special"] else USER_DEFINED_TYPE
    merges = data["model"]["merges"]
    metadata: Json = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [types.get(i, UNUSED_TYPE) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ],
        "tokenizer.ggml.add_bos_token": bool(renderer.tokenizer.bos_ids),
        **_collect_special_ids(renderer),
    }
    for name, template in renderer.templates.items():
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = template.source
    metadata["tokenizer.ggml.pre"] = _find_pre_tokenizer(folder / TOKENIZER_FILE, metadata)
    return metadata


def _read_added_tokens(data: Json, config: Json, folder: Path) -> dict[int, Json]:
    refuse_unless_bpe(data, folder / TOKENIZER_FILE)
    added = {token["id"]: token for token in data["added_tokens"]}
    added |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for token in added.values():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            message = f"a GGUF cannot express how {token['content']} strips the text around it"
            raise InputError(message, where=str(folder / TOKENIZER_FILE), fix=FALLBACK_HINT)
    return added


def _collect_special_ids(renderer: Renderer) -> Json:
    """Return the ids of special tokens.

    eos is the token that answers were trained to end with, since most engines stop at no other. Two
    more end tokens become eot and eom, the model's own EOS first.
    """
    tokenizer = renderer.tokenizer
    metadata: Json = {}
    for name, key in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token_id = tokenizer.token_to_id(tokenizer.special_tokens.get(key, ""))
        if token_id is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = token_id
    candidates = (*renderer.end_ids[:1], tokenizer.eos_id, *renderer.end_ids)
    end_ids = list(dict.fromkeys(index for index in candidates if index is not None))
    for name, token_id in zip(("eos", "eot", "eom"), end_ids, strict=False):
        metadata[f"tokenizer.ggml.{name}_token_id"] = token_id
    metadata["tokenizer.ggml.eos_token_ids"] = end_ids
    return metadata


def _find_pre_tokenizer(file: Path, metadata: Json) -> str:
    """Return the name of the pre-tokenizer that splits and encodes like the original.

    Raises InputError if there is none.
    """
    original = Tokenizer.from_file(str(file))
    pieces = _split_probe(original)
    ids = original.encode(PROBE_TEXT).ids
    for name in PRE_TOKENIZERS:
        rebuilt = build_tokenizer(GgufFile(file, metadata | {"tokenizer.ggml.pre": name}, ()))
        if _split_probe(rebuilt) == pieces and rebuilt.encode(PROBE_TEXT).ids == ids:
            return name
    message = f"unsupported pre-tokenizer; supported: {', '.join(PRE_TOKENIZERS)}"
    raise InputError(message, where=str(file), fix=FALLBACK_HINT)


def _split_probe(tokenizer: Tokenizer) -> Sequence[str]:
    text = PROBE_TEXT
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    if not tokenizer.pre_tokenizer:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def write_model(
    file: Path,
    model_spec: ModelSpec,
    changes: WeightDeltas,
    metadata: Json,
    rope_factors: np.ndarray | None,
    export_type: str,
    quantized_paths: Collection[str] = (),
) -> None:
    """Write the weights of a model with the adapter merged in.

    quantized_paths: matrices that are quantized to 4 bits and back before merging. Raises
    GateError for values that the type cannot represent.
    """
    refuse_packed_merge(model_spec.path, changes)
    headers = dict(read_headers(model_spec.path))
    if model_spec.tie_word_embeddings:
        headers.pop("lm_head.weight", None)
    headers = _sort_experts(merge_headers(headers, changes))
    name_map = _build_name_map(model_spec)
    tensor_type = TENSOR_TYPES[export_type]
    slots: dict[str, TensorSlot] = {}
    num_parts = Counter(_name_stack(name) for name in headers)
    for name, header in headers.items():
        stack = _name_stack(name)
        shape = header.shape if stack == name else (num_parts[stack], *header.shape)
        if name.endswith(CONV_NAME):
            shape = (shape[0], shape[2])
        gguf_name = _map_name(name_map, stack, model_spec)
        slots[name] = (gguf_name, shape, _choose_type(stack, shape, tensor_type))
    extra: list[tuple[TensorSlot, np.ndarray]] = []
    if rope_factors is not None:
        extra.append(((ROPE_FACTORS, rope_factors.shape, TENSOR_TYPES["f32"]), rope_factors))
    weights = (
        (slots[name], _interleave_halves(name, tensor, model_spec))
        for name, tensor in iter_merged_tensors(headers, changes, quantized_paths)
    )
    file_type = LlamaFileType.ALL_F32
    if export_type != "f32":
        file_type = LlamaFileType[f"MOSTLY_{export_type.upper()}"]
    general = {
        "general.type": "model",
        "general.file_type": int(file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    # a slot of all experts of a layer once
    all_slots = [*(slot for slot, _ in extra), *dict.fromkeys(slots.values())]
    _write_gguf(file, model_spec, general | metadata, all_slots, chain(extra, weights))


# ---------------------------------------------------------------- names, order, bytes


def _build_name_map(model_spec: ModelSpec) -> TensorNameMap:
    architecture = MODEL_ARCH[find_architecture(model_spec).upper()]
    return get_tensor_name_map(architecture, model_spec.num_layers)


def _name_stack(name: str) -> str:
    """Return the name of the tensor that a matrix is stored in: all experts of a layer share it."""
    match = EXPERT_NAME.fullmatch(name)
    return f"{match[1]}.{match[3]}" if match else name


def _sort_experts(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Order the matrices of experts by their tensor, then by number. Raise InputError for experts
    that are stored in one tensor."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name, header in headers.items():
        if ".mlp.experts." in name and len(header.shape) == 3:
            message = f"the experts in {name} are stored in one tensor"
            fix = "export to merged or peft, which keep the model's own files"
            raise InputError(message, where=str(header.file), fix=fix)
        match = EXPERT_NAME.fullmatch(name)
        stacks.setdefault(_name_stack(name), []).append((int(match[2]) if match else 0, name))
    return {name: headers[name] for parts in stacks.values() for _, name in sorted(parts)}


def _map_name(name_map: TensorNameMap, name: str, model_spec: ModelSpec) -> str:
    gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        message = f"a GGUF of {model_spec.model_type} has no name for the tensor {name}"
        raise InputError(message, where=str(model_spec.path), fix="export to merged")
    return gguf_name


def _is_rotated(name: str, model_spec: ModelSpec) -> bool:
    is_qk = ".q_proj." in name or ".k_proj." in name
    return is_qk and ARCHITECTURES[find_architecture(model_spec)].has_interleaved_qk


def _interleave_halves(name: str, tensor: Tensor, model_spec: ModelSpec) -> np.ndarray:
    """Return the values; rows of q and k in GGUF's order, the halves of each head interleaved."""
    values = tensor.numpy()
    if not _is_rotated(name, model_spec):
        return values
    pairs = values.reshape(-1, 2, model_spec.head_dim // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _choose_type(
    name: str, shape: tuple[int, ...], tensor_type: GGMLQuantizationType
) -> GGMLQuantizationType:
    """Return the type of a tensor. llama.cpp reads vectors, routers and convolutions in fp32."""
    if len(shape) == 1 or name.endswith((".mlp.gate.weight", CONV_NAME)):
        return TENSOR_TYPES["f32"]
    return TENSOR_TYPES["f16"] if shape[-1] % GGML_QUANT_SIZES[tensor_type][0] else tensor_type


def _write_gguf(
    file: Path,
    model_spec: ModelSpec,
    metadata: Json,
    slots: Iterable[TensorSlot],
    tensors: Iterable[tuple[TensorSlot, np.ndarray]],
) -> None:
    """Write a GGUF file. `tensors` are in the order of `slots`."""
    with closing(GGUFWriter(file, find_architecture(model_spec))) as writer:
        for key, value in metadata.items():
            _add_metadata(writer, key, value)
        for name, shape, tensor_type in slots:
            block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
            num_bytes = prod(shape) // block_size * block_bytes
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        num_written = 0
        for (name, shape, tensor_type), values in tensors:
            data = _quantize_tensor(name, values, tensor_type)
            # Not numpy's tofile, which hides the errno of a full disk.
            stream.write(data.data.cast("B"))
            num_written += data.nbytes
            block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
            if num_written == prod(shape) // block_size * block_bytes:  # experts come one by one
                writer.write_padding(stream, num_written)
                num_written = 0


def _quantize_tensor(
    name: str, values: np.ndarray, tensor_type: GGMLQuantizationType
) -> np.ndarray:
    max_values = {TENSOR_TYPES["f16"]: 65504.0, TENSOR_TYPES["q8_0"]: 65504.0 * 127}
    if np.abs(values).max(initial=0) > max_values.get(tensor_type, np.inf):
        message = f"{name} has values that {tensor_type.name} cannot represent"
        raise GateError(message, fix="nothing was written; use --type bf16")
    values = np.ascontiguousarray(values, dtype=np.float32)
    return np.ascontiguousarray(quantize(values, tensor_type))


def _add_metadata(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def get_model_path(job: ExportJob) -> Path:
    return job.folder / f"model-{job.export_type}.gguf"


def write_gguf(job: ExportJob) -> None:
    run = job.run
    spec = run.model_spec
    sizes, rope_factors = build_architecture(load_config_dict(spec.path), spec)
    metadata = {
        "general.name": f"{Path(spec.name).name} {run.name}",
        **sizes,
        **build_vocabulary(run.saved_dir, run.renderer, spec.vocab_size),
    }
    write_model(
        get_model_path(job),
        spec,
        run.changes,
        metadata,
        rope_factors,
        job.export_type,
        run.quantized_paths,
    )


def reload_gguf(job: ExportJob) -> ReloadedExport:
    """Load weights by transformers' reader; tokenizer, template and end tokens from the file."""
    file = get_model_path(job)
    with TemporaryDirectory() as temp_dir:
        settings_dir = Path(temp_dir)
        gguf_file = read_gguf(file)
        write_settings(gguf_file, settings_dir)
        chats = [(example.messages, example.tools) for example in job.chat_examples]
        rendered_ids = encode_stock_prompts(
            settings_dir, chats, job.run.recipe.chat_template_kwargs
        )
        special_ids = [find_special_id(gguf_file, name) for name in ("eos", "eot", "eom")]
        end_ids = tuple(dict.fromkeys(index for index in special_ids if index is not None))
        return ReloadedExport(load_gguf(file, settings_dir), rendered_ids, end_ids)
