"""The files of a model or adapter folder, before any of them is read.

    check_files(folder)      each is a regular file of a sane size, and lies where the folder says

A folder that was downloaded or unpacked may hold links to anything the user can read, and what is read as a tokenizer
or a template is later copied beside the adapter. So a link must stay inside its folder. The one exception is the hub's
own cache, whose snapshots link to the `blobs` beside them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tunesmith.core.errors import InputError

TEMPLATES = "additional_chat_templates"  # the one subfolder that is read
MAX_BYTES = {".json": 64 * 2**20, ".jinja": 2**20, ".txt": 64 * 2**20, ".model": 64 * 2**20}


def check_files(folder: Path) -> None:
    """Raises InputError for a link that leads out of the folder, a file that is no file, and an absurd size."""
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    for path in _entries(root):
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(home) for home in homes):
            fix = "copy the file into the folder if you trust it, or give the folder that it lies in"
            raise InputError(f"it is a link out of its folder, to {real}", where=str(path), fix=fix)
        _check_file(path)


def _entries(root: Path) -> Iterator[Path]:
    for folder in (root, root / TEMPLATES):
        if folder.is_dir():
            yield from sorted(folder.iterdir())


def _check_file(path: Path) -> None:
    try:
        facts = path.stat()
    except OSError as error:
        raise InputError(
            f"it cannot be read: {error.strerror}", where=str(path), fix="copy the folder again"
        ) from error
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        raise InputError("it is neither a file nor a folder", where=str(path), fix="remove it")
    most = MAX_BYTES.get(path.suffix)
    if most is not None and facts.st_size > most and stat.S_ISREG(facts.st_mode):
        raise InputError(f"it has {facts.st_size:,} bytes, more than {most:,}", where=str(path))
