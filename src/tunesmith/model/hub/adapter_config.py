"""An adapter folder, ours or PEFT's, judged from its configuration and its header before anything
is allocated.

In: the folder, or a run folder that holds one, and the folder of the base. Out: `AdapterFolder`.
Which layers are adapted is read from the weights themselves, so no pattern of a stranger is ever
evaluated; a key that would change what those weights compute is refused by its name. Left out: the
weights (saved.py), what the adapter belongs to (provenance.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import find_weights_dir
from tunesmith.model.hub.files import check_files
from tunesmith.model.hub.validate import TensorHeader, read_header, read_headers, read_json
from tunesmith.model.target_modules import list_linear_paths

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
MAX_RANK = 4096
DTYPES = ("F32", "F16", "BF16")
MAGNITUDE = "lora_magnitude_vector"
# the rows themselves, whatever PEFT's name says
TOKEN_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"
LORA_KEY = re.compile(re.escape(PREFIX) + rf"([\w.]+)\.(lora_A\.weight|lora_B\.weight|{MAGNITUDE})")
EMBEDDING_MODULES = ("embed_tokens", "lm_head")

# Keys that say nothing about the result, or that the weights answer better: which layers are
# adapted.
IGNORED_KEYS = {
    *(
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "qalora_group_size",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Keys that may say this and no more; of any other key the value must be empty.
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base
    "megatron_core": ("megatron.core", None),  # what PEFT always writes
}
USED_KEYS = {"r", "lora_alpha", "use_rslora", "use_dora", "trainable_token_indices"}


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA or DoRA adapter that fits its base. `targets` in the form of `lora_target_modules`;
    `sha256` is of the weights; `new_ids` are the tokens that it has rows for, one after the
    other."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | tuple[str, ...]
    base_name: str  # what the adapter calls its base
    sha256: str
    new_token_ids: tuple[int, ...] = ()

    @property
    def weights_path(self) -> Path:
        return self.path / ADAPTER_WEIGHTS_FILE

    @property
    def scaling(self) -> float:
        return compute_scaling(self.rank, self.alpha, use_rslora=self.use_rslora)


def compute_scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """What B A x is multiplied with."""
    return alpha / (rank**0.5 if use_rslora else rank)


def read_adapter(folder: Path, base: Path) -> AdapterFolder:
    """The adapter in folder `given`, or in its `adapter/` if it is a run folder. InputError unless
    it fits the base."""
    folder = find_weights_dir(folder)
    path = folder / "adapter" if (folder / "plan.json").is_file() else folder
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        fix = (
            f"finish it: tunesmith resume {folder}"
            if path != folder
            else f"give a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}"
        )
        raise InputError("there is no adapter here", where=str(path), fix=fix)
    check_files(path)
    config = read_json(path / ADAPTER_CONFIG_FILE)
    rank, alpha = _check_config(config, str(path / ADAPTER_CONFIG_FILE))
    if not (path / ADAPTER_WEIGHTS_FILE).is_file():
        raise _make_missing_weights_error(path)
    base_headers = read_headers(base)
    use_dora, headers = bool(config.get("use_dora")), read_header(path / ADAPTER_WEIGHTS_FILE)
    new_token_ids = _check_token_rows(
        headers, base_headers, config.get("trainable_token_indices"), path
    )
    headers = {
        name: tensor for name, tensor in headers.items() if not name.endswith(TOKEN_ROWS_SUFFIX)
    }
    paths = _check_weights(headers, base_headers, rank, path / ADAPTER_WEIGHTS_FILE)
    _check_complete(headers, paths, path / ADAPTER_WEIGHTS_FILE, use_dora=use_dora)
    return AdapterFolder(
        path=path,
        rank=rank,
        alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=use_dora,
        target_modules=_summarize_targets(paths, base_headers),
        base_name=str(config.get("base_model_name_or_path") or ""),
        sha256=hash_file(path / ADAPTER_WEIGHTS_FILE),
        new_token_ids=new_token_ids,
    )


def _check_config(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Rank and alpha. Raises InputError that names the key."""
    fix = (
        "only plain LoRA adapters, as PEFT's LoraConfig makes them by default, can be gone on with"
    )
    for key, allowed in ALLOWED_VALUES.items():
        if key in config and config[key] not in allowed:
            raise InputError(
                f"{key} is {config[key]!r:.80}, which is not supported", where=where, fix=fix
            )
    if not _is_transformers_mapping(config.get("auto_mapping")):
        raise InputError("auto_mapping names code outside of transformers", where=where, fix=fix)
    for key in sorted(
        config.keys() - IGNORED_KEYS - ALLOWED_VALUES.keys() - USED_KEYS - {"auto_mapping"}
    ):
        if config[key]:
            message = f"{key} is {config[key]!r:.80}: it changes what the adapter computes, and is not supported"
            raise InputError(message, where=where, fix=fix)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InputError(
            f"r is {rank!r:.80}, not a whole number from 1 to {MAX_RANK}", where=where, fix=fix
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise InputError(f"lora_alpha is {alpha!r:.80}, not a number above 0", where=where, fix=fix)
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), (bool, type(None))):
            raise InputError(
                f"{key} is {config[key]!r:.80}, not true or false", where=where, fix=fix
            )
    return rank, alpha


def _is_transformers_mapping(mapping: Any) -> bool:
    """PEFT writes the class of a model without a task here. It is not used; PEFT itself would
    import it."""
    if not mapping:
        return True
    return isinstance(mapping, dict) and str(mapping.get("parent_library")).startswith(
        "transformers.models."
    )


