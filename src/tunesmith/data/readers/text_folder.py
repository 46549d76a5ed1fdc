"""A folder of texts: each .txt or .md file in it, at any depth, is one row.

    path -> Folder -> Row (id "folder/sub/file.md", {"text": ...})

A folder's own files come first, all in the order of their names; hidden ones are left out. Links to
folders are not followed, and a file that leads out of the folder is refused: who packed the folder
does not choose what is read from this machine."""

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
from tunesmith.data.readers.decode import SourceLocation, decode_text
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.readers.local_file import FileBytes, check_path, get_stamp
from tunesmith.data.readers.row_index import BYTE_ORDER_MARK, MAX_ROW_BYTES

TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, eq=False)
class TextFolder:
    """Text files as rows; reads like a Source."""

    path: Path
    name: str
    files: tuple[FileBytes, ...]
    fingerprint: str  # sha256 over the names and sha256 of the files
    skipped_suffixes: Mapping[str, int]  # suffix -> how many files of it are left out

    def __len__(self) -> int:
        return len(self.files)

    def get_id(self, index: int) -> str:
        return f"{self.name}/{self.files[index].path.relative_to(self.path).as_posix()}"

    def get_location(self, index: int) -> SourceLocation:
        return SourceLocation(self.get_id(index))

    def read_row(self, index: int) -> Row:
        """Read and decode one file. Raises BadRow that names it, InputError if it has changed."""
        num_bytes = self.files[index].stamp[0]
        if num_bytes > MAX_ROW_BYTES:
            message, fix = (
                f"the file has {num_bytes:,} bytes, at most 64 MB are read",
                "split it, or move it away",
            )
            raise InvalidRow("too long", message, where=str(self.get_location(index)), fix=fix)
        raw = self.files[index].read(0, num_bytes)
        mark_bytes = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
        return Row(
            self.get_id(index),
            decode_text(raw[mark_bytes:], SourceLocation(self.get_id(index), offset=mark_bytes)),
        )

    def read_raw(self, index: int, max_bytes: int) -> tuple[bytes, int]:
        """The first bytes of a file, and how many it has."""
        num_bytes = self.files[index].stamp[0]
        return self.files[index].read(0, min(max_bytes, num_bytes)), num_bytes


def open_folder(path: Path, name: str) -> TextFolder:
    """Raises InputError for a folder without texts, and for a file in it that is not an ordinary
    one of its own."""
    digest = hashlib.sha256()
    files: list[FileBytes] = []
    skipped_suffixes, root = Counter[str](), path.resolve()
    for file in _iter_visible_files(path):
        if not file.name.lower().endswith(TEXT_SUFFIXES):
            skipped_suffixes[file.suffix.lower()] += 1
            continue
        target = Path(os.path.realpath(file))  # a loop of links is where it began
        if not target.is_relative_to(root):
            message, fix = (
                f"is a link out of the folder, to {target}",
                "replace it by a copy, or remove it",
            )
            raise InputError(message, where=str(file), fix=fix)
        status = check_path(file)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                "is not an ordinary file", where=str(file), fix="remove it, or copy what it holds"
            )
        files.append(FileBytes(file, get_stamp(status)))
        with file.open("rb") as handle:
            file_digest = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(
            f"{file.relative_to(path).as_posix()}\0{file_digest}\n".encode(errors="surrogateescape")
        )
    if not files:
        raise InputError(
            f"no {' or '.join(TEXT_SUFFIXES)} file in this folder",
            where=str(path),
            fix="name the data file",
        )
    return TextFolder(path, name, tuple(files), digest.hexdigest(), skipped_suffixes)


def _iter_visible_files(path: Path) -> Iterator[Path]:
    """The files below a folder, sorted by their path."""
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)
