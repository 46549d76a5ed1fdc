"""Check an adapter folder, ours or PEFT's, by its configuration and its header before anything is
allocated.

In: the folder, or a run folder that holds one, and the folder of the base. Out: `AdapterFolder`.
The adapted layers are read from the weights; the patterns of the config, which are untrusted, run
in a process with a time limit. A key that would change what the weights compute, and that is not
supported, is refused by name. Left out: the weights (save.py), the match with the base model
(session/provenance.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import find_weights_dir
from tunesmith.model.hub.adapter_names import PREFIX, name_in_text_class, rename_tensors
from tunesmith.model.hub.expert_names import (
    INNER,
    is_expert_path,
    list_expert_modules,
    list_stack_names,
)
from tunesmith.model.hub.families import get_tensor_prefix
from tunesmith.model.hub.stored_tensors import has_equal_values, read_parameter_headers
from tunesmith.model.hub.validate import TensorHeader, check_files, read_header, read_model_json
from tunesmith.model.target_modules import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    ROUTER,
    SAVED_MODULES_KEY,
    find_embedding,
    find_part,
    is_transposed_linear,
    list_linear_paths,
    list_parameter_names,
    match_patterns,
    match_saved_parameters,
)

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"
MAX_RANK = 4096
DTYPES = ("F32", "F16", "BF16")
MAGNITUDE = "lora_magnitude_vector"
# the rows themselves, despite PEFT's name
TOKEN_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"
LORA_KEY = re.compile(re.escape(PREFIX) + rf"([\w.]+)\.(lora_A\.weight|lora_B\.weight|{MAGNITUDE})")
EMBEDDING_MODULES = (EMBEDDING, HEAD)
RANK_PATTERN = "rank_pattern"
ALPHA_PATTERN = "alpha_pattern"
MAX_PATTERNS = 10_000

# Keys that do not change the result, or that the weights answer better: which layers are adapted.
# fmt: off
IGNORED_KEYS = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
    "qalora_group_size", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "target_parameters",
    "fan_in_fan_out",  # PEFT sets it as the base's linears require
    "ensure_weight_tying",  # of the weights of modules_to_save, which are compared
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
    RANK_PATTERN,
    ALPHA_PATTERN,
    SAVED_MODULES_KEY,
}
UNSUPPORTED_FIX = "use a plain LoRA adapter, made with the defaults of PEFT's LoraConfig"
COPY_FIX = "copy the adapter folder again"
MERGE_FIX = "merge it with PEFT's merge_and_unload, save the model, and set model: to its folder"
BASE_FIX = "set model: to the adapter's base model"


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA or DoRA adapter that fits its base. `target_modules` has the form of
    `lora_target_modules`, `sha256` is the hash of the weights, `new_token_ids` are the consecutive
    tokens that it has rows for. `rank_pattern` and `alpha_pattern` are path -> value of the layers
    that differ; `saved_parameters` were trained in full."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | tuple[str, ...]
    base_name: str  # as written in the adapter's config
    sha256: str
    new_token_ids: tuple[int, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    saved_parameters: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()  # their modules, in the form of `modules_to_save`

    @property
    def weights_path(self) -> Path:
        return self.path / ADAPTER_WEIGHTS_FILE

    def compute_scaling(self, path: str) -> float:
        """Return the factor of B A x of a layer."""
        rank = self.rank_pattern.get(path, self.rank)
        alpha = self.alpha_pattern.get(path, self.alpha)
        return compute_scaling(rank, alpha, use_rslora=self.use_rslora)


def compute_scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Return the factor of B A x: alpha / r, with rsLoRA alpha / sqrt(r)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def read_adapter(
    folder: Path,
    base: Path,
    *,
    weights_sha256: str = "",
    base_headers: Mapping[str, TensorHeader] | None = None,
) -> AdapterFolder:
    """Read the adapter in `folder`, or in its `adapter/` if it is a run folder.

    weights_sha256: the recorded hash of the weights, for a caller that compares it when it loads
    them; their bytes are not read then. base_headers: those of `base`, if they were read already.
    Raise InputError unless the adapter fits the base."""
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
    if base_headers is None:
        base_headers = read_parameter_headers(base)
    base_config = read_model_json(base / "config.json")
    use_dora = bool(config.get("use_dora"))
    stored_headers = read_header(weights_file)
    named_headers = rename_tensors(stored_headers, get_tensor_prefix(base_config), weights_file)
    headers = _split_headers(named_headers, config, base_headers, weights_file)
    new_token_ids = _check_token_rows(
        headers.rows, base_headers, config.get("trainable_token_indices"), path
    )
    saved_parameters = _check_modules(
        headers.modules, config, base_headers, base_config, weights_file
    )
    # the patterns are those of PEFT, for the names in the file
    layers = _list_lora_paths(stored_headers)
    ranks = _read_pattern(config, RANK_PATTERN, layers, str(config_file))
    alphas = _read_pattern(config, ALPHA_PATTERN, layers, str(config_file))
    paths = _check_weights(headers.loras, base_headers, rank, ranks, weights_file)
    _check_complete(headers.loras, paths, weights_file, use_dora=use_dora)
    return AdapterFolder(
        path=path,
        rank=rank,
        alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=use_dora,
        target_modules=_summarize_targets(paths, base_headers, headers.modules),
        base_name=str(config.get("base_model_name_or_path") or ""),
        sha256=weights_sha256 or hash_file(weights_file),
        new_token_ids=new_token_ids,
        rank_pattern={path: int(ranks[path]) for path in paths if ranks.get(path, rank) != rank},
        alpha_pattern={path: alphas[path] for path in paths if alphas.get(path, alpha) != alpha},
        saved_parameters=saved_parameters,
        saved_modules=_summarize_modules(saved_parameters, base_headers),
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
    if not _is_rank(rank):
        raise _make_config_error(f"r is {rank!r:.80}, not an integer from 1 to {MAX_RANK}", where)
    if not _is_alpha(alpha):
        raise _make_config_error(f"lora_alpha is {alpha!r:.80}, not a positive number", where)
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), (bool, type(None))):
            raise _make_config_error(f"{key} is {config[key]!r:.80}, not true or false", where)
    return cast("int", rank), cast("float", alpha)


def _is_alpha(alpha: Any) -> bool:
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    return is_number and 0 < alpha < 1e6


def _is_rank(rank: Any) -> bool:
    return type(rank) is int and 1 <= rank <= MAX_RANK


PATTERN_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    RANK_PATTERN: (_is_rank, f"an integer from 1 to {MAX_RANK}"),
    ALPHA_PATTERN: (_is_alpha, "a positive number"),
}


def _read_pattern(
    config: Mapping[str, Any], key: str, paths: Sequence[str], where: str
) -> dict[str, Any]:
    """Return path -> value of the first pattern that matches the end of the path, as in PEFT. Of
    layers in `target_parameters` it is the path of the weight."""
    patterns = config.get(key) or {}
    is_valid, description = PATTERN_VALUES[key]
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        message = f"{key} is {patterns!r:.80}, not a mapping of layers to values"
        raise _make_config_error(message, where)
    for name, value in patterns.items():
        if not is_valid(value):
            message = f"{key} has {value!r:.80} for {name:.80}, not {description}"
            raise _make_config_error(message, where)
    if not patterns:
        return {}
    names = list(patterns)
    match_patterns([], names, where=f"{key} in {where}")  # refuses one that is invalid by itself
    suffixes = [rf"(.*\.)?({name})" for name in names]
    targets = {_name_target(path, config): path for path in paths}
    matches = match_patterns(list(targets), suffixes, where=f"{key} in {where}")
    return {name_in_text_class(targets[name]): patterns[names[i]] for name, i in matches.items()}


def _name_target(path: str, config: Mapping[str, Any]) -> str:
    """Return the name of an adapted layer in PEFT's patterns."""
    weight = f"{path}.weight"
    parameters = config.get("target_parameters")
    names = parameters if isinstance(parameters, list) else []
    is_parameter = any(f".{weight}".endswith(f".{name}") for name in names if name)
    return weight if is_parameter else path


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


