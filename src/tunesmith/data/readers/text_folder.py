"""A folder of texts: each .txt or .md file in it, at any depth, is one row.

    path -> TextFolder -> Row (id "folder/sub/file.md", {"text": ...})

Files come before subfolders, each sorted by name; hidden files are skipped. Links to folders are
not followed, and a file that links out of the folder is refused: the author of a downloaded folder
must not choose which files of this machine are read."""

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
from tunesmith.data.readers.row_index import BYTE_ORDER_MARK, MAX_TEXT_BYTES

TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, eq=False)
class TextFolder:
    """Text files as rows, with the interface of Source."""

    path: Path
    name: str
    files: tuple[FileBytes, ...]
    fingerprint: str  # sha256 over the names and the sha256 of the files
    skipped_suffixes: Mapping[str, int]  # suffix -> number of files that are not read

    def __len__(self) -> int:
        return len(self.files)

    def get_id(self, index: int) -> str:
        """Return the path of a file, starting with the name of the folder."""
        return f"{self.name}/{self.files[index].path.relative_to(self.path).as_posix()}"

    def get_location(self, index: int) -> SourceLocation:
        """Return where a row starts: at line 1 of its file."""
        return SourceLocation(self.get_id(index))

    def read_row(self, index: int) -> Row:
        """Read and decode one file. Raises InvalidRow, or InputError if it has changed."""
        row_id = self.get_id(index)
        num_bytes = self.files[index].stamp[0]
        if num_bytes > MAX_TEXT_BYTES:
            message = (
                f"the file has {num_bytes:,} bytes; at most {MAX_TEXT_BYTES >> 20} MiB are read"
            )
            raise InvalidRow("too long", message, where=row_id, fix="split or remove it")
        raw = self.files[index].read(0, num_bytes)
        text = raw.removeprefix(BYTE_ORDER_MARK)
        location = SourceLocation(row_id, offset=len(raw) - len(text))
        return Row(row_id, decode_text(text, location))

    def get_num_bytes(self, index: int) -> int:
        """Return the length of a file in bytes."""
        return self.files[index].stamp[0]

    def read_raw(self, index: int, max_bytes: int) -> tuple[bytes, int]:
        """Return (at most `max_bytes` bytes of a file, the length of the file in bytes)."""
        num_bytes = self.get_num_bytes(index)
        return self.files[index].read(0, min(max_bytes, num_bytes)), num_bytes


def open_folder(path: Path, name: str) -> TextFolder:
    """Find the texts of a folder.

    Raises InputError for a folder without texts, for special files, and for links out of it."""
    digest = hashlib.sha256()
    files: list[FileBytes] = []
    skipped_suffixes: Counter[str] = Counter()
    root = path.resolve()
    for file in _iter_visible_files(path):
        if not file.name.lower().endswith(TEXT_SUFFIXES):
            skipped_suffixes[file.suffix.lower()] += 1
            continue
        target = Path(os.path.realpath(file))  # unlike Path.resolve, it accepts a loop of links
        if not target.is_relative_to(root):
            message = f"a link out of the folder, to {target}"
            raise InputError(message, where=str(file), fix="replace it by a copy, or remove it")
        status = check_path(file)
        if not stat.S_ISREG(status.st_mode):
            fix = "remove it, or copy its content into a file"
            raise InputError("not a regular file", where=str(file), fix=fix)
        files.append(FileBytes(file, get_stamp(status)))
        with file.open("rb") as handle:
            file_digest = hashlib.file_digest(handle, "sha256").hexdigest()
        entry = f"{file.relative_to(path).as_posix()}\0{file_digest}\n"
        digest.update(entry.encode(errors="surrogateescape"))
    if not files:
        message = f"no {' or '.join(TEXT_SUFFIXES)} file in this folder"
        raise InputError(message, where=str(path), fix="pass the data file itself")
    return TextFolder(path, name, tuple(files), digest.hexdigest(), skipped_suffixes)


def _iter_visible_files(path: Path) -> Iterator[Path]:
    """Yield the files below a folder: those of a folder before its subfolders, sorted by name."""
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)
