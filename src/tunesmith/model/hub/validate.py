"""Whether a model folder is safe and complete, decided before transformers sees it.

In: a folder. Out: nothing, or an InputError that names the file and the key or tensor. Only JSON
and the headers of safetensors files are read; nothing of the folder is imported or executed, and no
pickle is opened. Left out: links and sizes (`files.py`), whether tunesmith can train the model
(`spec.py`), what is inside tokenizer.json and chat templates (`data`)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.model.hub.files import check_files

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # a hundred thousand tensors; the format allows 100 MB
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
DTYPE_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}

# Keys with which a JSON file makes transformers import code from the folder or the hub, read
# another file, hand arguments to a constructor, or build other layers than the sizes say.
CODE_KEY = re.compile(
    r"auto_map|custom_pipelines|_?(attn|experts)_implementation.*|use_kernels|kernel_config|configuration_files"
    r"|fast_tokenizer_files|init_inputs|per_layer_config|compression_config"
)
CODE_FIX = "remove the key if transformers knows this model type by itself; tunesmith never runs code from a model"
FILE_KEY = re.compile(r"\w+_file")
# Classes that take tokenizer.json as it is. Others bring rules, files or programs of their own.
SAFE_TOKENIZER_CLASSES = re.compile(
    r"(PreTrained|Llama|Gemma|GPT2|GPTNeoX|Qwen2|Cohere|CodeLlama|Granite|HunYuan|HY)?Tokenizer(Fast)?"
    r"|TokenizersBackend|MistralCommon(Backend|Tokenizer)"
)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file; `begin` and `end` count from the first data byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_folder(folder: Path, *, needs_weights: bool = True) -> None:
    """Refuse a folder that could run code or read other files, holds only pickles, or whose weights
    are damaged. InputError. Without `weights` there need not be any."""
    check_files(folder)
    read_json(folder / "config.json")
    modules = "|".join(re.escape(path.stem) for path in folder.glob("*.py"))
    for path in sorted({*folder.glob("*config*.json"), *folder.glob("special_tokens_map.json")}):
        _check_code(path, re.compile(rf"(.*--)?({modules})\.(py|[A-Z]\w*)") if modules else None)
    if (folder / "custom_generate").exists():
        fix = "remove the folder custom_generate; tunesmith never runs code from a model"
        raise InputError(
            "it brings its own code for generate()", where=str(folder / "custom_generate"), fix=fix
        )
    if (folder / "adapter_config.json").exists():
        fix = "give model: the base model, and the adapter as adapter_from:"
        raise InputError("this folder is an adapter, not a model", where=str(folder), fix=fix)
    _check_tokenizer_class(folder)
    if needs_weights or has_weights(folder):
        read_headers(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError when it is missing, huge, not JSON or not an object."""
    if not path.is_file():
        fix = "give a folder as `save_pretrained` writes it, with config.json and *.safetensors"
        raise InputError(f"there is no {path.name}", where=str(path.parent), fix=fix)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"larger than {MAX_JSON_BYTES >> 20} MiB", where=str(path))
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not valid JSON ({error})", where=str(path), fix="download the file again"
        ) from error
    if not isinstance(content, dict):
        raise InputError("not a JSON object", where=str(path), fix="download the file again")
    return content


def has_weights(folder: Path) -> bool:
    """A weight file is there. An index alone comes with every download of the small files."""
    return (folder / WEIGHTS_FILE).is_file() or (
        (folder / INDEX_FILE).is_file() and any(folder.glob("*.safetensors"))
    )


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Tensor name -> where it lies, of the safetensors files that transformers would load.
    InputError if damaged."""
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise _make_missing_weights_error(folder)
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("it has no weight_map", where=str(folder / INDEX_FILE))
    headers: dict[str, dict[str, TensorHeader]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise InputError(
                f"{tensor} points to {name!r}, not to a file beside it",
                where=str(folder / INDEX_FILE),
            )
        if name not in headers:
            headers[name] = read_header(folder / name)
        if tensor not in headers[name]:
            raise InputError(
                f"{name} has no tensor {tensor}",
                where=str(folder / INDEX_FILE),
                fix="download it again",
            )
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensor name -> header of one safetensors file, checked against the size of the file."""
    if not path.is_file():
        raise InputError("the file is missing", where=str(path), fix="download the model again")
    content, data_bytes = _parse_header(path)
    tensors = {
        name: _parse_tensor(path, name, entry)
        for name, entry in content.items()
        if name != "__metadata__"
    }
    end, previous = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end > data_bytes:
            message = f"truncated: the tensor {name} ends at byte {tensor.end} of {data_bytes}"
            raise InputError(message, where=str(path), fix="download the file again")
        if tensor.begin != end:
            relation = "overlaps" if tensor.begin < end else "leaves a gap after"
            raise InputError(
                f"the tensor {name} {relation} {previous}",
                where=str(path),
                fix="download the file again",
            )
        end, previous = tensor.end, name
    if end != data_bytes:
        raise InputError(
            f"{data_bytes - end} bytes after the last tensor",
            where=str(path),
            fix="download the file again",
        )
    return tensors


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            message = (
                f"truncated or not safetensors: a header of {length} bytes in a file of {size}"
            )
            raise InputError(message, where=str(path), fix="download the file again")
        if length > MAX_HEADER_BYTES:
            message = (
                f"its header has {length:,} bytes; no model needs more than {MAX_HEADER_BYTES:,}"
            )
            raise InputError(message, where=str(path))
        raw = file.read(length)
    try:
        content = json.loads(raw, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        message = f"the safetensors header is not valid ({error})"
        raise InputError(message, where=str(path), fix="download the file again") from error
    if not isinstance(content, dict):
        raise InputError(
            "the safetensors header is not an object",
            where=str(path),
            fix="download the file again",
        )
    return content, size - 8 - length


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
    return unique


def _parse_tensor(path: Path, name: str, entry: Any) -> TensorHeader:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            _is_consistent(dtype, shape, begin, end)
        ):
            return TensorHeader(path, dtype, tuple(shape), begin, end)
    message = f"the tensor {name} has a header that contradicts itself: {json.dumps(entry)[:200]}"
    raise InputError(message, where=str(path), fix="download the file again")


