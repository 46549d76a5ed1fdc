"""A folder of texts: each .txt or .md file in it, at any depth, is one row.

    path -> Folder -> Row (id "folder/sub/file.md", {"text": ...})

A folder's own files come first, all in the order of their names; hidden ones are left out. Links to folders are not
followed, and a file that leads out of the folder is refused: who packed the folder does not choose what is read from
this machine.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.readers.decode import Spot, decode_text
from tunesmith.data.readers.invalid_row import BadRow
from tunesmith.data.readers.local_file import FileBytes, check_path, stamp
from tunesmith.data.readers.row_index import BYTE_ORDER_MARK, LONGEST_ROW

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, eq=False)
class Folder:
    """Text files as rows; reads like a Source."""

    path: Path
    name: str
    files: tuple[FileBytes, ...]
    fingerprint: str  # sha256 over the names and sha256 of the files
    others: Mapping[str, int]  # suffix -> how many files of it are left out

    def __len__(self) -> int:
        return len(self.files)

    def id(self, index: int) -> str:
        return f"{self.name}/{self.files[index].path.relative_to(self.path).as_posix()}"

    def spot(self, index: int) -> Spot:
        return Spot(self.id(index))

    def row(self, index: int) -> Row:
        """Read and decode one file. Raises BadRow that names it, InputError if it has changed."""
        count = self.files[index].stamp[0]
        if count > LONGEST_ROW:
            what, fix = f"the file has {count:,} bytes, at most 64 MB are read", "split it, or move it away"
            raise BadRow("too long", what, where=str(self.spot(index)), fix=fix)
        raw = self.files[index].read(0, count)
        mark = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
        return Row(self.id(index), decode_text(raw[mark:], Spot(self.id(index), offset=mark)))

    def raw(self, index: int, most: int) -> tuple[bytes, int]:
        """The first bytes of a file, and how many it has."""
        count = self.files[index].stamp[0]
        return self.files[index].read(0, min(most, count)), count


def open_folder(path: Path, name: str) -> Folder:
    """Raises InputError for a folder without texts, and for a file in it that is not an ordinary one of its own."""
    digest = hashlib.sha256()
    files: list[FileBytes] = []
    others, home = Counter[str](), path.resolve()
    for file in _visible(path):
        if not file.name.lower().endswith(SUFFIXES):
            others[file.suffix.lower()] += 1
            continue
        target = Path(os.path.realpath(file))  # a loop of links is where it began
        if not target.is_relative_to(home):
            what, fix = f"is a link out of the folder, to {target}", "replace it by a copy, or remove it"
            raise InputError(what, where=str(file), fix=fix)
        status = check_path(file)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is not an ordinary file", where=str(file), fix="remove it, or copy what it holds")
        files.append(FileBytes(file, stamp(status)))
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path).as_posix()}\0{content}\n".encode(errors="surrogateescape"))
    if not files:
        raise InputError(f"no {' or '.join(SUFFIXES)} file in this folder", where=str(path), fix="name the data file")
    return Folder(path, name, tuple(files), digest.hexdigest(), others)


def _visible(path: Path) -> Iterator[Path]:
    """The files below a folder, sorted by their path."""
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)
