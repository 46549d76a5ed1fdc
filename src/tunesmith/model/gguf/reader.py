"""The header of a GGUF file: metadata and the table of tensors.

In: a path. Out: `GgufFile`, plain Python values; tensor data stay on disk until `read_tensor` asks for one.
Left out: what the values mean (`gguf.py`, `gguf_tokenizer.py`). Written here and not taken from the `gguf` package
because a header comes from strangers: there, an array length that the file cannot hold is an endless loop; here every
read is checked against the end of the file.
"""

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
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**40


@dataclass(frozen=True)
class TensorInfo:
    """One line of the tensor table. `shape` is outermost first, as PyTorch counts; `begin` is a file offset."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value of `key`, which must be of type `kind`; `default` where the header has no such key."""
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or value in (inf, -inf) or value != value:
            raise InputError(f"{key} is {str(value)[:80]!r}, not a sound {kind.__name__}", where=str(self.path))
        return value  # pyright: ignore[reportReturnType]

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`, which must be there."""
        if key not in self.metadata:
            raise InputError(f"the GGUF header has no {key}", where=str(self.path), fix="use a complete GGUF file")
        return self.get(key, kind, kind())

    def count(self, key: str, default: int = 0) -> int:
        """The whole number from 1 on under `key`; without a default it must be there."""
        value = self.get(key, int, default) if default else self.need(key, int)
        if not 1 <= value < 2**31:
            raise InputError(f"{key} is {value}", where=str(self.path), fix="use a sound GGUF file")
        return value

    def texts(self, key: str) -> list[str]:
        """The list of texts under `key`, which must be there."""
        values = self.need(key, list)
        if not all(type(value) is str for value in values):
            raise InputError(f"{key} is not a list of texts", where=str(self.path), fix="use a sound GGUF file")
        return values


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of `path`. InputError when it is not GGUF, is cut short or contradicts itself."""
    try:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        return _parse(path, memoryview(data))  # pyright: ignore[reportArgumentType]
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        fix = "download it again; a GGUF file of version 2 or 3 is expected"
        raise InputError(f"not a readable GGUF file ({error})", where=str(path), fix=fix) from error


def read_tensor(file: GgufFile, tensor: TensorInfo, rows: slice = slice(None)) -> np.ndarray:
    """The values of one tensor or of some of its rows, dequantised to float32, in PyTorch's order."""
    block, width = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = tensor.shape[-1] // block * width
    first, last, _ = rows.indices(tensor.shape[0]) if len(tensor.shape) > 1 else (0, 1, 1)
    inner = prod(tensor.shape[1:-1])
    count, begin = (last - first) * inner * row_bytes, tensor.begin + first * inner * row_bytes
    raw = np.fromfile(file.path, dtype=np.uint8, count=count, offset=begin).reshape(-1, row_bytes)
    try:
        values = np.asarray(dequantize(raw, tensor.kind), dtype=np.float32)
    except NotImplementedError as error:
        fix = "use a GGUF of another quantisation, or the safetensors folder"
        what = f"cannot dequantise {tensor.kind.name} ({tensor.name})"
        raise InputError(what, where=str(file.path), fix=fix) from error
    return values.reshape(-1, *tensor.shape[1:])


class _Cursor:
    """A position in the bytes of the file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("the file ends inside its header")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        return str(self.take(self.scalar("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self.scalar(SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == STRING:
            return [self.text() for _ in range(self._checked(count, 8))]
        if kind not in SCALARS:
            raise ValueError(f"unsupported array of metadata type {kind}")
        layout = SCALARS[kind]
        size = struct.calcsize(layout)
        numbers = np.frombuffer(self.take(self._checked(count, size) * size), dtype=np.dtype(layout))
        return numbers.tolist()

    def _checked(self, count: int, size: int) -> int:
        if count * size > len(self.data) - self.at:
            raise ValueError(f"an array of {count} entries does not fit in the file")
        return count


def _parse(path: Path, data: memoryview) -> GgufFile:
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}")
    tensor_count, entry_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key, kind = cursor.text(), cursor.scalar("<I")
        if key in metadata:
            raise ValueError(f"{key} stands twice in the header")
        metadata[key] = cursor.value(kind)
    return GgufFile(path, metadata, tuple(_tensors(cursor, tensor_count, metadata.get("general.alignment", 32))))


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> Iterator[TensorInfo]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment}")
    table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.scalar("<I")
        if name in table or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} stands twice or has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
        table[name] = shape, GGMLQuantizationType(cursor.scalar("<I")), cursor.scalar("<Q")
    start = -(-cursor.at // alignment) * alignment
    for name, (shape, kind, offset) in table.items():
        block, width = GGML_QUANT_SIZES[kind]
        if not 0 < prod(shape) <= MAX_ELEMENTS or shape[-1] % block:
            raise ValueError(f"tensor {name} has shape {shape}")
        nbytes = prod(shape) // block * width
        if start + offset + nbytes > len(cursor.data):
            raise ValueError(f"the data of tensor {name} end after the file")
        yield TensorInfo(name, shape, kind, start + offset, nbytes)
