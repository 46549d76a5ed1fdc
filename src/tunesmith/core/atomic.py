"""Write files and folders atomically, also if the process is killed or the disk is full.

    write_file(path, bytes)     temporary file, fsync, replace, fsync of the folder
    with atomic_file(path) as file:     the same for content that is written in parts
    with atomic_dir(path, metadata={}) as folder:   the same for a folder, with a manifest
    verify_dir(path) -> ""      the problem of a folder, by the sizes and hashes in its manifest

Everything is written next to its target, so that the last step is a rename within one file system.
An OSError becomes a DiskError that says how much disk space is needed. Links are never followed:
a folder of a stranger may hold one that leads to a file of the user. Temporary names are random
and created exclusively; `open_unlinked` opens the few files that are written in place.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Generator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ELOOP, ENOLCK, ENOSPC, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any, NamedTuple

from tunesmith.core.errors import (
    DENIED_ERRNOS,
    MACHINE_ERRNOS,
    DiskError,
    InputError,
    to_machine_error,
)
from tunesmith.core.formatting import format_bytes
from tunesmith.core.json_io import dump_json, load_finite_json
from tunesmith.core.types import Json

MANIFEST = "manifest.json"
HASH_KEY = "sha256"
# names that a killed process leaves behind
TEMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
RESTORE_FOLDER_FIX = "restore the folder from a copy, or make it again"


class SealedFile(NamedTuple):
    """A file as the manifest of its folder lists it."""

    num_bytes: int
    sha256: str


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises DiskError if the disk refuses."""
    with atomic_file(path, len(content)) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, needed_bytes: int = 0) -> Generator[IO[bytes]]:
    """Yield a file to fill, which then replaces `path`; a link there is replaced, not followed.

    On any error the old file stays. Raises DiskError if the disk refuses, and InputError for a
    device, a pipe or a socket, or a link to one: a file in its place would break the machine."""
    _refuse_special_file(path)
    temporary = path.parent / _make_temp_name(TEMP_PREFIX, path.name)
    with disk_errors(path, needed_bytes):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)


def _refuse_special_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # nothing is there, or the disk says why not
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError("not a regular file", where=str(path), fix="name a file to write to")


def open_unlinked(path: Path, flags: int) -> int:
    """Open or create a file that is written in place, and return its descriptor.

    Raises InputError for a symbolic link, a hard link and anything but a file: writing would
    change something outside the folder."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == ELOOP:
            raise _make_link_error(path, "a symbolic link") from error
        raise
    status = os.fstat(descriptor)
    problem = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if not problem and status.st_nlink > 1:
        problem = "a file with several hard links"
    if problem:
        os.close(descriptor)
        raise _make_link_error(path, problem)
    return descriptor


def refuse_links(folder: Path) -> None:
    """Raise InputError for a symbolic link in an output folder, by its name."""
    for entry in sorted(folder.iterdir()):
        refuse_link(entry)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise _make_link_error(path, "a symbolic link")


def _make_link_error(path: Path, problem: str) -> InputError:
    return InputError(
        f"{problem}; writing it could change a file outside the output folder",
        where=str(path),
        fix="remove it, or choose another folder",
    )


@contextmanager
def atomic_dir(
    path: Path, *, metadata: Json, needed_bytes: int = 0, key: str = "output_dir"
) -> Generator[Path]:
    """Yield a folder to fill, which is then sealed with a manifest and renamed to `path`.

    An existing folder is replaced. On any error the new folder is removed and the old one stays.
    `needed_bytes`, if known, is checked against the free disk space first; `key` is the setting
    that chose the path. Raises DiskError if the disk refuses."""
    temporary = path.parent / _make_temp_name(TEMP_PREFIX, path.name)
    with disk_errors(path, needed_bytes, key):
        make_dirs(path.parent)
        require_disk_space(path.parent, needed_bytes, key)
        try:
            temporary.mkdir()
            yield temporary
            _seal(temporary, metadata)
            _replace_dir(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def verify_dir(folder: Path, *, should_hash: bool = True, unread: Collection[str] = ()) -> str:
    """Return the problem of a sealed folder, "" if there is none. Without `should_hash`, and of the
    files `unread`, only sizes are compared."""
    try:
        files = read_sealed_files(folder)
    except InputError:
        return f"{MANIFEST} is missing or broken"
    for name, (num_bytes, sha256) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {num_bytes}"
        if should_hash and name not in unread and hash_file(file) != sha256:
            return f"{name} was changed: its sha256 differs from the manifest"
    return ""


def read_manifest(folder: Path) -> Json:
    """Return the metadata and files of a sealed folder. Raises InputError unless the manifest is
    exactly as written, OSError if the disk fails."""
    try:
        content = (folder / MANIFEST).read_bytes()
        stored = load_finite_json(content)
        sealed = {key: value for key, value in stored.items() if key != HASH_KEY}
        if _encode_manifest(sealed) == content:
            return sealed
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:  # the disk fails now; the file may be whole
            raise
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InputError("missing or broken", where=str(folder / MANIFEST), fix=RESTORE_FOLDER_FIX)


def read_sealed_files(folder: Path) -> dict[str, SealedFile]:
    """Return the files of a sealed folder by their names. Raises InputError unless the manifest is
    exactly as written."""
    try:
        entries = read_manifest(folder)["files"].items()
        return {name: SealedFile(entry["bytes"], str(entry["sha256"])) for name, entry in entries}
    except (KeyError, TypeError, AttributeError):
        message = "it lists no files with their sizes and hashes"
        where = str(folder / MANIFEST)
        raise InputError(message, where=where, fix=RESTORE_FOLDER_FIX) from None


def make_dirs(path: Path) -> None:
    """Create a folder and its missing parents, each forced to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that a half-removed one never has its name."""
    trash = folder.parent / _make_temp_name(TRASH_PREFIX, folder.name)
    os.rename(folder, trash)
    _remove(trash)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left. Only for the process that may write in `folder`."""
    for leftover in folder.glob(".t*"):
        if leftover.name.startswith((TEMP_PREFIX, TRASH_PREFIX)):
            _remove(leftover)


