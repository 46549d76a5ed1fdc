"""The files of a model or adapter folder, before any of them is read.

    check_files(folder)      each is a regular file of a sane size, and lies where the folder says

A folder that was downloaded or unpacked may hold links to anything the user can read, and what is
read as a tokenizer or a template is later copied beside the adapter. So a link must stay inside its
folder. The one exception is the hub's own cache, whose snapshots link to the `blobs` beside them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tunesmith.core.errors import InputError

TEMPLATES_DIR = "additional_chat_templates"  # the one subfolder that is read
MAX_BYTES_BY_SUFFIX = {
    ".json": 64 * 2**20,
    ".jinja": 2**20,
    ".txt": 64 * 2**20,
    ".model": 64 * 2**20,
}


def check_files(folder: Path) -> None:
    """Raises InputError for a link that leads out of the folder, a file that is no file, and an
    absurd size."""
    root = folder.resolve()
    allowed_roots = [root]
    if root.parent.name == "snapshots":
        allowed_roots.append(root.parent.parent / "blobs")
    for path in _iter_entries(root):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(allowed_root) for allowed_root in allowed_roots):
            fix = (
                "copy the file into the folder if you trust it, or give the folder that it lies in"
            )
            raise InputError(
                f"it is a link out of its folder, to {target}", where=str(path), fix=fix
            )
        _check_file(path)


def _iter_entries(root: Path) -> Iterator[Path]:
    for folder in (root, root / TEMPLATES_DIR):
        if folder.is_dir():
            yield from sorted(folder.iterdir())


def _check_file(path: Path) -> None:
    try:
        file_stat = path.stat()
    except OSError as error:
        raise InputError(
            f"it cannot be read: {error.strerror}", where=str(path), fix="copy the folder again"
        ) from error
    if not (stat.S_ISREG(file_stat.st_mode) or stat.S_ISDIR(file_stat.st_mode)):
        raise InputError("it is neither a file nor a folder", where=str(path), fix="remove it")
    max_bytes = MAX_BYTES_BY_SUFFIX.get(path.suffix)
    if max_bytes is not None and file_stat.st_size > max_bytes and stat.S_ISREG(file_stat.st_mode):
        raise InputError(
            f"it has {file_stat.st_size:,} bytes, more than {max_bytes:,}", where=str(path)
        )
