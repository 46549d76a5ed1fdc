"""API keys: made once, shown once, stored as hashes.

    ring = KeyRing(path);  ring.find("tsk_...") -> ApiKey | None
    add_key(path, "ci", scopes=("infer",)) -> ("tsk_...", ApiKey)

In: a file that only its user can read, with the sha256 of each key. A key is 32 random bytes, so a
slow hash would add nothing. The file is read again when it changes: a removed key stops working
at the next request. Left out: which route needs which scope (app.py)."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from tunesmith.core.atomic import atomic_file, disk_errors
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json_object

Scope = Literal["infer", "feedback", "metrics", "admin"]  # admin includes the others
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY_PREFIX = "tsk_"
KEY_BYTES = 32
KEYS_FORMAT = 1
MAX_NAME_CHARS = 64
MAX_KEYS = 1000


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret. `models` are the names it may use, empty for all."""

    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: str
    models: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A short name of the key's content, which salts caches."""
        return self.sha256[:16]

    def has_scope(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def can_use_model(self, model: str) -> bool:
        return not self.models or model in self.models


@dataclass(frozen=True)
class KeyFile:
    """The content of the file."""

    format: int
    keys: tuple[ApiKey, ...]


def make_anonymous_key() -> ApiKey:
    """Return the key of a server without authentication; it may do everything."""
    return ApiKey("anonymous", SCOPES, hash_key(""), created="")


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def find_keys_file() -> Path:
    """Return the default file, below the user's configuration."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "tunesmith" / "keys.json"


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read the keys. Raises InputError for a file that others can read, or that is no key file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        raise InputError("not a file of this user", where=str(path), fix="use another key file")
    if status.st_mode & 0o077:
        raise InputError("others can read this file", where=str(path), fix=f"chmod 600 {path}")
    content = parse_as(KeyFile, read_json_object(path), where=str(path))
    if content.format != KEYS_FORMAT:
        message = (
            f"format {content.format} is not supported; this version reads format {KEYS_FORMAT}"
        )
        raise InputError(message, where=str(path), fix="make new keys: tunesmith keys add NAME")
    return content.keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Write the keys to a file that only this user can read."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(dump_json(KeyFile(KEYS_FORMAT, tuple(keys)), indent=1))


def add_key(
    path: Path, name: str, *, scopes: Sequence[Scope] = ("infer",), models: Sequence[str] = ()
) -> tuple[str, ApiKey]:
    """Make a key and store its hash. Returns the key itself, which is stored nowhere."""
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InputError(
            f"{name!r:.80} is not a valid key name", fix="use up to 64 printable letters"
        )
    if not scopes:
        raise InputError("a key needs a scope", where="--scope", fix=f"use {', '.join(SCOPES)}")
    for scope in scopes:
        if scope not in SCOPES:
            raise InputError(f"there is no scope {scope!r:.40}", fix=f"use {', '.join(SCOPES)}")
    keys = read_keys(path)
    if name in [key.name for key in keys]:
        raise InputError(f"there is a key {name!r}", where=str(path), fix="use another name")
    if len(keys) >= MAX_KEYS:
        raise InputError(f"{MAX_KEYS:,} keys are the limit", where=str(path), fix="remove some")
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    key = ApiKey(name, tuple(scopes), hash_key(secret), created, tuple(models))
    write_keys(path, [*keys, key])
    return secret, key


def remove_key(path: Path, name: str) -> None:
    """Remove a key by its name. Raises InputError if there is none."""
    keys = read_keys(path)
    remaining = [key for key in keys if key.name != name]
    if len(remaining) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise InputError(f"there is no key {name!r:.80}", where=str(path), fix=f"keys: {names}")
    write_keys(path, remaining)


class KeyRing:
    """The keys of a running server. Without a file, everyone has the anonymous key."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._version: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()
        if path is not None:
            self._reread()

    def find(self, authorization: str) -> ApiKey | None:
        """Return the key of an Authorization header. The time taken does not depend on how much of
        a wrong key is right. Raises InputError for a file that has become unreadable."""
        if self.path is None:
            return make_anonymous_key()
        self._reread()
        scheme, _, secret = authorization.partition(" ")
        digest = hash_key(secret.strip())
        matching: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                matching = key
        return matching if scheme.lower() == "bearer" else None

    def _reread(self) -> None:
        """Read the file again if it has changed; a file that is gone leaves no key."""
        assert self.path is not None
        try:
            status = os.stat(self.path)
        except OSError:
            self._keys = ()
            self._version = None
            return
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if version != self._version:
            self._keys = ()
            self._version = None
            self._keys = read_keys(self.path)
            self._version = version