def _remove(path: Path) -> None:
    """Remove a folder with its content, or a file or link by itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- disk space


def require_disk_space(folder: Path, needed_bytes: int, key: str = "output_dir") -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise _make_disk_full_error(folder, needed_bytes, free_bytes, key)


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0, key: str = "output_dir") -> Generator[None]:
    """Turn an OSError into a MachineError, mostly a DiskError."""
    try:
        yield
    except OSError as error:
        nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
        if error.errno in (ENOSPC, EDQUOT, EFBIG):
            raise _make_disk_full_error(
                path, needed_bytes, shutil.disk_usage(nearest).free, key
            ) from error
        raise_if_lockless(error, path, key)
        if error.errno in MACHINE_ERRNOS and error.errno not in DENIED_ERRNOS:
            raise to_machine_error(error, "cannot be written", path) from error
        fix = f"choose another {key}, or make it writable"
        raise DiskError(
            f"cannot be written: {error.strerror or error}", where=str(path), fix=fix
        ) from error


def raise_if_lockless(error: OSError, path: Path, key: str) -> None:
    """Raise DiskError if a lock was refused because the file system has none, or because its
    server gives none (NFS). Without it, two processes could write the same files."""
    if error.errno in (ENOLCK, ENOSYS, EOPNOTSUPP):
        raise DiskError(
            f"this file system gives no file locks: {error.strerror}",
            where=str(path),
            fix=f"set {key} to a local disk, or mount it with locks (NFS: run rpc.statd, or "
            "mount with local_lock=flock if no other machine writes there)",
        ) from error


def _make_disk_full_error(path: Path, needed_bytes: int, free_bytes: int, key: str) -> DiskError:
    needed = f"{format_bytes(needed_bytes)} ({needed_bytes} bytes)" if needed_bytes else "more"
    free = f"{format_bytes(free_bytes)} ({free_bytes} bytes)"
    return DiskError(
        f"no space left on the disk: {needed} needed, {free} free",
        where=str(path),
        fix=f"free some disk space, or set {key} to another disk",
    )


# ---------------------------------------------------------------- steps


def _make_temp_name(prefix: str, name: str) -> str:
    return f"{prefix}{name}-{os.getpid()}-{secrets.token_hex(4)}"


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _seal(folder: Path, metadata: Json) -> None:
    entries = sorted(folder.rglob("*"))
    files: dict[str, Any] = {}
    for path in entries:
        fsync_path(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": hash_file(path),
            }
    _write_synced(folder / MANIFEST, _encode_manifest({**metadata, "files": files}))
    fsync_path(folder)


def _encode_manifest(sealed: Json) -> bytes:
    """Encode a manifest with a hash of its content, so that changes to it are detected, too."""
    return dump_json({**sealed, HASH_KEY: hashlib.sha256(dump_json(sealed)).hexdigest()}, indent=2)


def _replace_dir(temporary: Path, path: Path) -> None:
    if path.exists() or path.is_symlink():
        old = path.parent / _make_temp_name(TRASH_PREFIX, path.name)
        os.rename(path, old)
        os.rename(temporary, path)
        fsync_path(path.parent)
        _remove(old)
    else:
        os.rename(temporary, path)
        fsync_path(path.parent)
