"""Data sets of the hub as local files.

    pin_hub_data(recipe)   -> (recipe with the commit and the files of each hub source, notes)
    fetch_sources(sources) -> sources whose files are in the hub's cache

A recipe names a branch, a config and a split; a plan holds the commit and the files that they stand
for, so that a resumed run reads the same rows whatever was pushed since. Fetching downloads what is
not in the cache of huggingface_hub. Left out: which files make a split
(data/readers/hub_splits.py)."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import (
    COMMIT,
    SHOWN_COMMIT_CHARS,
    format_path,
    make_data_path,
    split_hub_path,
)
from tunesmith.core.hub_repo import (
    DEFAULT_REVISION,
    HubRef,
    HubRepo,
    download_files,
    find_snapshot,
    read_repo,
)
from tunesmith.data.readers.hub_splits import DEFAULT_SPLIT, HubChoice, choose_files
from tunesmith.model.hub.built_in import find_listings_dir
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import SOURCE_KEYS, Recipe, find_contradictions

README = "README.md"
MAX_README_BYTES = 2 * 10**6
SPLITS_BY_KEY = {"eval_data": "validation", "test_data": "test"}  # of other keys: train


def pin_hub_data(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with the commit and the files of each source on the hub, and notes.

    Raises InputError for a data set that cannot be read, and for a file with two roles."""
    changes: dict[str, object] = {}
    notes: list[str] = []
    for key in SOURCE_KEYS:
        sources: tuple[DataSource, ...] = getattr(recipe, key)
        if any(source.is_on_hub for source in sources):
            changes[key] = tuple(_pin_source(source, key, notes) for source in sources)
    rehearsal = recipe.rehearsal
    if rehearsal is not None and any(source.is_on_hub for source in rehearsal.data):
        sources = tuple(_pin_source(source, "rehearsal", notes) for source in rehearsal.data)
        changes["rehearsal"] = rehearsal.model_copy(update={"data": sources})
    if not changes:
        return recipe, ()
    pinned = recipe.model_copy(update=changes)
    settings = {key: getattr(pinned, key) for key in pinned.model_fields_set}
    for key, message in find_contradictions(settings):
        raise InputError(message, where=key, fix="name another split, or use eval_split")
    return pinned, tuple(dict.fromkeys(notes))


def fetch_sources(sources: Sequence[DataSource], key: str = "data") -> tuple[DataSource, ...]:
    """Return the sources with those on the hub in its cache, downloaded if they are not there.

    `key` of the recipe decides which split is read if none is named. Raises what `pin_hub_data` and
    `download_files` raise."""
    local: list[DataSource] = []
    for source in sources:
        if source.is_on_hub:
            source = _fetch_source(_pin_source(source, key, []))
        local.append(source)
    return tuple(local)


def _fetch_source(source: DataSource) -> DataSource:
    ref = _make_ref(source, "data")
    folder = find_snapshot(ref, source.data_files)
    if folder is None:
        folder = download_files(read_repo(ref, find_listings_dir()), source.data_files)
    return source.model_copy(update={"path": folder, "revision": None})


def _pin_source(source: DataSource, key: str, notes: list[str]) -> DataSource:
    """Return the source with the commit and the files that its revision and split stand for."""
    if not source.is_on_hub or _is_pinned(source):
        return source
    repo = read_repo(_make_ref(source, key), find_listings_dir())
    files = choose_files(
        [file.name for file in repo.files],
        "" if source.data_files else _read_readme(repo),
        HubChoice(source.config or "", source.split or "", source.data_files),
        where=repo.ref.where,
        default_split=SPLITS_BY_KEY.get(key, DEFAULT_SPLIT),
    )
    if repo.is_stored:
        commit = repo.commit[:SHOWN_COMMIT_CHARS]
        notes.append(
            f"{repo.ref.where}: the hub cannot be reached; commit {commit}, the last one seen, "
            "is used"
        )
    changes = {"path": make_data_path(repo.ref.id), "revision": repo.commit, "data_files": files}
    return source.model_copy(update={**changes, "config": None, "split": None})


def _is_pinned(source: DataSource) -> bool:
    has_patterns = any(set("*?[") & set(name) for name in source.data_files)
    is_commit = COMMIT.fullmatch(source.revision or "") is not None
    return is_commit and bool(source.data_files) and not has_patterns


def _make_ref(source: DataSource, key: str) -> HubRef:
    repo_id, revision = split_hub_path(source.path)
    revision = revision or source.revision or DEFAULT_REVISION
    where = f"{key}: {format_path(source.path)}"
    return HubRef("dataset", repo_id, revision, where)


def _read_readme(repo: HubRepo) -> str:
    """Return the README of a data set, whose metadata name its splits; "" if there is none."""
    for file in repo.files:
        if file.name == README and file.size_bytes <= MAX_README_BYTES:
            path = download_files(repo, [README]) / README
            return path.read_text(encoding="utf-8", errors="replace")
    return ""