def _is_consistent(dtype: str, shape: list[Any], begin: int, end: int) -> bool:
    has_valid_numbers = all(type(number) is int and number >= 0 for number in [*shape, begin, end])
    return (
        has_valid_numbers
        and dtype in DTYPE_BYTES
        and end - begin == prod(shape) * DTYPE_BYTES[dtype]
    )


def _make_missing_weights_error(folder: Path) -> InputError:
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        fix = (
            "convert it in a place that you trust: load the model there with transformers and call "
            "save_pretrained(folder), which writes safetensors"
        )
        message = f"only pickled weights ({pickles[0]}): loading a pickle can run any code, so tunesmith does not"
        return InputError(message, where=str(folder), fix=fix)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return InputError(
            "it holds a GGUF", where=str(folder), fix=f"give the file: {folder / ggufs[0]}"
        )
    return InputError(
        f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}",
        where=str(folder),
        fix="give a folder with safetensors",
    )


def _check_code(path: Path, reference: re.Pattern[str] | None) -> None:
    for key_path, key, value in _walk_json(read_json(path)):
        where = f"{path}:{key_path}"
        # transformers itself once wrote `_attn_implementation_autoset: true`: a plain yes or no
        # names no code.
        if CODE_KEY.fullmatch(key) and value is not None and not isinstance(value, bool):
            message = f"the key {key} makes transformers load other code ({str(value)[:80]})"
            raise InputError(message, where=where, fix=CODE_FIX)
        if key == "trust_remote_code" and value:
            raise InputError("the model asks for trust_remote_code", where=where, fix=CODE_FIX)
        if reference and isinstance(value, str) and reference.fullmatch(value):
            raise InputError(
                f"{value!r} refers to a Python file of the folder", where=where, fix=CODE_FIX
            )
        if FILE_KEY.fullmatch(key) and isinstance(value, str) and _is_outside(path.parent, value):
            fix = "remove the key; the files of a model lie in its folder"
            raise InputError(
                f"the key {key} names a file outside of the folder", where=where, fix=fix
            )


def _is_outside(folder: Path, value: str) -> bool:
    """Old tokenizers carry paths of the machine they were saved on: only one that is there could be
    read."""
    target = os.path.realpath(folder / value[:4096].replace("\0", ""))
    return os.path.exists(target) and not Path(target).is_relative_to(folder.resolve())


def _check_tokenizer_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    name = read_json(path).get("tokenizer_class") if path.is_file() else None
    if name is not None and not (isinstance(name, str) and SAFE_TOKENIZER_CLASSES.fullmatch(name)):
        fix = "if its tokenizer.json is complete, write PreTrainedTokenizerFast"
        raise InputError(
            f"tokenizer_class is {name!r:.80}, none that is known",
            where=f"{path}:tokenizer_class",
            fix=fix,
        )


def _walk_json(content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every (path, key, value) of nested JSON; the entries of a list have its key."""
    pending: list[tuple[str, str, Any]] = [("", "", content)]
    while pending:
        key_path, key, value = pending.pop()
        yield key_path, key, value
        if isinstance(value, dict):
            pending += [
                (f"{key_path}.{name}".lstrip("."), name, inner) for name, inner in value.items()
            ]
        elif isinstance(value, list):
            pending += [(f"{key_path}[{index}]", key, inner) for index, inner in enumerate(value)]
