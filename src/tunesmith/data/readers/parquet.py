"""Parquet files as JSON lines.

    path -> Spool with one JSON object a row

Row groups are read one after the other, a few hundred rows at a time. Columns of bytes (pictures, sound) are left out:
only text is trained. Parquet cannot tell a missing key from null inside an object, so a null there is a missing key;
numbers that are not finite, which is how pandas writes a missing one, are null; dates and decimals become strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.readers.decompress import PIECE, Spool

ROWS = 256  # decoded at a time


def parquet_lines(path: Path) -> Spool:
    """Raises InputError if pyarrow is not installed, or the file is damaged or without a column of text."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install 'tunesmith[parquet]', or write the rows as .jsonl"
        raise InputError("reading Parquet files needs pyarrow", where=str(path), fix=fix) from None
    spool = Spool(path)
    try:
        with parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as file:
            for row in _rows(file, path):
                spool.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (pyarrow.ArrowException, OSError) as error:
        what = f"not a whole Parquet file: {' '.join(str(error).split()):.200}"
        raise InputError(what, where=str(path), fix="fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not UTF-8: {error}", where=str(path), fix="write the file again") from None
    return spool


def _rows(file: Any, path: Path) -> Iterator[Json]:
    names = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
    if not names:
        raise InputError("no column holds text", where=str(path), fix="write the texts as columns of strings")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two columns are called {twice!r}", where=str(path), fix="rename one of them")
    for batch in file.iter_batches(batch_size=ROWS, columns=names, use_threads=False):
        for row in batch.to_pylist():
            yield {name: _plain(value) for name, value in row.items()}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    binary = (kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary, kinds.is_binary_view)
    if any(test(kind) for test in binary):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any) -> Any:
    """A value of Arrow as JSON has it."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value)
