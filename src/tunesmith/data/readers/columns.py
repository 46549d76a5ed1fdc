"""Columns of a file under the names that formats know, as the recipe maps them: {ours: theirs}."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.formats.row_formats import FORMATS


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under our names; a column of that name that is not meant is left out."""
    kept = {key: value for key, value in row.data.items() if key not in columns and key not in columns.values()}
    mapped = {ours: row.data[theirs] for ours, theirs in columns.items() if theirs in row.data}
    return Row(row.id, {**mapped, **kept})


def check_columns(columns: Mapping[str, str], first: Sequence[Row], format: str, where: str) -> None:
    """Raises InputError for a name that no format reads, and for a column that none of the first rows has."""
    formats = FORMATS.values() if format == "auto" else [FORMATS[format]]
    ours = sorted({key for one in formats for key in one.used})
    theirs = list(dict.fromkeys(key for row in first for key in row.data))
    for name, column in columns.items():
        if name not in ours:
            raise unknown(
                f"columns: no {'' if format == 'auto' else format + ' '}row has a `{name}`", name, ours, where
            )
        if column not in theirs:
            raise unknown(f"columns: {name}: the file has no column `{column}`", column, theirs, where)


def unknown(what: str, name: str, known: Sequence[str], where: str) -> InputError:
    """What to raise for a name that is none of the known ones, with the nearest of them."""
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(f'`{key:.40}`' for key in known[:12])}"
    return InputError(what, where=where, fix=fix)
