"""Read the header of a GGUF file: metadata and the table of tensors.

In: a path. Out: `GgufFile`, with plain Python values; tensor data stay on disk until `read_tensor`.
Left out: the meaning of the values (convert.py, tokenizer.py). Not taken from the `gguf` package,
because headers are untrusted: there, an array length larger than the file is an endless loop; here
every read is checked against the end of the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from tunesmith.core.errors import InputError

T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING = 8
ARRAY = 9
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**40


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table. `shape` is outermost first, as in PyTorch; `begin` is a file
    offset."""

    name: str
    shape: tuple[int, ...]
    quant_type: GGMLQuantizationType
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The parsed header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def get(self, key: str, value_type: type[T], default: T) -> T:
        """Return the value of `key`, `default` if it is missing. Raise InputError unless it is a
        finite value of `value_type`."""
        value = self.metadata.get(key, default)
        if value_type is float and type(value) is int:
            value = float(value)
        if type(value) is not value_type or value in (inf, -inf) or value != value:
            message = f"{key} is {str(value)[:80]!r}, not a valid {value_type.__name__}"
            raise InputError(message, where=str(self.path))
        return value  # pyright: ignore[reportReturnType]

    def require(self, key: str, value_type: type[T]) -> T:
        """Return the value of `key`. Raise InputError if it is missing or of another type."""
        if key not in self.metadata:
            message = f"the GGUF header has no {key}"
            raise InputError(message, where=str(self.path), fix="use a complete GGUF file")
        return self.get(key, value_type, value_type())

    def get_count(self, key: str, default: int = 0) -> int:
        """Return the positive integer `key`; without a default it is required."""
        value = self.get(key, int, default) if default else self.require(key, int)
        if not 1 <= value < 2**31:
            message = f"{key} is {value}, not a positive 32-bit integer"
            raise InputError(message, where=str(self.path), fix="use a valid GGUF file")
        return value

    def get_strings(self, key: str) -> list[str]:
        """Return the list of strings `key`, which is required."""
        values = self.require(key, list)
        if not all(type(value) is str for value in values):
            message = f"{key} is not a list of strings"
            raise InputError(message, where=str(self.path), fix="use a valid GGUF file")
        return values


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of `path`. Raise InputError if it is not GGUF, truncated or inconsistent."""
    try:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        return _parse_header(path, memoryview(data))  # pyright: ignore[reportArgumentType]
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        fix = "download it again; a GGUF file of version 2 or 3 is expected"
        raise InputError(f"not a readable GGUF file ({error})", where=str(path), fix=fix) from error


def read_tensor(file: GgufFile, tensor: TensorInfo) -> np.ndarray:
    """Return one tensor, dequantized to float32, in PyTorch's order."""
    block_size, type_size = GGML_QUANT_SIZES[tensor.quant_type]
    row_bytes = tensor.shape[-1] // block_size * type_size
    raw = np.fromfile(file.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.begin)
    raw = raw.reshape(-1, row_bytes)
    try:
        values = np.asarray(dequantize(raw, tensor.quant_type), dtype=np.float32)
    except NotImplementedError as error:
        fix = "use a GGUF of another quantization, or the safetensors folder"
        message = f"cannot dequantize {tensor.quant_type.name} ({tensor.name})"
        raise InputError(message, where=str(file.path), fix=fix) from error
    return values.reshape(tensor.shape)


class _Cursor:
    """A position in the bytes of the file."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.offset = 0

    def read_bytes(self, count: int) -> memoryview:
        if count > len(self.data) - self.offset:
            raise ValueError("the file ends inside its header")
        chunk = self.data[self.offset : self.offset + count]
        self.offset += count
        return chunk

    def read_scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.read_bytes(struct.calcsize(layout)))[0]

    def read_string(self) -> str:
        return str(self.read_bytes(self.read_scalar("<Q")), "utf-8")

    def read_value(self, metadata_type: int) -> Any:
        if metadata_type == STRING:
            return self.read_string()
        if metadata_type == ARRAY:
            return self.read_array(self.read_scalar("<I"), self.read_scalar("<Q"))
        if metadata_type not in SCALARS:
            raise ValueError(f"unknown metadata type {metadata_type}")
        return self.read_scalar(SCALARS[metadata_type])

    def read_array(self, metadata_type: int, count: int) -> list[Any]:
        if metadata_type == STRING:
            return [self.read_string() for _ in range(self._check_length(count, 8))]
        if metadata_type not in SCALARS:
            raise ValueError(f"unsupported array of metadata type {metadata_type}")
        layout = SCALARS[metadata_type]
        size = struct.calcsize(layout)
        raw = self.read_bytes(self._check_length(count, size) * size)
        return np.frombuffer(raw, dtype=np.dtype(layout)).tolist()

    def _check_length(self, count: int, size: int) -> int:
        if count * size > len(self.data) - self.offset:
            raise ValueError(f"an array of {count} entries does not fit in the file")
        return count


def _parse_header(path: Path, data: memoryview) -> GgufFile:
    cursor = _Cursor(data)
    if bytes(cursor.read_bytes(4)) != MAGIC:
        raise ValueError("it does not start with GGUF")
    version = cursor.read_scalar("<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}")
    tensor_count = cursor.read_scalar("<Q")
    entry_count = cursor.read_scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.read_string()
        metadata_type = cursor.read_scalar("<I")
        if key in metadata:
            raise ValueError(f"the key {key} is repeated")
        metadata[key] = cursor.read_value(metadata_type)
    alignment = metadata.get("general.alignment", 32)
    return GgufFile(path, metadata, tuple(_iter_tensors(cursor, tensor_count, alignment)))


def _iter_tensors(cursor: _Cursor, count: int, alignment: Any) -> Iterator[TensorInfo]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment}")
    table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(count):
        name = cursor.read_string()
        dimensions = cursor.read_scalar("<I")
        if name in table or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} is repeated or has {dimensions} dimensions")
        shape = tuple(cursor.read_scalar("<Q") for _ in range(dimensions))[::-1]
        quant_type = GGMLQuantizationType(cursor.read_scalar("<I"))
        table[name] = (shape, quant_type, cursor.read_scalar("<Q"))
    start = -(-cursor.offset // alignment) * alignment
    for name, (shape, quant_type, offset) in table.items():
        block_size, type_size = GGML_QUANT_SIZES[quant_type]
        if not 0 < prod(shape) <= MAX_ELEMENTS or shape[-1] % block_size:
            raise ValueError(f"tensor {name} has shape {shape}")
        nbytes = prod(shape) // block_size * type_size
        if start + offset + nbytes > len(cursor.data):
            raise ValueError(f"the data of tensor {name} end beyond the file")
        yield TensorInfo(name, shape, quant_type, start + offset, nbytes)
