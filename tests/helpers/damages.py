"""Ways to damage a file of a run folder, and to forge one: its seal is that of the new content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.atomic import MANIFEST, hash_file
from tunesmith.core.events import CHECKSUM_KEY, compute_checksum
from tunesmith.core.sealed_json import SEAL_KEY

REMOVED = object()
# in place of a value of any type
FORGED_VALUES: dict[str, Any] = {
    "removed": REMOVED,
    "null": None,
    "text": "x",
    "list": [],
    "list of objects": [{}],
    "object": {},
    "huge": 10**400,
    "NaN": math.nan,
    "infinite": math.inf,
    "negative": -1,
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_utf8(file: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + b"\xff" + content[middle:])


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": cut,
    "not UTF-8": damage_utf8,
    "folder": replace_by_folder,
    "loop of links": replace_by_loop,
    **{
        repr(text[-16:]) if text else "empty": lambda file, text=text: file.write_text(text)
        for text in (
            *("", "null", "[]", "{}", "[null]", "3", "NaN", '{"sha256": 1e999}'),
            *("[" * 10**5, "[[" * 10**5 + "\n"),
        )
    },
}


def forge(file: Path, keys: Sequence[str | int], value: Any) -> None:
    """Replace a value of a sealed file, of a manifest, or of the first line of events.jsonl whose
    type is the first of `keys`, and write the seals that fit."""
    if file.suffix == ".jsonl":
        _forge_event(file, keys, value)
        return
    content = json.loads(file.read_bytes())
    _replace(content, keys, value)
    if file.name == MANIFEST:
        _write_manifest(file, content)
        return
    if SEAL_KEY in content:
        del content[SEAL_KEY]
        content[SEAL_KEY] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    file.write_text(json.dumps(content))
    seal_folder(file.parent)


def seal_folder(folder: Path) -> None:
    """Write the sizes and hashes of all files of a folder into its manifest, if it has one."""
    file = folder / MANIFEST
    if not file.is_file():
        return
    content = json.loads(file.read_bytes())
    for name in content["files"]:
        path = folder / name
        content["files"][name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    _write_manifest(file, content)


def _replace(content: Any, keys: Sequence[str | int], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    if value is REMOVED:
        del content[keys[-1]]
    else:
        content[keys[-1]] = value


def _write_manifest(file: Path, content: Any) -> None:
    content = {key: value for key, value in content.items() if key != SEAL_KEY}
    text = json.dumps(content, ensure_ascii=False) + "\n"
    content[SEAL_KEY] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _forge_event(file: Path, keys: Sequence[str | int], value: Any) -> None:
    lines = file.read_bytes().splitlines()
    number = next(n for n, line in enumerate(lines) if json.loads(line)["type"] == keys[0])
    fields = json.loads(lines[number])
    del fields[CHECKSUM_KEY]
    _replace(fields, keys[1:], value)
    lines[number] = json.dumps({**fields, CHECKSUM_KEY: compute_checksum(fields)}).encode()
    file.write_bytes(b"\n".join(lines) + b"\n")