def _make_missing_weights_error(path: Path) -> InputError:
    if (path / ADAPTER_PICKLE_FILE).exists():
        fix = f"convert it in a place that you trust: load it there with PEFT and call save_pretrained, for {ADAPTER_WEIGHTS_FILE}"
        message = f"only pickled weights ({ADAPTER_PICKLE_FILE}): loading a pickle can run any code, so tunesmith does not"
        return InputError(message, where=str(path), fix=fix)
    return InputError(
        f"there is no {ADAPTER_WEIGHTS_FILE}", where=str(path), fix="copy the whole adapter folder"
    )


def _check_token_rows(
    adapter: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
    token_indices: Any,
    folder: Path,
) -> tuple[int, ...]:
    """The new tokens that it has rows for. In PEFT's config a list stands for the embedding
    alone."""
    by_matrix = (
        token_indices
        if isinstance(token_indices, dict)
        else {EMBEDDING_MODULES[0]: token_indices}
        if token_indices
        else {}
    )
    ids = next(iter(by_matrix.values()), ())
    if not _is_consecutive(ids) or set(by_matrix) - {*EMBEDDING_MODULES}:
        message = f"trainable_token_indices is {token_indices!r:.80}: not the numbers of new tokens, one after the other"
        raise InputError(
            message,
            where=str(folder / ADAPTER_CONFIG_FILE),
            fix="only rows of added tokens can be gone on with",
        )
    row_tensors = {
        name: tensor for name, tensor in adapter.items() if name.endswith(f".{TOKEN_ROWS_SUFFIX}")
    }
    rows_by_module = {
        name.removeprefix(PREFIX).removesuffix(f".{TOKEN_ROWS_SUFFIX}"): tensor
        for name, tensor in row_tensors.items()
    }
    if {path.rpartition(".")[2] for path in rows_by_module} != set(by_matrix) or any(
        token_ids != ids for token_ids in by_matrix.values()
    ):
        message = f"trainable_token_indices is {token_indices!r:.80}, and the weights have rows for {', '.join(rows_by_module) or 'none'}"
        raise InputError(
            message, where=str(folder / ADAPTER_CONFIG_FILE), fix="copy the adapter folder again"
        )
    for path, tensor in rows_by_module.items():
        matrix = _find_base_tensor(base, path)
        if (
            matrix is None
            or tensor.shape != (len(ids), *matrix.shape[1:])
            or tensor.dtype not in DTYPES
        ):
            message = f"its rows for {path} are {tensor.dtype} {list(tensor.shape)}, which does not fit the base"
            raise InputError(
                message,
                where=str(folder / ADAPTER_WEIGHTS_FILE),
                fix="give the adapter's own base as model:",
            )
    return tuple(ids)


def _is_consecutive(ids: Any) -> bool:
    if not isinstance(ids, (list, tuple)) or not all(
        type(index) is int and index >= 0 for index in ids
    ):
        return False
    return not ids or list(ids) == list(range(ids[0], ids[0] + len(ids)))


def _check_weights(
    adapter: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], rank: int, file: Path
) -> list[str]:
    """The adapted modules. Every tensor must have the shape that its layer in the base asks for."""
    paths: dict[str, None] = {}
    for name, tensor in adapter.items():
        match = LORA_KEY.fullmatch(name)
        if match is None:
            message = (
                f"the tensor {name[:200]} is no weight of a plain LoRA adapter on a linear layer"
            )
            raise InputError(
                message, where=str(file), fix="only adapters on linear layers are supported"
            )
        layer = _find_base_tensor(base, match[1])
        if layer is None or len(layer.shape) != 2 or match[1] == "lm_head":
            message = f"it adapts {match[1]}, which is no linear layer inside the base's decoder"
            raise InputError(message, where=str(file), fix="give the adapter's own base as model:")
        outputs, inputs = layer.shape
        expected_shape = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}.get(
            match[2], (outputs,)
        )
        if tensor.shape != expected_shape or tensor.dtype not in DTYPES:
            message = (
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}; with r {rank} on this base it must be "
                f"{list(expected_shape)}, in {', '.join(DTYPES)}"
            )
            raise InputError(message, where=str(file), fix="give the adapter's own base as model:")
        paths[match[1]] = None
    if not paths:
        raise InputError("it holds no weights", where=str(file))
    return list(paths)


def _check_complete(
    adapter: Mapping[str, TensorHeader], paths: list[str], file: Path, *, use_dora: bool
) -> None:
    """Each adapted module has both halves, and a magnitude where the config says DoRA, else
    none."""
    for path in paths:
        for part in ("lora_A.weight", "lora_B.weight", *([MAGNITUDE] if use_dora else [])):
            if f"{PREFIX}{path}.{part}" not in adapter:
                message = f"{path} has no {part.removesuffix('.weight')}{', which use_dora wants' * (part == MAGNITUDE)}"
                raise InputError(message, where=str(file), fix="copy the adapter folder again")
        if not use_dora and f"{PREFIX}{path}.{MAGNITUDE}" in adapter:
            message = f"{path} has a magnitude, but use_dora is not true in {ADAPTER_CONFIG_FILE}"
            raise InputError(message, where=str(file), fix="copy the adapter folder again")


def _find_base_tensor(base: Mapping[str, TensorHeader], path: str) -> TensorHeader | None:
    return base.get(f"{path}.weight") or base.get(f"{path.removeprefix('model.')}.weight")


def _summarize_targets(paths: list[str], base: Mapping[str, TensorHeader]) -> str | tuple[str, ...]:
    """The shortest of: all-linear, names such as q_proj, full paths."""
    linear_modules = list_linear_paths(base)
    names = {path.rpartition(".")[2] for path in paths}
    if len([path for path in linear_modules if path.rpartition(".")[2] in names]) > len(paths):
        return tuple(sorted(paths))
    return (
        "all-linear"
        if names == {path.rpartition(".")[2] for path in linear_modules}
        else tuple(sorted(names))
    )