@dataclass(frozen=True)
class _AdapterHeaders:
    """The tensors of an adapter by name: of linears, of rows of tokens, and of whole modules, whose
    names have no prefix."""

    loras: Mapping[str, TensorHeader]
    rows: Mapping[str, TensorHeader]
    modules: Mapping[str, TensorHeader]


def _split_headers(
    headers: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    base: Mapping[str, TensorHeader],
    file: Path,
) -> _AdapterHeaders:
    """Sort the tensors. Raises InputError for one that belongs to no layer or module."""
    modules = _read_saved_names(config, str(file.parent / ADAPTER_CONFIG_FILE))
    loras: dict[str, TensorHeader] = {}
    rows: dict[str, TensorHeader] = {}
    saved: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        path = name.removeprefix(PREFIX)
        if name.endswith(TOKEN_ROWS_SUFFIX):
            rows[name] = header
        elif LORA_KEY.fullmatch(name):
            loras[name] = header
        elif name.startswith(PREFIX) and match_saved_parameters([path], modules):
            saved[path] = header
        else:
            raise _make_tensor_error(name, path, base, file)
    return _AdapterHeaders(loras, rows, saved)


def _read_saved_names(config: Mapping[str, Any], where: str) -> list[str]:
    names = config.get(SAVED_MODULES_KEY) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        message = f"{SAVED_MODULES_KEY} is {names!r:.80}, not a list of module names"
        raise _make_config_error(message, where)
    return [name_in_text_class(name) for name in names]


