"""The weights of a model, or of an adapter alone, as a GGUF file; one tensor at a time.

In: a folder that plain transformers loads, the adapter that is added to it, metadata. Out: one file that llama.cpp,
Ollama and `model/gguf.py` read. Matrices take the type that was asked for; vectors, and matrices whose rows do not fill
its blocks, a wider one, as llama.cpp's own converter does. Left out: what the metadata say (`gguf_metadata.py`).
"""

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
from tunesmith.model.gguf.convert import ARCHITECTURES, ROPE_FACTORS, halves
from tunesmith.model.gguf.reader import read_gguf, read_tensor
from tunesmith.model.hub.validate import read_headers
from tunesmith.model.merge import Changes, merged_headers, merged_tensors
from tunesmith.model.save import Lora

TYPES = {name.lower(): GGMLQuantizationType[name] for name in ("F16", "Q8_0", "BF16", "F32")}
QUANTISATION_VERSION = 2  # of the formats of quantised blocks
Place = tuple[str, tuple[int, ...], GGMLQuantizationType]  # name, shape, type in the file


def write_model(
    file: Path,
    spec: ModelSpec,
    changes: Changes,
    metadata: Json,
    factors: np.ndarray | None,
    kind: str,
    narrow: Collection[str] = (),
) -> None:
    """The weights of `spec` with the adapter in them, those of `narrow` as 4 bits left them. GateError for values that
    `kind` cannot hold."""
    headers = {n: h for n, h in read_headers(spec.path).items() if not (spec.tied_head and n == "lm_head.weight")}
    headers = merged_headers(headers, changes)
    names = _names(spec)
    places = {name: (_stored(names, name, spec), h.shape, _type(h.shape, TYPES[kind])) for name, h in headers.items()}
    extra = [] if factors is None else [((ROPE_FACTORS, factors.shape, TYPES["f32"]), factors)]
    weights = ((places[name], _rows(name, tensor, spec)) for name, tensor in merged_tensors(headers, changes, narrow))
    general = {
        "general.type": "model",
        "general.file_type": int(LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]),
        "general.quantization_version": QUANTISATION_VERSION,
    }
    _write(file, spec, general | metadata, [*(p for p, _ in extra), *places.values()], chain(extra, weights))


def write_adapter(file: Path, spec: ModelSpec, loras: Mapping[str, Lora], metadata: Json) -> None:
    """The adapter alone, in fp32. llama.cpp scales it by alpha / rank, also where it was trained as rsLoRA."""
    names, alpha = _names(spec), {lora.scale * lora.a_RI.shape[0] for lora in loras.values()}
    assert len(alpha) == 1, "one rank and one scale"
    tensors: list[tuple[Place, np.ndarray]] = []
    for path, lora in loras.items():
        stored = _stored(names, f"{path}.weight", spec)
        for letter, values in (("a", lora.a_RI.numpy()), ("b", _rows(f"{path}.weight", lora.b_OR, spec))):
            tensors.append(((f"{stored}.lora_{letter}", values.shape, TYPES["f32"]), values))
    general = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha.pop())}
    _write(file, spec, general | metadata, [place for place, _ in tensors], tensors)


def read_adapter(file: Path, spec: ModelSpec) -> dict[str, Lora]:
    """What `write_adapter` wrote: path of a linear of the base -> what is added to it."""
    source, names = read_gguf(file), _names(spec)
    stored = {tensor.name: tensor for tensor in source.tensors}
    loras: dict[str, Lora] = {}
    for name in read_headers(spec.path):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if f"{place}.lora_a" in stored:
            a_RI, b_OR = (read_tensor(source, stored[f"{place}.lora_{letter}"]) for letter in "ab")
            b_OR = halves(b_OR, spec.head_dim) if _rotated(name, spec) else b_OR
            scale = source.need("adapter.lora.alpha", float) / len(a_RI)
            loras[name.removesuffix(".weight")] = Lora(torch.from_numpy(a_RI), torch.from_numpy(b_OR.copy()), scale)
    return loras


# ---------------------------------------------------------------- names, order, bytes


def _names(spec: ModelSpec) -> TensorNameMap:
    return get_tensor_name_map(MODEL_ARCH[spec.model_type.upper()], spec.num_layers)


def _stored(names: TensorNameMap, name: str, spec: ModelSpec) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        what = f"a GGUF of {spec.model_type} has no place for the tensor {name}"
        raise InputError(what, where=str(spec.path), fix="export to merged")
    return found


def _rotated(name: str, spec: ModelSpec) -> bool:
    return ARCHITECTURES[spec.model_type].rotated and (".q_proj." in name or ".k_proj." in name)


def _rows(name: str, tensor: Tensor, spec: ModelSpec) -> np.ndarray:
    """The values with q and k rows in GGUF's order: the halves of each head interleaved."""
    values = tensor.numpy()
    if not _rotated(name, spec):
        return values
    pairs = values.reshape(-1, 2, spec.head_dim // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _type(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return TYPES["f32"]
    return TYPES["f16"] if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _write(
    file: Path, spec: ModelSpec, metadata: Json, places: Iterable[Place], tensors: Iterable[tuple[Place, np.ndarray]]
) -> None:
    """`tensors` come in the order of `places`."""
    with closing(GGUFWriter(file, spec.model_type)) as writer:
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, shape, kind in places:
            block, width = GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // block * width, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for (name, _, kind), values in tensors:
            data = _narrow(name, values, kind)
            stream.write(data.data.cast("B"))  # not numpy's tofile, which hides why a disk refuses
            writer.write_padding(stream, data.nbytes)


def _narrow(name: str, values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    largest = {TYPES["f16"]: 65504.0, TYPES["q8_0"]: 65504.0 * 127}.get(kind, np.inf)
    if np.abs(values).max(initial=0) > largest:
        raise GateError(f"{name} holds values that {kind.name} cannot: nothing is exported", fix="use --type bf16")
    return np.ascontiguousarray(quantize(np.ascontiguousarray(values, dtype=np.float32), kind))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
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
