"""What has been found so far, on disk: one file an arm, written when the arm has ended.

    Kept(folder, identity).get(arm, kind) / .put(arm, found); .answers, for evaluate/cache.py

A file's name is a hash of all that its content depends on (model, rows, items, documents, arm), so
a measure that was stopped goes on where it was, a second one costs nothing, and nothing stale is
taken. Recipes may share a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.core.atomic import make_dirs, remove_leftovers, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Json
from tunesmith.evaluate.answer_cache import ANSWERS_FILE, AnswerCache

T = TypeVar("T")


class ResultStore:
    """Raises InputError for a folder that cannot be made."""

    def __init__(self, folder: Path, fingerprint: Json) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        if folder.exists() and not folder.is_dir():
            raise InputError(
                "there is a file of this name", where=f"--out: {folder}", fix="name a folder"
            )
        make_dirs(folder)
        remove_leftovers(folder)

    @property
    def answer_cache(self) -> AnswerCache:
        """Where single answers of the untrained model are kept, also of what has not ended."""
        return AnswerCache(
            self.folder / ANSWERS_FILE, hashlib.sha256(dump_json(self.fingerprint)).hexdigest()
        )

    def get(self, name: Any, result_type: type[T]) -> T | None:
        """None where there is nothing, or what cannot be read any more."""
        path = self._build_path(name)
        if not path.is_file():
            return None
        try:
            return parse_as(result_type, read_json(path)["found"], where=str(path))
        except (InputError, KeyError, TypeError):
            return None  # cut or of another version: it is found again

    def put(self, name: Any, result: Any) -> None:
        write_file(self._build_path(name), dump_json({"of": name, "found": result}))

    def _build_path(self, name: Any) -> Path:
        key_bytes = dump_json({**self.fingerprint, "of": name})
        return self.folder / f"{hashlib.sha256(key_bytes).hexdigest()[:20]}.json"
