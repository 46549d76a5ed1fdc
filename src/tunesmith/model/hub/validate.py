"""Checks that a model folder is safe and complete, before transformers sees it.

In: a folder. Out: nothing, or an InputError that names the file and the key or tensor. Only JSON
files and the headers of safetensors files are read; no code of the folder is imported or executed,
and no pickle is opened. A downloaded folder may hold links to anything that the user can read, and
its tokenizer and templates are later copied next to the adapter, so a link must stay inside its
folder. The one exception is the hub's cache: its snapshots link to the sibling folder `blobs`.

Left out: whether tunesmith can train the model (`spec.py`), the content of tokenizer.json and of
chat templates (`data`)."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.core.errors import InputError, raise_if_machine_failed
from tunesmith.core.json_io import read_json_object
from tunesmith.core.types import Json
from tunesmith.model.hub.families import find_family

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
TEMPLATES_DIR = "additional_chat_templates"  # the only subfolder that is read
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_JSON_BYTES = 64 * 2**20
MAX_CONFIG_BYTES = 4 * 2**20  # of config.json
MAX_JSON_VALUES = 300_000  # an index of a trillion parameters has half as many
MAX_CONFIG_VALUES = 100_000
MAX_BYTES_BY_SUFFIX = {
    ".json": MAX_JSON_BYTES,
    ".jinja": 2**20,
    ".txt": 64 * 2**20,
    ".model": 64 * 2**20,
}
MAX_HEADER_BYTES = 4 * 2**20  # enough for thirty thousand tensors; the format allows 100 MB
MAX_RANK = 8  # numbers in a shape
MAX_NAME_CHARS = 255  # of a file
MAX_PATH_CHARS = 300  # of a key in an error
# fmt: off
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}
# fmt: on

# JSON keys that make transformers import code from the folder or the hub, read another file, pass
# arguments to a constructor, or build other layers than the sizes in config.json describe.
CODE_KEY = re.compile(
    r"auto_map|custom_pipelines|_?(attn|experts)_implementation.*|use_kernels|kernel_config"
    r"|configuration_files|fast_tokenizer_files|init_inputs|per_layer_config|compression_config"
)
TRUST_KEY = "trust_remote_code"
AUTO_MAP_KEY = "auto_map"  # class of transformers -> class in the repository that takes its place
TOKENIZER_CLASS = "AutoTokenizer"
CODE_FIX = (
    "remove the key if transformers supports this model type natively; "
    "tunesmith never runs code from a model"
)
LAYER_SIZES_KEY = "per_layer_config"
HEAD_SIZE_KEYS = {"head_dim", "num_key_value_heads"}
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of large files
DOWNLOAD_FILE_FIX = "download the file again"
FILE_KEY = re.compile(r"\w+_file")
# Classes that load tokenizer.json unchanged. Others bring rules, files or code.
SAFE_TOKENIZER_CLASSES = re.compile(
    r"(PreTrained|Llama|Gemma|GPT2|GPTNeoX|CodeGen|Qwen2|Qwen3_5|Cohere|CodeLlama|Granite|HunYuan"
    r"|HY)?Tokenizer(Fast)?|TokenizersBackend|MistralCommon(Backend|Tokenizer)"
)


@dataclass(frozen=True)
class TensorHeader:
    """Header of one tensor in a safetensors file. `begin` and `end` count from the first data byte.

    A packed matrix has `scales`, each of a `block` of rows and columns (packed_tensors.py)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    scales: TensorHeader | None = None
    block: tuple[int, int] | None = None


def check_folder(folder: Path, *, needs_weights: bool = True) -> None:
    """Refuse a folder that could run code or read other files, holds only pickles, or has damaged
    weights.

    Without `needs_weights` the weights may be missing. Raises InputError."""
    check_files(folder)
    read_model_json(folder / "config.json")
    modules = "|".join(re.escape(path.stem) for path in folder.glob("*.py"))
    code_reference = re.compile(rf"(.*--)?({modules})\.(py|[A-Z]\w*)") if modules else None
    for path in sorted({*folder.glob("*config*.json"), *folder.glob("special_tokens_map.json")}):
        content = read_model_json(path)
        if path.name == "config.json" and find_replaced_code(content):
            del content[AUTO_MAP_KEY]
        _check_code(path, content, code_reference)
    if (folder / "custom_generate").exists():
        message = "the model brings its own code for generate()"
        fix = "remove the folder custom_generate; tunesmith never runs code from a model"
        raise InputError(message, where=str(folder / "custom_generate"), fix=fix)
    if (folder / "adapter_config.json").exists():
        fix = "set model: to the base model, and adapter_from: to this folder"
        raise InputError("this folder is an adapter, not a model", where=str(folder), fix=fix)
    _check_tokenizer_class(folder)
    if needs_weights or has_weights(folder):
        read_headers(folder)