def _make_tensor_error(
    name: str, path: str, base: Mapping[str, TensorHeader], file: Path
) -> InputError:
    message = f"the tensor {name[:200]} is not part of a LoRA adapter"
    fix = "use an adapter on linear layers"
    if path in list_parameter_names(base) or path == f"{HEAD}.weight":
        message = (
            f"the tensor {name[:200]} replaces weights of the base model, but {SAVED_MODULES_KEY} "
            f"in {ADAPTER_CONFIG_FILE} does not name it"
        )
        fix = "save it again with save_pretrained(..., save_embedding_layers=False), or merge it"
    return InputError(message, where=str(file), fix=fix)


def _check_modules(
    saved: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    base: Mapping[str, TensorHeader],
    base_config: dict[str, Any],
    file: Path,
) -> tuple[str, ...]:
    """Return the parameters that were trained in full. Each must have the shape of the base's, and
    none may be missing."""
    modules = _read_saved_names(config, str(file.parent / ADAPTER_CONFIG_FILE))
    if not modules:
        return ()
    parameters = dict(zip(list_parameter_names(base), base.values(), strict=True))
    embedding_name = find_embedding([*parameters])
    head = parameters.get(f"{HEAD}.weight")
    is_tied = head is None
    if head is not None and base_config.get("tie_word_embeddings") is not False:
        is_tied = has_equal_values(head, parameters[embedding_name])
    if is_tied:
        parameters[f"{HEAD}.weight"] = parameters[embedding_name]
    for name in match_saved_parameters(list(parameters), modules):
        if name not in saved:
            message = f"{SAVED_MODULES_KEY} names {name}, which the weights lack"
            where = str(file.parent / ADAPTER_CONFIG_FILE)
            raise InputError(message, where=where, fix=COPY_FIX)
    _refuse_untrainable(saved, file)
    for name, tensor in saved.items():
        expected = parameters.get(name)
        if expected is None or tensor.shape != expected.shape or tensor.dtype not in DTYPES:
            shape = "no such tensor" if expected is None else f"{list(expected.shape)}"
            message = (
                f"{name} of {SAVED_MODULES_KEY} is {tensor.dtype} {list(tensor.shape)}, but the "
                f"base model has {shape}"
            )
            raise InputError(message, where=str(file), fix=BASE_FIX)
    if is_tied:
        _refuse_untied(saved, embedding_name, file)
    return tuple(name for name in saved if not (is_tied and name == f"{HEAD}.weight"))


def _refuse_untrainable(saved: Iterable[str], file: Path) -> None:
    """Raise InputError for a bias of the head, and for a linear that is stored transposed."""
    for name in saved:
        if name == f"{HEAD}.bias" or is_transposed_linear(name):
            message = f"{SAVED_MODULES_KEY} has {name}, which cannot be trained here"
            raise InputError(message, where=str(file), fix=MERGE_FIX)


def _refuse_untied(saved: Mapping[str, TensorHeader], embedding_name: str, file: Path) -> None:
    """Raise InputError if an adapter of a model with a tied head has another head than embedding:
    PEFT trains a copy of each module that it saves."""
    names = {embedding_name, f"{HEAD}.weight"} & saved.keys()
    if not names:
        return
    if len(names) == 2 and _read_bytes(saved[embedding_name]) == _read_bytes(
        saved[f"{HEAD}.weight"]
    ):
        return
    message = (
        f"the base model's {HEAD} and {EMBEDDING} are one matrix, but this adapter has a different "
        f"one for {' and '.join(sorted(names))}"
    )
    fix = (
        "merge it with PEFT's merge_and_unload and save the model with "
        "tie_word_embeddings=False, or train it with ensure_weight_tying=True"
    )
    raise InputError(message, where=str(file), fix=fix)


def _read_bytes(header: TensorHeader) -> bytes:
    with header.file.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(data_start + header.begin)
        return file.read(header.end - header.begin)


