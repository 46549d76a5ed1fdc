"""Check an adapter folder, ours or PEFT's, by its configuration and its header before anything is
allocated.

In: the folder, or a run folder that holds one, and the folder of the base. Out: `AdapterFolder`.
The adapted layers are read from the weights, so an untrusted pattern is never evaluated; a key that
would change what those weights compute is refused by name. Left out: the weights (save.py), the
match with the base model (session/provenance.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import find_weights_dir
from tunesmith.model.hub.validate import (
    TensorHeader,
    check_files,
    read_header,
    read_headers,
    read_model_json,
)
from tunesmith.model.target_modules import list_linear_paths

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
MAX_RANK = 4096
DTYPES = ("F32", "F16", "BF16")
MAGNITUDE = "lora_magnitude_vector"
# the rows themselves, despite PEFT's name
TOKEN_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"
LORA_KEY = re.compile(re.escape(PREFIX) + rf"([\w.]+)\.(lora_A\.weight|lora_B\.weight|{MAGNITUDE})")
EMBEDDING_MODULES = ("embed_tokens", "lm_head")

# Keys that do not change the result, or that the weights answer better: which layers are adapted.
# fmt: off
IGNORED_KEYS = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
    "qalora_group_size", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}
# fmt: on
# The supported values of these keys. Any other key must be empty.
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base
    "megatron_core": ("megatron.core", None),  # PEFT always writes it
}
USED_KEYS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "trainable_token_indices",
    "auto_mapping",
}
UNSUPPORTED_FIX = "use a plain LoRA adapter, made with the defaults of PEFT's LoraConfig"
COPY_FIX = "copy the adapter folder again"
BASE_FIX = "set model: to the adapter's base model"


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA or DoRA adapter that fits its base. `target_modules` has the form of
    `lora_target_modules`, `sha256` is the hash of the weights, `new_token_ids` are the consecutive
    tokens that it has rows for."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | tuple[str, ...]
    base_name: str  # as written in the adapter's config
    sha256: str
    new_token_ids: tuple[int, ...] = ()

    @property
    def weights_path(self) -> Path:
        return self.path / ADAPTER_WEIGHTS_FILE

    @property
    def scaling(self) -> float:
        return compute_scaling(self.rank, self.alpha, use_rslora=self.use_rslora)


def compute_scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Return the factor of B A x: alpha / r, with rsLoRA alpha / sqrt(r)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def read_adapter(folder: Path, base: Path) -> AdapterFolder:
    """Read the adapter in `folder`, or in its `adapter/` if it is a run folder. Raise InputError
    unless it fits the base."""
    folder = find_weights_dir(folder)
    path = folder / "adapter" if (folder / "plan.json").is_file() else folder
    config_file = path / ADAPTER_CONFIG_FILE
    weights_file = path / ADAPTER_WEIGHTS_FILE
    if not config_file.is_file():
        fix = f"give a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}"
        if path != folder:
            fix = f"finish the run: tunesmith resume {folder}"
        raise InputError("there is no adapter in this folder", where=str(path), fix=fix)
    check_files(path)
    config = read_model_json(config_file)
    rank, alpha = _check_config(config, str(config_file))
    if not weights_file.is_file():
        raise _make_missing_weights_error(path)
    base_headers = read_headers(base)
    use_dora = bool(config.get("use_dora"))
    row_headers: dict[str, TensorHeader] = {}
    lora_headers: dict[str, TensorHeader] = {}
    for name, header in read_header(weights_file).items():
        if name.endswith(TOKEN_ROWS_SUFFIX):
            row_headers[name] = header
        else:
            lora_headers[name] = header
    new_token_ids = _check_token_rows(
        row_headers, base_headers, config.get("trainable_token_indices"), path
    )
    paths = _check_weights(lora_headers, base_headers, rank, weights_file)
    _check_complete(lora_headers, paths, weights_file, use_dora=use_dora)
    return AdapterFolder(
        path=path,
        rank=rank,
        alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=use_dora,
        target_modules=_summarize_targets(paths, base_headers),
        base_name=str(config.get("base_model_name_or_path") or ""),
        sha256=hash_file(weights_file),
        new_token_ids=new_token_ids,
    )


def _check_config(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Return rank and alpha. Raise InputError naming an unsupported key."""
    for key, allowed in ALLOWED_VALUES.items():
        if key in config and config[key] not in allowed:
            raise _make_config_error(f"{key} is {config[key]!r:.80}, which is not supported", where)
    if not _is_transformers_mapping(config.get("auto_mapping")):
        raise _make_config_error("auto_mapping names code outside of transformers", where)
    for key in sorted(config.keys() - IGNORED_KEYS - ALLOWED_VALUES.keys() - USED_KEYS):
        if config[key]:
            message = (
                f"{key} is {config[key]!r:.80}, which changes the adapter and is not supported"
            )
            raise _make_config_error(message, where)
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise _make_config_error(f"r is {rank!r:.80}, not an integer from 1 to {MAX_RANK}", where)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise _make_config_error(f"lora_alpha is {alpha!r:.80}, not a positive number", where)
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), (bool, type(None))):
            raise _make_config_error(f"{key} is {config[key]!r:.80}, not true or false", where)
    return rank, alpha