def find_replaced_code(config: Json) -> tuple[str, ...]:
    """Return the classes of the repository that a config.json names although transformers has its
    own for this model type, which are loaded instead. Nothing replaces a tokenizer's code."""
    auto_map = config.get(AUTO_MAP_KEY)
    model_type = config.get("model_type")
    if not isinstance(auto_map, dict) or not isinstance(model_type, str):
        return ()
    is_replaced = find_family(model_type) is not None and TOKENIZER_CLASS not in auto_map
    names = [name for name in auto_map.values() if isinstance(name, str)]
    return tuple(sorted(set(names))) if is_replaced and len(names) == len(auto_map) else ()


# ---------------------------------------------------------------- files and links


def check_files(folder: Path) -> None:
    """Raise InputError for a link that leads out of the folder, for an entry that is neither a file
    nor a folder, and for a file that is too large."""
    root = folder.resolve()
    allowed_roots = [root]
    if root.parent.name == "snapshots":
        allowed_roots.append(root.parent.parent / "blobs")
    for directory in (root, root / TEMPLATES_DIR):
        if not directory.is_dir():
            continue
        for path in sorted(directory.iterdir()):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(allowed_root) for allowed_root in allowed_roots):
                message = f"a link out of its folder, to {target}"
                fix = "if you trust the file, copy it into the folder"
                raise InputError(message, where=str(path), fix=fix)
            _check_file(path)


def _check_file(path: Path) -> None:
    try:
        file_stat = path.stat()
    except OSError as error:
        raise_if_machine_failed(error, path)
        message = f"cannot be read: {error.strerror}"
        raise InputError(message, where=str(path), fix="copy the folder again") from error
    is_file = stat.S_ISREG(file_stat.st_mode)
    if not (is_file or stat.S_ISDIR(file_stat.st_mode)):
        raise InputError("neither a file nor a folder", where=str(path), fix="remove it")
    max_bytes = MAX_BYTES_BY_SUFFIX.get(path.suffix)
    if is_file and max_bytes is not None and file_stat.st_size > max_bytes:
        message = f"the file has {file_stat.st_size:,} bytes, more than {max_bytes:,}"
        raise InputError(message, where=str(path), fix=DOWNLOAD_FILE_FIX)


def read_model_json(path: Path) -> Json:
    """Return the object in a JSON file. Raise InputError if the file is missing, too large, not
    JSON or not an object."""
    if not path.is_file():
        fix = "give a folder written by `save_pretrained`, with config.json and *.safetensors"
        raise InputError(f"there is no {path.name}", where=str(path.parent), fix=fix)
    is_config = path.name == "config.json"
    max_bytes = MAX_CONFIG_BYTES if is_config else MAX_JSON_BYTES
    if path.stat().st_size > max_bytes:
        message = f"the file is larger than {max_bytes >> 20} MiB"
        raise InputError(message, where=str(path), fix=DOWNLOAD_FILE_FIX)
    max_values = MAX_CONFIG_VALUES if is_config else MAX_JSON_VALUES
    return read_json_object(path, fix=DOWNLOAD_FILE_FIX, max_values=max_values)


# ---------------------------------------------------------------- weights