def _list_lora_paths(headers: Mapping[str, TensorHeader]) -> list[str]:
    paths: dict[str, None] = {}
    for name in headers:
        if match := LORA_KEY.fullmatch(name):
            paths[match.group(1)] = None
    return list(paths)


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
        raise InputError(message, where=where, fix=MERGE_FIX)
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
    adapter: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
    default_rank: int,
    ranks: Mapping[str, int],
    file: Path,
) -> list[str]:
    """Return the adapted modules. Every tensor must have the shape that its layer in the base
    requires."""
    paths: dict[str, None] = {}
    for name, tensor in adapter.items():
        match = LORA_KEY.fullmatch(name)
        assert match is not None
        path, part = match.groups()
        rank = ranks.get(path, default_rank)
        shapes = _find_shapes(base, path, rank)
        if shapes is None or part not in shapes:
            message = f"the adapter has {path}, which is not a linear layer of the base's decoder"
            raise InputError(message, where=str(file), fix=BASE_FIX)
        if find_part(path) == ROUTER:
            message = f"the adapter changes the router {path}, which stays frozen here"
            raise InputError(message, where=str(file), fix=MERGE_FIX)
        expected_shape = shapes[part]
        if tensor.shape != expected_shape or tensor.dtype not in DTYPES:
            message = (
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}; with r {rank} on this "
                f"base it must be {list(expected_shape)} in {', '.join(DTYPES)}"
            )
            fix = BASE_FIX if tensor.shape != expected_shape else "save it in one of these dtypes"
            raise InputError(message, where=str(file), fix=fix)
        paths[path] = None
    if not paths:
        raise InputError("the adapter holds no weights", where=str(file), fix=COPY_FIX)
    return list(paths)


def _find_shapes(
    base: Mapping[str, TensorHeader], path: str, rank: int
) -> dict[str, tuple[int, ...]] | None:
    """Return part -> shape of an adapter of a linear, or of a stack of experts at PEFT's path."""
    if is_expert_path(path):
        stacks = [base[name] for name in list_stack_names(path) if name in base]
        if not stacks or len(stacks[0].shape) != 3:
            return None
        num_experts, outputs, inputs = stacks[0].shape
        bias = base.get(f"{list_stack_names(path)[0]}_bias")
        if bias is not None and bias.shape[1] != outputs:  # gpt-oss stores [E, I, O]
            outputs, inputs = inputs, outputs
        ranks = num_experts * rank
        return {"lora_A.weight": (ranks, inputs), "lora_B.weight": (outputs, ranks)}
    layer = _find_base_tensor(base, path)
    if layer is None or len(layer.shape) != 2 or path == HEAD:
        return None
    outputs, inputs = layer.shape
    return {
        "lora_A.weight": (rank, inputs),
        "lora_B.weight": (outputs, rank),
        MAGNITUDE: (outputs,),
    }


def _check_complete(
    adapter: Mapping[str, TensorHeader], paths: list[str], file: Path, *, use_dora: bool
) -> None:
    """Check that each module has both halves, and a magnitude exactly if the config says DoRA; and
    that both stacks of experts have an adapter, or none."""
    for path in paths:
        if is_expert_path(path):
            module = path.removesuffix(f".{INNER}")
            if not {module, f"{module}.{INNER}"} <= set(paths):
                message = f"{module} has an adapter of one of its two stacks"
                raise InputError(message, where=str(file), fix=MERGE_FIX)
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


def _summarize_modules(saved: Sequence[str], base: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """Return the shortest form: names such as norm, or full paths where others end in the name."""
    parameters = list_parameter_names(base)
    modules: set[str] = set()
    for parameter in saved:
        path = parameter.rpartition(".")[0]
        name = path.rpartition(".")[2]
        is_unique = set(match_saved_parameters(parameters, [name])) <= set(saved)
        modules.add(name if is_unique else path)
    return tuple(sorted(modules))


def _summarize_targets(
    paths: list[str], base: Mapping[str, TensorHeader], modules: Mapping[str, TensorHeader]
) -> str | tuple[str, ...]:
    """Return the shortest form: all-linear, names such as q_proj, or full paths. Linears that are
    trained in full have no adapter."""
    paths = list_expert_modules(paths)
    names = {path.rpartition(".")[2] for path in paths}
    base_names: list[str] = []
    for path in list_linear_paths(base):
        is_saved = f"{path}.weight" in modules or f"model.{path}.weight" in modules
        is_omitted = find_part(path) == EXPERTS and EXPERTS not in names
        base_names += [] if is_saved or is_omitted else [path.rpartition(".")[2]]
    if sum(name in names for name in base_names) > len(paths):
        return tuple(sorted(paths))
    is_all_linear = names == set(base_names) and EXPERTS not in names
    return "all-linear" if is_all_linear else tuple(sorted(names))
