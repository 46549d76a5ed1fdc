"""What has been found so far, on disk: one file an arm, written when the arm has ended.

    Kept(folder, identity).get(arm, kind) / .put(arm, found); .answers, for evaluate/cache.py

A file's name is a hash of all that its content depends on (model, rows, items, documents, arm), so a measure that was
stopped goes on where it was, a second one costs nothing, and nothing stale is taken. Recipes may share a folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.core.atomic import make_folder, remove_leftovers, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import from_json, json_bytes, read_json
from tunesmith.core.types import Json
from tunesmith.evaluate.answer_cache import ANSWERS, Store

T = TypeVar("T")


class Kept:
    """Raises InputError for a folder that cannot be made."""

    def __init__(self, folder: Path, identity: Json) -> None:
        self.folder, self.identity = folder, identity
        if folder.exists() and not folder.is_dir():
            raise InputError("there is a file of this name", where=f"--out: {folder}", fix="name a folder")
        make_folder(folder)
        remove_leftovers(folder)

    @property
    def answers(self) -> Store:
        """Where single answers of the untrained model are kept, also of what has not ended."""
        return Store(self.folder / ANSWERS, hashlib.sha256(json_bytes(self.identity)).hexdigest())

    def get(self, name: Any, kind: type[T]) -> T | None:
        """None where there is nothing, or what cannot be read any more."""
        place = self._place(name)
        if not place.is_file():
            return None
        try:
            return from_json(kind, read_json(place)["found"], where=str(place))
        except (InputError, KeyError, TypeError):
            return None  # cut or of another version: it is found again

    def put(self, name: Any, found: Any) -> None:
        write_file(self._place(name), json_bytes({"of": name, "found": found}))

    def _place(self, name: Any) -> Path:
        whole = json_bytes({**self.identity, "of": name})
        return self.folder / f"{hashlib.sha256(whole).hexdigest()[:20]}.json"
