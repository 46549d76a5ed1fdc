"""Repositories of the Hugging Face hub: their files, downloads into the hub's cache, and errors.

    read_repo(HubRef("dataset", "org/rows", "main", "data")) -> HubRepo(commit, files)
    download_files(repo, names)                              -> folder of the snapshot

Every downloaded file is compared with the hash that the hub lists, since huggingface_hub compares
sizes only. The list of files is stored, so that what is in the cache can be used without network.
Errors are sentences that say what to do; they quote no text of the server and no address, which
may hold a token. Left out: which files are wanted (model/hub/resolve.py, session/hub_data.py)."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunesmith.core.atomic import hash_file, require_disk_space, write_file
from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.core.hub_names import COMMIT
from tunesmith.core.json_io import dump_json, parse_as, read_json

Kind = Literal["model", "dataset"]

KIND_NAMES: dict[Kind, str] = {"model": "model", "dataset": "data set"}
# The base error of the HTTP client that this version of the hub package uses (httpx or httpx2).
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
HUB_ERRORS = (HTTP_ERROR, OSError, HFValidationError)
DEFAULT_REVISION = "main"
_RESET_SECONDS = re.compile(r"\bt=(\d+)")  # in a RateLimit header: "api";r=0;t=42


@dataclass(frozen=True)
class HubRef:
    """A repository as a recipe names it. `where` is the key, for errors."""

    kind: Kind
    id: str
    revision: str = DEFAULT_REVISION  # a branch, a tag or a commit
    where: str = ""

    @property
    def title(self) -> str:
        return f"{KIND_NAMES[self.kind]} {self.id!r}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `sha256` is that of a large file, `blob_id` git's hash of others."""

    name: str
    size_bytes: int
    sha256: str
    blob_id: str

    def has_content_of(self, path: Path) -> bool:
        """Return whether a local file has this content."""
        if path.stat().st_size != self.size_bytes:
            return False
        if self.sha256:
            return hash_file(path) == self.sha256
        header = f"blob {self.size_bytes}\0".encode()
        content = header + path.read_bytes()
        return hashlib.sha1(content, usedforsecurity=False).hexdigest() == self.blob_id


@dataclass(frozen=True)
class HubRepo:
    """The files of a repository at a commit.

    With `is_stored`, the hub could not be reached, and this is the stored list of the last time."""

    ref: HubRef
    commit: str
    files: tuple[HubFile, ...]
    is_stored: bool = False


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: tuple[HubFile, ...]


def read_repo(ref: HubRef, listings: Path) -> HubRepo:
    """Ask the hub which files a repository has, and store the answer in the folder `listings`.

    A commit never changes, so its stored list is used; without network, that of a branch is used
    as well. Raises InputError for a repository that does not exist or may not be read, MachineError
    if the hub cannot be reached and nothing is stored."""
    stored = read_stored_repo(ref, listings)
    if stored is not None and COMMIT.fullmatch(ref.revision):
        return stored
    try:
        listing = _request_listing(ref)
    except HUB_ERRORS as error:
        if stored is not None and is_unreachable(error):
            return dataclasses.replace(stored, is_stored=True)
        raise make_hub_error(error, ref) from error
    listings.mkdir(parents=True, exist_ok=True)
    for revision in {ref.revision, listing.commit}:
        write_file(_get_listing_file(ref, revision, listings), dump_json(listing))
    return HubRepo(ref, listing.commit, listing.files)


def read_stored_repo(ref: HubRef, listings: Path) -> HubRepo | None:
    """Return what a repository held when it was last seen, None if it never was."""
    file = _get_listing_file(ref, ref.revision, listings)
    if not file.is_file():
        return None
    listing = parse_as(_Listing, read_json(file), where=str(file))
    return HubRepo(ref, listing.commit, listing.files)


def _get_listing_file(ref: HubRef, revision: str, listings: Path) -> Path:
    return listings / f"{ref.kind}--{quote(f'{ref.id}@{revision}', safe='')}.json"


def _request_listing(ref: HubRef) -> _Listing:
    api = HfApi()
    request_info = api.model_info if ref.kind == "model" else api.dataset_info
    info = request_info(ref.id, revision=ref.revision, files_metadata=True)
    files: list[HubFile] = []
    for sibling in info.siblings or ():
        sha256 = sibling.lfs.sha256 if sibling.lfs else ""
        files.append(HubFile(sibling.rfilename, sibling.size or 0, sha256, sibling.blob_id or ""))
    return _Listing(info.sha or "", tuple(files))


