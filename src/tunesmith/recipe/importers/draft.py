"""A recipe in the making: what another tool's config asked for, and what has become of each of its
keys.

In: the config file, and where the recipe will stand. The topics take keys from the draft and put
values into it, or leave a key with a reason. Out: `Left` entries and plain recipe values. What a
key means is said in the other files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.recipe.yaml_lines import YamlMapping

MAX_NUMBER = 10**12
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class UntranslatedKey:
    """A key of the other tool that the recipe does not have. `matters`: it may change what is
    trained."""

    key: str
    value: Any
    reason: str
    is_important: bool = True


@dataclass
class RecipeDraft:
    """`given` shrinks as keys are taken; `values` and `notes` (where a value comes from) have our
    keys."""

    document: YamlMapping
    config_path: Path
    recipe_path: Path
    remaining: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, str] = field(default_factory=dict[str, str])
    untranslated: list[UntranslatedKey] = field(default_factory=list[UntranslatedKey])

    def pop_value(self, key: str) -> Any:
        """The value of a key, None if it is not there; YAML reads 1e-4 as a text, which is meant as
        a number."""
        value = self.remaining.pop(key, None)
        return (
            float(value)
            if isinstance(value, str) and NUMBER_PATTERN.fullmatch(value.strip())
            else value
        )

    def pop_number(self, key: str) -> Any:
        """A number, or None. Raises InputError with the line if it is something else, or beyond all
        measure."""
        value = self.pop_value(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) < MAX_NUMBER
        ):
            raise self.make_error(key, f"expected a number, found {value!r}")
        return value

    def pop_scalar(self, key: str) -> Any:
        """One plain value, or None. Raises InputError with the line if it is a list or a
        mapping."""
        value = self.pop_value(key)
        if isinstance(value, (list, dict)):
            raise self.make_error(key, f"expected one value, found a {type(value).__name__}")
        return value

    def set_value(self, recipe_key: str, value: Any, source: str) -> None:
        """Raises InputError when two of their keys want different things."""
        if recipe_key in self.values and self.values[recipe_key] != value:
            message = f"{source} and {self.notes[recipe_key]} contradict each other: {value} and {self.values[recipe_key]}"
            raise self.make_error(source, message)
        self.values[recipe_key], self.notes[recipe_key] = value, source

    def rename_keys(self, names: Mapping[str, str]) -> None:
        """Keys that mean the same: theirs -> ours."""
        for config_key, recipe_key in names.items():
            value = self.pop_value(config_key)
            if value is not None:
                self.set_value(recipe_key, value, config_key)

    def skip_key(self, key: str, value: Any, reason: str, *, is_important: bool = True) -> None:
        self.untranslated.append(UntranslatedKey(key, value, reason, is_important))

    def make_error(self, key: str, message: str, fix: str = "") -> InputError:
        return InputError(message, where=self.document.format_location((key,)), fix=fix)

    def find_path(self, text: str, *folders: Path) -> str | None:
        """An existing file or folder as the recipe has to name it; theirs are relative to where the
        tool was run."""
        search_dirs = (*folders, Path.cwd(), self.config_path.absolute().parent)
        for folder in search_dirs:
            path = folder / os.path.expanduser(text)
            if path.exists():
                return Path(os.path.relpath(path, self.recipe_path.absolute().parent)).as_posix()
        return None


def describe_format(row_format: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A format of rows, and the columns (ours -> theirs) that have another name in the file than
    here."""
    renamed = {
        column: str(config_column)
        for column, config_column in columns.items()
        if config_column and config_column != column
    }
    return {"format": row_format} | ({"columns": renamed} if renamed else {})
