"""A recipe in the making: what another tool's config asked for, and what has become of each of its keys.

In: the config file, and where the recipe will stand. The topics take keys from the draft and put values into it, or
leave a key with a reason. Out: `Left` entries and plain recipe values. What a key means is said in the other files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.recipe.yaml_lines import Document

LARGEST = 10**12
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Left:
    """A key of the other tool that the recipe does not have. `matters`: it may change what is trained."""

    key: str
    value: Any
    reason: str
    matters: bool = True


@dataclass
class Draft:
    """`given` shrinks as keys are taken; `values` and `notes` (where a value comes from) have our keys."""

    document: Document
    config: Path
    recipe: Path
    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, str] = field(default_factory=dict[str, str])
    left: list[Left] = field(default_factory=list[Left])

    def take(self, key: str) -> Any:
        """The value of a key, None if it is not there; YAML reads 1e-4 as a text, which is meant as a number."""
        value = self.given.pop(key, None)
        return float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value

    def number(self, key: str) -> Any:
        """A number, or None. Raises InputError with the line if it is something else, or beyond all measure."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
            raise self.refusal(key, f"expected a number, found {value!r}")
        return value

    def word(self, key: str) -> Any:
        """One plain value, or None. Raises InputError with the line if it is a list or a mapping."""
        value = self.take(key)
        if isinstance(value, (list, dict)):
            raise self.refusal(key, f"expected one value, found a {type(value).__name__}")
        return value

    def put(self, ours: str, value: Any, source: str) -> None:
        """Raises InputError when two of their keys want different things."""
        if ours in self.values and self.values[ours] != value:
            what = f"{source} and {self.notes[ours]} contradict each other: {value} and {self.values[ours]}"
            raise self.refusal(source, what)
        self.values[ours], self.notes[ours] = value, source

    def rename(self, names: Mapping[str, str]) -> None:
        """Keys that mean the same: theirs -> ours."""
        for theirs, ours in names.items():
            value = self.take(theirs)
            if value is not None:
                self.put(ours, value, theirs)

    def leave(self, key: str, value: Any, reason: str, *, matters: bool = True) -> None:
        self.left.append(Left(key, value, reason, matters))

    def refusal(self, key: str, what: str, fix: str = "") -> InputError:
        return InputError(what, where=self.document.where((key,)), fix=fix)

    def locate(self, text: str, *folders: Path) -> str | None:
        """An existing file or folder as the recipe has to name it; theirs are relative to where the tool was run."""
        places = (*folders, Path.cwd(), self.config.absolute().parent)
        for place in places:
            found = place / os.path.expanduser(text)
            if found.exists():
                return Path(os.path.relpath(found, self.recipe.absolute().parent)).as_posix()
        return None


def described(format: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A format of rows, and the columns (ours -> theirs) that have another name in the file than here."""
    renamed = {ours: str(theirs) for ours, theirs in columns.items() if theirs and theirs != ours}
    return {"format": format} | ({"columns": renamed} if renamed else {})