def _make_config_error(message: str, where: str) -> InputError:
    return InputError(message, where=where, fix=UNSUPPORTED_FIX)


def _is_transformers_mapping(mapping: Any) -> bool:
    """Return whether `auto_mapping` is empty or names transformers. PEFT writes the class of a
    model without a task there, and would import it; tunesmith ignores it."""
    if not mapping:
        return True
    if not isinstance(mapping, dict):
        return False
    return str(mapping.get("parent_library")).startswith("transformers.models.")


def _make_missing_weights_error(path: Path) -> InputError:
    if (path / ADAPTER_PICKLE_FILE).exists():
        message = (
            f"only pickled weights ({ADAPTER_PICKLE_FILE}): "
            "loading a pickle can run arbitrary code, so tunesmith does not"
        )
        fix = (
            "convert it in an environment that you trust: load it there with PEFT "
            f"and call save_pretrained, which writes {ADAPTER_WEIGHTS_FILE}"
        )
        return InputError(message, where=str(path), fix=fix)
    message = f"there is no {ADAPTER_WEIGHTS_FILE}"
    return InputError(message, where=str(path), fix=COPY_FIX)


def _check_token_rows(
    row_headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
    token_indices: Any,
    folder: Path,
) -> tuple[int, ...]:
    """Return the new tokens that the adapter has rows for. In PEFT's config a list means the
    embedding alone."""
    where = str(folder / ADAPTER_CONFIG_FILE)
    ids_by_module = token_indices or {}
    if not isinstance(ids_by_module, dict):
        ids_by_module = {EMBEDDING_MODULES[0]: token_indices}
    ids = next(iter(ids_by_module.values()), ())
    if not _is_consecutive(ids) or set(ids_by_module) - {*EMBEDDING_MODULES}:
        message = f"trainable_token_indices is {token_indices!r:.80}, not consecutive token ids"
        raise InputError(message, where=where, fix="use an adapter whose new tokens were appended")
    tensors_by_path: dict[str, TensorHeader] = {}
    for name, tensor in row_headers.items():
        path = name.removeprefix(PREFIX).removesuffix(f".{TOKEN_ROWS_SUFFIX}")
        tensors_by_path[path] = tensor
    modules = {path.rpartition(".")[2] for path in tensors_by_path}
    is_same_for_all = all(module_ids == ids for module_ids in ids_by_module.values())
    if modules != set(ids_by_module) or not is_same_for_all:
        message = (
            f"trainable_token_indices is {token_indices!r:.80}, "
            f"but the weights have rows for {', '.join(tensors_by_path) or 'no module'}"
        )
        raise InputError(message, where=where, fix=COPY_FIX)
    for path, tensor in tensors_by_path.items():
        matrix = _find_base_tensor(base, path)
        is_match = matrix is not None and tensor.shape == (len(ids), *matrix.shape[1:])
        if not is_match or tensor.dtype not in DTYPES:
            message = (
                f"the rows for {path} are {tensor.dtype} {list(tensor.shape)}, "
                "which does not fit the base model"
            )
            raise InputError(message, where=str(folder / ADAPTER_WEIGHTS_FILE), fix=BASE_FIX)
    return tuple(ids)


