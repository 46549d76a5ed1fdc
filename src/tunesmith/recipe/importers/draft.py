"""A recipe being translated from another tool's config.

The importers take keys from the draft and set ours, or skip a key with a reason. Out: recipe
values, and `UntranslatedKey` entries. Left out: the meaning of keys (keys.yaml, key_map.py and
data_sets.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.yaml_lines import YamlMapping

TABLE: Json = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text())
MAX_NUMBER = 10**12
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class UntranslatedKey:
    """A key that was not translated; if `is_important`, it may change what is trained."""

    key: str
    value: Any
    reason: str
    is_important: bool = True


class ConfigKeys:
    """The keys of a config or of a mapping in it, each taken once as a value of one kind.

    Raises InputError, with the place that `locate` gives, for a value of another kind."""

    def __init__(self, values: Json, locate: Callable[[str], str]) -> None:
        self.remaining = values
        self.locate = locate

    def pop_value(self, key: str) -> Any:
        """Take the value of a key, or None; a text such as 1e-4, to YAML no number, becomes one."""
        value = self.remaining.pop(key, None)
        if isinstance(value, str) and NUMBER_PATTERN.fullmatch(value.strip()):
            return float(value)
        return value

    def pop_number(self, key: str) -> Any:
        """Take a number up to MAX_NUMBER, or None."""
        value = self.pop_value(key)
        if value is not None and not is_number(value):
            raise self.make_error(key, f"expected a number, found {value!r:.60}")
        return value

    def pop_scalar(self, key: str) -> Any:
        """Take a plain value, or None."""
        value = self.pop_value(key)
        if isinstance(value, (list, dict)):
            raise self.make_error(key, f"expected one value, found a {type(value).__name__}")
        return value

    def pop_text(self, key: str) -> str | None:
        """Take a text as it is written, or None."""
        value = self.remaining.pop(key, None)
        if value is not None and not is_text(value):
            raise self.make_error(key, f"expected a text, found {value!r:.60}")
        return None if value is None else str(value)

    def pop_texts(self, key: str) -> list[str]:
        """Take a list of texts, or one text with commas; none for an empty value or false."""
        value = self.remaining.pop(key, None)
        if value is None or value is False:
            return []
        texts = value.split(",") if isinstance(value, str) else value
        if not (isinstance(texts, list) and all(map(is_text, texts))):
            raise self.make_error(key, f"expected a list of texts, found {value!r:.60}")
        stripped = [str(item).strip() for item in texts]
        return [text for text in stripped if text]

    def pop_text_mapping(self, key: str) -> Json:
        """Take a mapping to texts; an empty one for nothing."""
        value = self.remaining.pop(key, None) or {}
        if not isinstance(value, dict) or not all(t is None or is_text(t) for t in value.values()):
            raise self.make_error(key, f"expected a mapping to texts, found {value!r:.60}")
        return value

    def make_error(self, key: str, message: str) -> InputError:
        return InputError(message, where=self.locate(key))


class RecipeDraft(ConfigKeys):
    """The state of a translation: `remaining` has their keys, `values` and `notes` have ours.

    A note says where the value comes from."""

    def __init__(self, document: YamlMapping, config_path: Path, recipe_path: Path) -> None:
        super().__init__(dict(document.values), lambda key: document.format_location((key,)))
        self.document = document
        self.config_path = config_path
        self.recipe_path = recipe_path
        self.values: Json = {}
        self.notes: dict[str, str] = {}
        self.untranslated: list[UntranslatedKey] = []

    def set_value(self, recipe_key: str, value: Any, source: str) -> None:
        """Set one of our keys. Raises InputError if it already has another value."""
        earlier_value = self.values.get(recipe_key, value)
        if earlier_value != value:
            names = f"{source} and {self.notes[recipe_key]}"
            message = f"{names} contradict each other: {value} and {earlier_value}"
            raise self.make_error(source, message)
        self.values[recipe_key] = value
        self.notes[recipe_key] = source

    def skip_key(self, key: str, value: Any, reason: str, *, is_important: bool = True) -> None:
        self.untranslated.append(UntranslatedKey(key, value, reason, is_important))

    def skip_unneeded(self, key: str, value: Any, reason: str) -> None:
        self.skip_key(key, value, reason, is_important=False)

    def find_path(self, text: str, *folders: Path) -> str | None:
        """Return an existing path relative to the recipe, or None.

        Paths in a config are relative to where the tool was run."""
        for folder in (*folders, Path.cwd(), self.config_path.absolute().parent):
            path = folder / os.path.expanduser(text)
            if os.path.exists(path):  # also for a text that can be no path
                return Path(os.path.relpath(path, self.recipe_path.absolute().parent)).as_posix()
        return None


def is_text(value: Any) -> bool:
    """Return whether a value is a text, or a number that YAML has made of one."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_text(value) and not isinstance(value, str) and abs(value) < MAX_NUMBER
