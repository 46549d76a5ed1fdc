"""Parquet files as JSON Lines.

    path -> TempCopy with one JSON object per line

Row groups are decoded in order, a few hundred rows at a time. Binary columns (images, audio) are
dropped: only text is trained. Inside a struct Parquet cannot tell a missing key from null, so a
null there is a missing key. Numbers that are not finite (how pandas writes a missing value) become
null; dates and decimals become strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError, raise_if_machine_failed
from tunesmith.core.types import Json
from tunesmith.data.readers.local_file import CHUNK_BYTES, TempCopy

BATCH_ROWS = 256  # decoded at a time


def unpack_parquet(path: Path) -> TempCopy:
    """Write the rows of a Parquet file as JSON Lines into a temporary file.

    Raises InputError if pyarrow is missing, or the file is damaged or has no text column."""
    where = str(path)
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install 'tunesmith[parquet]', or convert the file to .jsonl"
        raise InputError("reading Parquet files needs pyarrow", where=where, fix=fix) from None
    temp_copy = TempCopy(path)
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            for row in _iter_rows(file, where):
                temp_copy.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (pyarrow.ArrowException, OSError) as error:
        raise_if_machine_failed(error, where)
        message = f"damaged Parquet file: {' '.join(str(error).split()):.200}"
        raise InputError(message, where=where, fix="download or write it again") from None
    except UnicodeDecodeError as error:
        message = f"a text is not UTF-8: {error}"
        raise InputError(message, where=where, fix="write the file again") from None
    return temp_copy


def _iter_rows(file: Any, where: str) -> Iterator[Json]:
    names = [field.name for field in file.schema_arrow if not _has_binary(field.type)]
    if not names:
        fix = "write the texts as string columns"
        raise InputError("no column has text", where=where, fix=fix)
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        message = f"two columns have the name {duplicate!r}"
        raise InputError(message, where=where, fix="rename one of them")
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        for row in batch.to_pylist():
            yield {name: _to_json_value(value) for name, value in row.items()}


def _has_binary(kind: Any) -> bool:
    """Tell whether an Arrow type is binary, or nests a binary type."""
    import pyarrow.types as kinds

    if (
        kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_fixed_size_binary(kind)
        or kinds.is_binary_view(kind)
    ):
        return True
    return any(_has_binary(kind.field(i).type) for i in range(kind.num_fields))


def _to_json_value(value: Any) -> Any:
    """Convert an Arrow value to a JSON value."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _to_json_value(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(inner) for inner in value]
    return str(value)
