"""Columns of a file under the names that formats know, as the recipe maps them: {ours: theirs}."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.formats.row_formats import FORMATS


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under our names; a column of that name that is not meant is left
    out."""
    others = {
        key: value
        for key, value in row.data.items()
        if key not in columns and key not in columns.values()
    }
    mapped = {name: row.data[column] for name, column in columns.items() if column in row.data}
    return Row(row.id, {**mapped, **others})


def check_columns(
    columns: Mapping[str, str], first_rows: Sequence[Row], format: str, where: str
) -> None:
    """Raises InputError for a name that no format reads, and for a column that none of the first
    rows has."""
    formats = FORMATS.values() if format == "auto" else [FORMATS[format]]
    format_keys = sorted({key for row_format in formats for key in row_format.used_keys})
    file_columns = list(dict.fromkeys(key for row in first_rows for key in row.data))
    for name, column in columns.items():
        if name not in format_keys:
            raise build_unknown_name_error(
                f"columns: no {'' if format == 'auto' else format + ' '}row has a `{name}`",
                name,
                format_keys,
                where,
            )
        if column not in file_columns:
            raise build_unknown_name_error(
                f"columns: {name}: the file has no column `{column}`", column, file_columns, where
            )


def build_unknown_name_error(
    message: str, name: str, valid_names: Sequence[str], where: str
) -> InputError:
    """What to raise for a name that is none of the known ones, with the nearest of them."""
    close = difflib.get_close_matches(name, valid_names, n=1)
    fix = (
        f"did you mean `{close[0]}`?"
        if close
        else f"there are {', '.join(f'`{key:.40}`' for key in valid_names[:12])}"
    )
    return InputError(message, where=where, fix=fix)
