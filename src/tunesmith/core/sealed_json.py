"""JSON files of a run folder that carry a hash of their content.

    seal_json(plan) -> bytes            the object with one more key, `sha256`: that of the others
    read_sealed_json(path) -> Json      without that key; refuses what was changed since
    read_sealed_as(Plan, path) -> plan

A damaged disk, a bad copy or a slip in an editor may change a number and leave valid JSON: a score
that nobody measured, or log-probabilities that training would be compared with. Such a file is
refused by name. White space and the format of the text do not count. A file without the key is
taken as it is: earlier versions wrote none, and whoever means to change a file removes it.
Left out: folders, whose manifests hold the hashes of all files (`atomic.py`), and a seal that an
attacker could not write.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json_object, to_jsonable
from tunesmith.core.types import Json

T = TypeVar("T")
SEAL_KEY = "sha256"
RESTORE_FIX = "restore the file from a copy of the run folder"
CHANGED_FIX = f'{RESTORE_FIX}; if you changed it on purpose, remove its key "{SEAL_KEY}"'


def seal_json(value: Any) -> bytes:
    """Return an object as indented UTF-8 JSON with its seal as the last key."""
    content = to_jsonable(value)
    return dump_json({**content, SEAL_KEY: _hash_content(content)}, indent=2)


def read_sealed_json(path: Path) -> Json:
    """Read a JSON object that `seal_json` wrote, or one without a seal. Raises InputError if it is
    missing, broken, or not as it was written."""
    return remove_seal(read_json_object(path, fix=RESTORE_FIX, is_ours=True), path)


def read_sealed_as(cls: type[T], path: Path) -> T:
    """Read a value of the type `cls` from the file that `seal_json` wrote of it. Raises InputError
    as `read_sealed_json`, and for the first field that does not match."""
    return parse_as(cls, read_sealed_json(path), where=str(path), fix=RESTORE_FIX)


def remove_seal(content: Json, path: Path) -> Json:
    """Return the content of a file without its seal. Raises InputError if the seal is of other
    content."""
    unsealed = {key: value for key, value in content.items() if key != SEAL_KEY}
    if SEAL_KEY in content and content[SEAL_KEY] != _hash_content(unsealed):
        message = "changed since tunesmith wrote it: its checksum does not match"
        raise InputError(message, where=str(path), fix=CHANGED_FIX)
    return unsealed


def _hash_content(content: Json) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