def download_files(repo: HubRepo, names: Sequence[str]) -> Path:
    """Return the folder of the snapshot in the hub's cache, with these files in it.

    Files that are not there are downloaded and compared with their hash. Raises MachineError for
    a full disk, an incomplete download, and content that is not what the hub lists."""
    ref = repo.ref
    pinned = dataclasses.replace(ref, revision=repo.commit)
    if (snapshot := find_snapshot(pinned, names)) is not None:
        return snapshot
    wanted = set(names)
    missing = [
        file
        for file in repo.files
        if file.name in wanted and find_snapshot(pinned, [file.name]) is None
    ]
    with hub_errors(ref):
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        require_disk_space(cache, sum(file.size_bytes for file in missing), "HF_HOME")
        downloaded = snapshot_download(
            ref.id,
            repo_type=ref.kind,
            revision=ref.revision,
            allow_patterns=[glob.escape(file.name) for file in missing],
        )
    folder = Path(downloaded)
    if folder.name != repo.commit:
        message = f"{ref.title} changed while it was downloaded"
        raise MachineError(message, where=ref.where, fix="run the command again")
    for file in missing:
        _refuse_other_content(ref, file, folder / file.name)
    return folder


def find_snapshot(ref: HubRef, names: Sequence[str]) -> Path | None:
    """Return the folder of a commit in the hub's cache if it has these files."""
    folders: set[Path] = set()
    for name in names:
        path = try_to_load_from_cache(ref.id, name, revision=ref.revision, repo_type=ref.kind)
        if not isinstance(path, str):
            return None
        folders.add(Path(path).parents[name.count("/")])
    return folders.pop() if folders else None


def _refuse_other_content(ref: HubRef, file: HubFile, path: Path) -> None:
    """Raise MachineError unless a file is what the hub lists; remove it, or it would be used."""
    if file.has_content_of(path):
        return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    message = f"{file.name} of {ref.title} is not the file that the hub lists: its hash differs"
    fix = "run the command again; if it happens again, do not trust the server of HF_ENDPOINT"
    raise MachineError(message, where=ref.where, fix=fix)


# ---------------------------------------------------------------- errors


@contextmanager
def hub_errors(ref: HubRef) -> Iterator[None]:
    """Turn errors of the hub into InputError and MachineError."""
    try:
        yield
    except HUB_ERRORS as error:
        raise make_hub_error(error, ref) from error


def make_hub_error(error: BaseException, ref: HubRef) -> TunesmithError:
    """Return what went wrong as a sentence, with what to do."""
    error = _find_cause(error)
    where = ref.where
    if isinstance(error, GatedRepoError):
        message = f"{ref.title} is gated: its owners decide who may download it"
        fix = "ask for access on its page, then set HF_TOKEN to a token of that account"
        return InputError(message, where=where, fix=fix)
    if isinstance(error, RevisionNotFoundError):
        message = f"{ref.title} has no revision {ref.revision!r:.80}"
        return InputError(message, where=where, fix="give a branch, a tag or a commit of it")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        message = f"the hub has no {ref.title}, or you have no access to it"
        kind = KIND_NAMES[ref.kind]
        fix = f"check the spelling; for a private or gated {kind}, set HF_TOKEN"
        return InputError(message, where=where, fix=fix)
    if isinstance(error, HfHubHTTPError):
        return _make_status_error(error, ref)
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        message = f"a file of {ref.title} has disappeared"
        return MachineError(message, where=where, fix="run the command again")
    if isinstance(error, OSError) and error.errno:
        message = f"the cache of the hub cannot be written: {error.strerror}"
        fix = "free disk space, or set HF_HOME to a writable folder"
        return MachineError(message, where=where, fix=fix)
    if not is_unreachable(error):
        message = f"the download of {ref.title} is incomplete"
        return MachineError(message, where=where, fix="run the command again")
    message = f"the hub cannot be reached, and {ref.title} is not in its cache"
    fix = (
        "check the path, the network, HF_ENDPOINT and HF_HUB_OFFLINE; or download it elsewhere and "
        "give the path"
    )
    return MachineError(message, where=where, fix=fix)


def _find_cause(error: BaseException) -> BaseException:
    """Return the error that made huggingface_hub look into its cache in vain."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_unreachable(error: BaseException) -> bool:
    """Return whether the hub gave no answer at all."""
    error = _find_cause(error)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return True
    return isinstance(error, HTTP_ERROR) and not isinstance(error, HfHubHTTPError)


def _make_status_error(error: HfHubHTTPError, ref: HubRef) -> TunesmithError:
    status = error.response.status_code
    where = ref.where
    if status == 401:
        fix = "set HF_TOKEN to a valid token, or unset it if the repository is public"
        return InputError("the hub does not accept the token", where=where, fix=fix)
    if status == 403:
        message = f"the token is not allowed to read {ref.title}"
        fix = "set HF_TOKEN to a token that may read it, or ask its owners"
        return InputError(message, where=where, fix=fix)
    if status == 429:
        headers = error.response.headers
        reset = _RESET_SECONDS.search(headers.get("ratelimit", ""))
        seconds = headers.get("retry-after") or (reset[1] if reset else "")
        wait = f"{seconds} seconds" if seconds.isdigit() else "a few minutes"
        message = "rate-limited by the Hub (429)"
        fix = f"wait {wait} and run the command again; HF_TOKEN raises the limit"
        return MachineError(message, where=where, fix=fix)
    if status >= 500:
        message = f"Hub server error (status {status})"
        return MachineError(message, where=where, fix="run the command again later")
    message = f"the hub refuses the request for {ref.title} (status {status})"
    return InputError(message, where=where, fix="check the name, the revision and HF_ENDPOINT")