def _is_consecutive(ids: Any) -> bool:
    if not isinstance(ids, (list, tuple)):
        return False
    if not all(type(index) is int and index >= 0 for index in ids):
        return False
    return not ids or list(ids) == list(range(ids[0], ids[0] + len(ids)))


def _check_weights(
    adapter: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], rank: int, file: Path
) -> list[str]:
    """Return the adapted modules. Every tensor must have the shape that its layer in the base
    requires."""
    paths: dict[str, None] = {}
    for name, tensor in adapter.items():
        match = LORA_KEY.fullmatch(name)
        if match is None:
            message = f"the tensor {name[:200]} is not part of a plain LoRA adapter"
            fix = "use an adapter on linear layers only"
            raise InputError(message, where=str(file), fix=fix)
        path, part = match.groups()
        layer = _find_base_tensor(base, path)
        if layer is None or len(layer.shape) != 2 or path == "lm_head":
            message = f"the adapter has {path}, which is not a linear layer of the base's decoder"
            raise InputError(message, where=str(file), fix=BASE_FIX)
        outputs, inputs = layer.shape
        shapes = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
        expected_shape = shapes.get(part, (outputs,))
        if tensor.shape != expected_shape or tensor.dtype not in DTYPES:
            message = (
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}; with r {rank} on this "
                f"base it must be {list(expected_shape)} in {', '.join(DTYPES)}"
            )
            raise InputError(message, where=str(file), fix=BASE_FIX)
        paths[path] = None
    if not paths:
        raise InputError("the adapter holds no weights", where=str(file), fix=COPY_FIX)
    return list(paths)


def _check_complete(
    adapter: Mapping[str, TensorHeader], paths: list[str], file: Path, *, use_dora: bool
) -> None:
    """Check that each module has both halves, and a magnitude exactly if the config says DoRA."""
    for path in paths:
        for part in ("lora_A", "lora_B"):
            if f"{PREFIX}{path}.{part}.weight" not in adapter:
                raise InputError(f"{path} has no {part}", where=str(file), fix=COPY_FIX)
        has_magnitude = f"{PREFIX}{path}.{MAGNITUDE}" in adapter
        if use_dora and not has_magnitude:
            message = f"{path} has no {MAGNITUDE}, which use_dora requires"
            raise InputError(message, where=str(file), fix=COPY_FIX)
        if has_magnitude and not use_dora:
            message = f"{path} has a magnitude, but use_dora is not true in {ADAPTER_CONFIG_FILE}"
            raise InputError(message, where=str(file), fix=COPY_FIX)


def _find_base_tensor(base: Mapping[str, TensorHeader], path: str) -> TensorHeader | None:
    return base.get(f"{path}.weight") or base.get(f"{path.removeprefix('model.')}.weight")


def _summarize_targets(paths: list[str], base: Mapping[str, TensorHeader]) -> str | tuple[str, ...]:
    """Return the shortest form: all-linear, names such as q_proj, or full paths."""
    names = {path.rpartition(".")[2] for path in paths}
    base_names = [path.rpartition(".")[2] for path in list_linear_paths(base)]
    if sum(name in names for name in base_names) > len(paths):
        return tuple(sorted(paths))
    return "all-linear" if names == set(base_names) else tuple(sorted(names))
