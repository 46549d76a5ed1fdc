"""Store results on disk: one file per arm, written when the arm has finished.

    ResultStore(folder, fingerprint).get(key, ArmResult) / .put(key, result) / .answer_cache

A file's name is a hash of everything that its content depends on (model, rows, items, documents,
arm), so an interrupted experiment continues, a repeated one is free, and no stale result is used.
Recipes may share a folder.
"""

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
    """Raises InputError for a folder that cannot be created."""

    def __init__(self, folder: Path, fingerprint: Json) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        if folder.exists() and not folder.is_dir():
            raise InputError("not a folder", where=f"--out: {folder}", fix="name a folder")
        make_dirs(folder)
        remove_leftovers(folder)

    @property
    def answer_cache(self) -> AnswerCache:
        """Single answers of the untrained model, those of unfinished arms included."""
        digest = hashlib.sha256(dump_json(self.fingerprint)).hexdigest()
        return AnswerCache(self.folder / ANSWERS_FILE, digest)

    def get(self, key: Any, result_type: type[T]) -> T | None:
        """Return None for a result that is missing, truncated or of another version."""
        path = self._build_path(key)
        if not path.is_file():
            return None
        try:
            return parse_as(result_type, read_json(path)["result"], where=str(path))
        except (InputError, KeyError, TypeError):
            return None

    def put(self, key: Any, result: Any) -> None:
        write_file(self._build_path(key), dump_json({"key": key, "result": result}))

    def _build_path(self, key: Any) -> Path:
        key_bytes = dump_json({**self.fingerprint, "key": key})
        return self.folder / f"{hashlib.sha256(key_bytes).hexdigest()[:20]}.json"