def has_weights(folder: Path) -> bool:
    """Return whether a weight file exists. An index alone comes with every download of the small
    files."""
    if (folder / WEIGHTS_FILE).is_file():
        return True
    return (folder / INDEX_FILE).is_file() and any(folder.glob("*.safetensors"))


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return tensor name -> header for the safetensors files that transformers would load. Raise
    InputError if they are missing or damaged."""
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        raise _make_missing_weights_error(folder)
    where = str(index_file)
    weight_map = read_model_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the index has no weight_map", where=where, fix=DOWNLOAD_FILE_FIX)
    headers_by_file: dict[str, dict[str, TensorHeader]] = {}
    headers: dict[str, TensorHeader] = {}
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not is_name or not name.endswith(".safetensors") or len(name) > MAX_NAME_CHARS:
            message = (
                f"{tensor[:200]} points to {name!r:.200}, not to a safetensors file in the same"
                " folder"
            )
            raise InputError(message, where=where, fix=DOWNLOAD_FILE_FIX)
        if name not in headers_by_file:
            headers_by_file[name] = read_header(folder / name)
        if tensor not in headers_by_file[name]:
            message = f"{name} has no tensor {tensor[:200]}"
            raise InputError(message, where=where, fix="download the model again")
        headers[tensor] = headers_by_file[name][tensor]
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return tensor name -> header of one safetensors file. Raise InputError if the file is
    damaged."""
    if not path.is_file():
        raise InputError("the file is missing", where=str(path), fix="download the model again")
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8]:
            message = "a pointer of Git LFS instead of the weights"
            raise InputError(message, where=str(path), fix="run `git lfs pull` in its repository")
        num_bytes = int.from_bytes(start, "little")
        if MAX_HEADER_BYTES < num_bytes < path.stat().st_size:
            message = f"a header of {num_bytes:,} bytes is over the limit of {MAX_HEADER_BYTES:,}"
            raise InputError(message, where=str(path), fix=DOWNLOAD_FILE_FIX)
        try:
            # checks types, shapes and offsets, and that the tensors cover the file without gaps
            with safe_open(path, "numpy"):
                pass
            content = json.loads(file.read(num_bytes), object_pairs_hook=_reject_duplicates)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise_if_machine_failed(error, path)
            message = f"damaged or not a safetensors file ({error})"
            raise InputError(message, where=str(path), fix=DOWNLOAD_FILE_FIX) from error
    headers: dict[str, TensorHeader] = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if len(entry["shape"]) > MAX_RANK:
            message = f"the tensor {name:.200} has {len(entry['shape']):,} dimensions"
            raise InputError(message, where=str(path), fix=DOWNLOAD_FILE_FIX)
        if entry["dtype"] not in DTYPE_BYTES:
            message = f"the tensor {name:.200} has the unsupported type {entry['dtype']}"
            raise InputError(message, where=str(path), fix="use weights in BF16, F16 or F32")
        begin, end = entry["data_offsets"]
        headers[name] = TensorHeader(path, entry["dtype"], tuple(entry["shape"]), begin, end)
    return headers


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. safetensors itself accepts a repeated key and keeps the last value."""
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"the key {name:.200} is repeated")
        unique[name] = value
    return unique


def _make_missing_weights_error(folder: Path) -> InputError:
    pickles: list[str] = []
    for pattern in PICKLE_PATTERNS:
        pickles += [path.name for path in folder.glob(pattern)]
    if pickles:
        message = (
            f"only pickled weights ({min(pickles)}): loading a pickle can run arbitrary code, "
            "so tunesmith does not"
        )
        fix = (
            "convert it in an environment that you trust: load the model there with transformers "
            "and call save_pretrained(folder), which writes safetensors"
        )
        return InputError(message, where=str(folder), fix=fix)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return InputError("the folder holds a GGUF", where=str(folder), fix=f"give {ggufs[0]}")
    message = f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return InputError(message, where=str(folder), fix="give a folder with safetensors")


# ---------------------------------------------------------------- keys that lead to code or files


def _check_code(path: Path, content: Json, code_reference: re.Pattern[str] | None) -> None:
    for key, key_path, value in _walk_json(content):
        where = f"{path}:{key_path}"
        if key == LAYER_SIZES_KEY and _is_head_sizes(value):
            continue
        if key == TRUST_KEY and value:
            raise InputError("the model requires trust_remote_code", where=where, fix=CODE_FIX)
        # Older versions of transformers wrote `_attn_implementation_autoset: true`; a boolean
        # names no code.
        if CODE_KEY.fullmatch(key) and value is not None and not isinstance(value, bool):
            message = (
                f"the key {key} makes transformers load other code, files or layers than the "
                f"config describes ({str(value)[:80]})"
            )
            raise InputError(message, where=where, fix=CODE_FIX)
        if not isinstance(value, str):
            continue
        if code_reference and code_reference.fullmatch(value):
            message = f"{value!r} refers to a Python file of the folder"
            raise InputError(message, where=where, fix=CODE_FIX)
        if FILE_KEY.fullmatch(key) and _is_outside(path.parent, value):
            message = f"the key {key} names a file outside of the folder"
            fix = "remove the key; a model's files belong in its folder"
            raise InputError(message, where=where, fix=fix)


def _is_head_sizes(value: Any) -> bool:
    """Whether layers differ only in their attention heads, as those of Gemma 4 do. The weights are
    compared with what transformers builds from it."""
    if not isinstance(value, dict):
        return False
    for sizes in value.values():
        if not isinstance(sizes, dict) or sizes.keys() - HEAD_SIZE_KEYS:
            return False
    return True


def _is_outside(folder: Path, value: str) -> bool:
    """Return whether a path leads to an existing file outside of the folder. Old tokenizers carry
    paths of the machine that saved them; a missing file cannot be read."""
    target = os.path.realpath(folder / value[:4096].replace("\0", ""))
    return os.path.exists(target) and not Path(target).is_relative_to(folder.resolve())


def _check_tokenizer_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    name = read_model_json(path).get("tokenizer_class") if path.is_file() else None
    if name is not None and not (isinstance(name, str) and SAFE_TOKENIZER_CLASSES.fullmatch(name)):
        message = f"tokenizer_class is {name!r:.80}, which is not supported"
        fix = "if its tokenizer.json is complete, write PreTrainedTokenizerFast"
        raise InputError(message, where=f"{path}:tokenizer_class", fix=fix)


def _walk_json(content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, path, value) of every value of nested JSON. Items of a list have the key of their
    list. Paths are bounded: each item of a long list under a long key has a copy."""
    pending: list[tuple[str, str, Any]] = [("", "", content)]
    while pending:
        key, path, value = pending.pop()
        yield key, path.lstrip("."), value
        if isinstance(value, dict):
            for name, inner in value.items():
                pending.append((name, f"{path}.{name[:MAX_PATH_CHARS]}"[-MAX_PATH_CHARS:], inner))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                pending.append((key, f"{path}[{index}]"[-MAX_PATH_CHARS:], inner))
