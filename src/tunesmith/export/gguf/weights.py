"""The weights of a model, or of an adapter alone, as a GGUF file; one tensor at a time.

In: a folder that plain transformers loads, the adapter that is added to it, metadata. Out: one file
that llama.cpp, Ollama and `model/gguf.py` read. Matrices take the type that was asked for; vectors,
and matrices whose rows do not fill its blocks, a wider one, as llama.cpp's own converter does. Left
out: what the metadata say (`gguf_metadata.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Json, ModelSpec
from tunesmith.model.gguf.convert import ARCHITECTURES, ROPE_FACTORS, reverse_permute
from tunesmith.model.gguf.reader import read_gguf, read_tensor
from tunesmith.model.hub.validate import read_headers
from tunesmith.model.merge import WeightDeltas, iter_merged_tensors, merge_headers
from tunesmith.model.save import LoraTensors

TENSOR_TYPES = {name.lower(): GGMLQuantizationType[name] for name in ("F16", "Q8_0", "BF16", "F32")}
QUANTIZATION_VERSION = 2  # of the formats of quantised blocks
TensorSlot = tuple[str, tuple[int, ...], GGMLQuantizationType]  # name, shape, type in the file


def write_model(
    file: Path,
    model_spec: ModelSpec,
    changes: WeightDeltas,
    metadata: Json,
    rope_factors: np.ndarray | None,
    export_type: str,
    dequantized_paths: Collection[str] = (),
) -> None:
    """The weights of `spec` with the adapter in them, those of `narrow` as 4 bits left them.
    GateError for values that `kind` cannot hold."""
    headers = {
        name: header
        for name, header in read_headers(model_spec.path).items()
        if not (model_spec.tie_word_embeddings and name == "lm_head.weight")
    }
    headers = merge_headers(headers, changes)
    name_map = _build_name_map(model_spec)
    slots = {
        name: (
            _map_name(name_map, name, model_spec),
            header.shape,
            _choose_type(header.shape, TENSOR_TYPES[export_type]),
        )
        for name, header in headers.items()
    }
    extra = (
        []
        if rope_factors is None
        else [((ROPE_FACTORS, rope_factors.shape, TENSOR_TYPES["f32"]), rope_factors)]
    )
    weights = (
        (slots[name], _interleave_halves(name, tensor, model_spec))
        for name, tensor in iter_merged_tensors(headers, changes, dequantized_paths)
    )
    general = {
        "general.type": "model",
        "general.file_type": int(
            LlamaFileType.ALL_F32
            if export_type == "f32"
            else LlamaFileType[f"MOSTLY_{export_type.upper()}"]
        ),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    _write_gguf(
        file,
        model_spec,
        general | metadata,
        [*(slot for slot, _ in extra), *slots.values()],
        chain(extra, weights),
    )


def write_adapter(
    file: Path, model_spec: ModelSpec, loras: Mapping[str, LoraTensors], metadata: Json
) -> None:
    """The adapter alone, in fp32. llama.cpp scales it by alpha / rank, also where it was trained as
    rsLoRA."""
    name_map, alphas = (
        _build_name_map(model_spec),
        {lora.scale * lora.a_RI.shape[0] for lora in loras.values()},
    )
    assert len(alphas) == 1, "one rank and one scale"
    tensors: list[tuple[TensorSlot, np.ndarray]] = []
    for path, lora in loras.items():
        gguf_name = _map_name(name_map, f"{path}.weight", model_spec)
        for letter, values in (
            ("a", lora.a_RI.numpy()),
            ("b", _interleave_halves(f"{path}.weight", lora.b_OR, model_spec)),
        ):
            tensors.append(
                ((f"{gguf_name}.lora_{letter}", values.shape, TENSOR_TYPES["f32"]), values)
            )
    general = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alphas.pop()),
    }
    _write_gguf(file, model_spec, general | metadata, [slot for slot, _ in tensors], tensors)


def read_adapter(file: Path, model_spec: ModelSpec) -> dict[str, LoraTensors]:
    """What `write_adapter` wrote: path of a linear of the base -> what is added to it."""
    source, name_map = read_gguf(file), _build_name_map(model_spec)
    tensors_by_name = {tensor.name: tensor for tensor in source.tensors}
    loras: dict[str, LoraTensors] = {}
    for name in read_headers(model_spec.path):
        gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if f"{gguf_name}.lora_a" in tensors_by_name:
            a_RI, b_OR = (
                read_tensor(source, tensors_by_name[f"{gguf_name}.lora_{letter}"])
                for letter in "ab"
            )
            b_OR = (
                reverse_permute(b_OR, model_spec.head_dim)
                if _is_rotated(name, model_spec)
                else b_OR
            )
            scale = source.require("adapter.lora.alpha", float) / len(a_RI)
            loras[name.removesuffix(".weight")] = LoraTensors(
                torch.from_numpy(a_RI), torch.from_numpy(b_OR.copy()), scale
            )
    return loras


# ---------------------------------------------------------------- names, order, bytes


def _build_name_map(model_spec: ModelSpec) -> TensorNameMap:
    return get_tensor_name_map(MODEL_ARCH[model_spec.model_type.upper()], model_spec.num_layers)


def _map_name(name_map: TensorNameMap, name: str, model_spec: ModelSpec) -> str:
    gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        message = f"a GGUF of {model_spec.model_type} has no place for the tensor {name}"
        raise InputError(message, where=str(model_spec.path), fix="export to merged")
    return gguf_name


def _is_rotated(name: str, model_spec: ModelSpec) -> bool:
    return ARCHITECTURES[model_spec.model_type].has_interleaved_qk and (
        ".q_proj." in name or ".k_proj." in name
    )


def _interleave_halves(name: str, tensor: Tensor, model_spec: ModelSpec) -> np.ndarray:
    """The values with q and k rows in GGUF's order: the halves of each head interleaved."""
    values = tensor.numpy()
    if not _is_rotated(name, model_spec):
        return values
    pairs = values.reshape(-1, 2, model_spec.head_dim // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _choose_type(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return TENSOR_TYPES["f32"]
    return TENSOR_TYPES["f16"] if shape[-1] % GGML_QUANT_SIZES[tensor_type][0] else tensor_type


def _write_gguf(
    file: Path,
    model_spec: ModelSpec,
    metadata: Json,
    slots: Iterable[TensorSlot],
    tensors: Iterable[tuple[TensorSlot, np.ndarray]],
) -> None:
    """`tensors` come in the order of `places`."""
    with closing(GGUFWriter(file, model_spec.model_type)) as writer:
        for key, value in metadata.items():
            _add_metadata(writer, key, value)
        for name, shape, tensor_type in slots:
            block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
            writer.add_tensor_info(
                name,
                shape,
                np.dtype(np.float32),
                prod(shape) // block_size * block_bytes,
                raw_dtype=tensor_type,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for (name, _, tensor_type), values in tensors:
            data = _quantize_tensor(name, values, tensor_type)
            stream.write(data.data.cast("B"))  # not numpy's tofile, which hides why a disk refuses
            writer.write_padding(stream, data.nbytes)


def _quantize_tensor(
    name: str, values: np.ndarray, tensor_type: GGMLQuantizationType
) -> np.ndarray:
    max_value = {TENSOR_TYPES["f16"]: 65504.0, TENSOR_TYPES["q8_0"]: 65504.0 * 127}.get(
        tensor_type, np.inf
    )
    if np.abs(values).max(initial=0) > max_value:
        raise GateError(
            f"{name} holds values that {tensor_type.name} cannot: nothing is exported",
            fix="use --type bf16",
        )
    return np.ascontiguousarray(
        quantize(np.ascontiguousarray(values, dtype=np.float32), tensor_type)
    )


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
