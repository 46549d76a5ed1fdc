"""Parquet files as JSON lines.

    path -> Spool with one JSON object a row

Row groups are read one after the other, a few hundred rows at a time. Columns of bytes (pictures,
sound) are left out: only text is trained. Parquet cannot tell a missing key from null inside an
object, so a null there is a missing key; numbers that are not finite, which is how pandas writes a
missing one, are null; dates and decimals become strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.readers.decompress import CHUNK_BYTES, TempCopy

BATCH_ROWS = 256  # decoded at a time


def unpack_parquet(path: Path) -> TempCopy:
    """Raises InputError if pyarrow is not installed, or the file is damaged or without a column of
    text."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install 'tunesmith[parquet]', or write the rows as .jsonl"
        raise InputError("reading Parquet files needs pyarrow", where=str(path), fix=fix) from None
    temp_copy = TempCopy(path)
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            for row in _iter_rows(file, path):
                temp_copy.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (pyarrow.ArrowException, OSError) as error:
        message = f"not a whole Parquet file: {' '.join(str(error).split()):.200}"
        raise InputError(message, where=str(path), fix="fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"a text is not UTF-8: {error}", where=str(path), fix="write the file again"
        ) from None
    return temp_copy


def _iter_rows(file: Any, path: Path) -> Iterator[Json]:
    names = [field.name for field in file.schema_arrow if not _has_binary(field.type)]
    if not names:
        raise InputError(
            "no column holds text", where=str(path), fix="write the texts as columns of strings"
        )
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"two columns are called {duplicate!r}", where=str(path), fix="rename one of them"
        )
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        for row in batch.to_pylist():
            yield {name: _to_json_value(value) for name, value in row.items()}


def _has_binary(kind: Any) -> bool:
    import pyarrow.types as kinds

    binary_tests = (
        kinds.is_binary,
        kinds.is_large_binary,
        kinds.is_fixed_size_binary,
        kinds.is_binary_view,
    )
    if any(test(kind) for test in binary_tests):
        return True
    return any(_has_binary(kind.field(i).type) for i in range(kind.num_fields))


def _to_json_value(value: Any) -> Any:
    """A value of Arrow as JSON has it."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _to_json_value(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(inner) for inner in value]
    return str(value)
