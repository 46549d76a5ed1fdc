"""Names of repositories on the Hugging Face hub, as recipes and paths hold them.

    "org/name@v1.0"                         -> ("org/name", "v1.0"), a model with its revision
    Path("hf://org/rows")                   a data set; pathlib writes it as hf:/org/rows
    .../datasets--org--rows/snapshots/3fa.. -> "hf://org/rows@3fa..", a file in the hub's cache

Nothing is imported and nothing is looked up, so every layer may read names. Left out: what the
repositories hold (hub_repo.py)."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
HUB_ID = re.compile(f"{_NAME}/{_NAME}")
MAX_ID_CHARS = 96
COMMIT = re.compile(r"[0-9a-f]{40}")
SCHEME = "hf:"  # the first part of a path such as hf://org/rows
SHOWN_COMMIT_CHARS = 12
# A name with one of these suffixes is a file, never a repository.
FILE_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz"),
    *(".txt", ".md", ".yaml", ".yml", ".zip", ".gguf"),
)
_CACHED_FILE = re.compile(r"/datasets--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)$")


def split_revision(name: str) -> tuple[str, str]:
    """Split `org/name@revision`; the revision is empty without an @."""
    repo_id, _, revision = name.partition("@")
    return repo_id, revision


def is_hub_id(name: str) -> bool:
    """Return whether a name is that of a repository, with or without a revision."""
    repo_id, separator, revision = name.partition("@")
    is_complete = bool(revision) or not separator
    if not is_complete or len(repo_id) > MAX_ID_CHARS or repo_id.endswith(".git"):
        return False
    return ".." not in repo_id and "--" not in repo_id and bool(HUB_ID.fullmatch(repo_id))


def remove_commit(name: str) -> str:
    """Return a model's name without the commit that a run has pinned it to."""
    repo_id, revision = split_revision(name)
    is_pinned = is_hub_id(name) and COMMIT.fullmatch(revision) is not None
    return repo_id if is_pinned else name


def pin_model_name(name: str, folder: Path) -> str:
    """Return the name with the commit of its snapshot in the hub's cache; other names as they
    are."""
    if not is_hub_id(name) or folder.parent.name != "snapshots":
        return name
    repo_id, _ = split_revision(name)
    is_snapshot = folder.parent.parent.name == f"models--{repo_id.replace('/', '--')}"
    return f"{repo_id}@{folder.name}" if is_snapshot and COMMIT.fullmatch(folder.name) else name


# ---------------------------------------------------------------- data


def is_hub_path(path: Path) -> bool:
    """Return whether the path of a data source is a data set of the hub."""
    return path.parts[:1] == (SCHEME,)


def make_hub_path(name: str, folder: Path) -> str:
    """Return `hf://org/rows` for a name that can only be a data set of the hub, else "".

    A file or folder of that name wins, and so does any path below a folder that exists: a typing
    error in `data/train` is not looked up on the hub."""
    if name.startswith(SCHEME):
        return name
    is_file_name = name.lower().endswith(FILE_SUFFIXES)
    if is_file_name or not is_hub_id(name) or (folder / name.partition("/")[0]).exists():
        return ""
    return f"{SCHEME}//{name}"


def make_data_path(repo_id: str) -> Path:
    """Return the path of a data set of the hub."""
    return Path(SCHEME, repo_id)


def split_hub_path(path: Path) -> tuple[str, str]:
    """Split `hf://org/rows@revision` into (id, revision); `hf://datasets/org/rows` is accepted.

    Raises ValueError if it is not the path of a data set."""
    _, *parts = path.parts
    if parts[:1] == ["datasets"]:
        parts = parts[1:]
    repo_id, revision = split_revision("/".join(parts))
    if len(parts) > 2 and "@" not in parts[1]:
        name = "/".join(parts[:2])
        file = "/".join(parts[2:])
        raise ValueError(f"a file of the hub is written {{path: hf://{name}, data_files: {file}}}")
    if not is_hub_id("/".join(parts)):
        raise ValueError(f"{format_path(path)!r:.100} is not a data set of the hub: hf://org/name")
    return repo_id, revision


def is_cached_file(path: Path) -> bool:
    """Return whether a file belongs to a data set in the hub's cache, where nothing is written."""
    return _CACHED_FILE.search(path.as_posix()) is not None


def format_path(path: Path) -> str:
    """Return a path as text; a data set of the hub, and a file of it in the cache, by its name."""
    text = path.as_posix()
    if is_hub_path(path):
        return f"{SCHEME}//{text.removeprefix(SCHEME).lstrip('/')}"
    if match := _CACHED_FILE.search(text):
        owner, name, commit, file = match.groups()
        return f"{SCHEME}//{owner}/{name}@{commit[:SHOWN_COMMIT_CHARS]}/{file}"
    return str(path)
