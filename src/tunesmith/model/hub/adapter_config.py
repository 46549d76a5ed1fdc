"""Check an adapter folder, ours or PEFT's, by its configuration and its header before anything is
allocated.

In: the folder, or a run folder that holds one, and the folder of the base. Out: `AdapterFolder`.
The adapted layers are read from the weights; the patterns of the config, which are untrusted, run
in a process with a time limit. A key that would change what the weights compute, and that is not
supported, is refused by name. Left out: the weights (save.py), the match with the base model
(session/provenance.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import find_weights_dir
from tunesmith.model.hub.expert_names import (
    INNER,
    is_expert_path,
    list_expert_modules,
    list_stack_names,
)
from tunesmith.model.hub.families import get_tensor_prefix
from tunesmith.model.hub.stored_tensors import (
    PREFIXES,
    has_equal_values,
    read_parameter_headers,
)
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

T = TypeVar("T")

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"
MAX_RANK = 4096
DTYPES = ("F32", "F16", "BF16")
PREFIX = "base_model.model."  # of all names that PEFT writes
TEXT_CLASS_PREFIX = "model."
# what an adapter of the text class may change
TEXT_MODULES = (
    "model.layers.",
    "model.embed_tokens",
    "model.norm.",
    "model.per_layer_",
    "lm_head.",
)
MAGNITUDE = "lora_magnitude_vector"
# the rows themselves, despite PEFT's name
TOKEN_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"
LORA_KEY = re.compile(re.escape(PREFIX) + rf"([\w.]+)\.(lora_A\.weight|lora_B\.weight|{MAGNITUDE})")
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
SAVE_FIX = "save it again with save_pretrained(..., save_embedding_layers=False), or merge it"
BASE_FIX = "set model: to the adapter's base model"
TEXT_FIX = "use an adapter of the text part alone, or merge this one with PEFT and train the result"
MODEL_FIX = "set model: to the multimodal checkpoint that the adapter was trained on"


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
    folder: Path, base: Path, *, base_headers: Mapping[str, TensorHeader] | None = None
) -> AdapterFolder:
    """Read the adapter in `folder`, or in its `adapter/` if it is a run folder.

    base_headers: those of `base`, if they were read already. Raise InputError unless the adapter
    fits the base."""
    path = _find_adapter(folder)
    config_file = path / ADAPTER_CONFIG_FILE
    weights_file = path / ADAPTER_WEIGHTS_FILE
    config = read_model_json(config_file)
    rank, alpha = _check_config(config, str(config_file))
    if not weights_file.is_file():
        raise _make_missing_weights_error(path)
    if base_headers is None:
        base_headers = read_parameter_headers(base)
    parameters = dict(zip(list_parameter_names(base_headers), base_headers.values(), strict=True))
    base_config = read_model_json(base / "config.json")
    stored = read_header(weights_file)
    tensors = rename_tensors(stored, get_tensor_prefix(base_config), weights_file)
    # the patterns are those of PEFT, for the names in the file
    layers = _list_lora_paths(stored)
    ranks = _read_pattern(config, RANK_PATTERN, layers, str(config_file))
    alphas = _read_pattern(config, ALPHA_PATTERN, layers, str(config_file))
    paths = _list_lora_paths(tensors)
    use_dora = bool(config.get("use_dora"))
    new_token_ids, row_shapes = _read_token_rows(config, parameters, str(config_file))
    saved = _read_modules(config, parameters, base_config, tensors, weights_file)
    expected = {**saved.shapes, **row_shapes}
    for layer in paths:
        for stack, (num_experts, outputs, inputs) in _find_stacks(parameters, layer, weights_file):
            sum_ranks = num_experts * ranks.get(stack, rank)
            expected[f"{PREFIX}{stack}.lora_A.weight"] = (sum_ranks, inputs)
            expected[f"{PREFIX}{stack}.lora_B.weight"] = (outputs, sum_ranks)
            if use_dora:
                expected[f"{PREFIX}{stack}.{MAGNITUDE}"] = (outputs,)
    _compare_tensors(tensors, expected, weights_file)
    if not paths:
        raise InputError("the adapter holds no weights", where=str(weights_file), fix=COPY_FIX)
    return AdapterFolder(
        path=path,
        rank=rank,
        alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=use_dora,
        target_modules=_summarize_targets(paths, parameters, saved.shapes),
        base_name=str(config.get("base_model_name_or_path") or ""),
        sha256=hash_file(weights_file),
        new_token_ids=new_token_ids,
        rank_pattern={path: int(ranks[path]) for path in paths if ranks.get(path, rank) != rank},
        alpha_pattern={path: alphas[path] for path in paths if alphas.get(path, alpha) != alpha},
        saved_parameters=saved.trained,
        saved_modules=_summarize_modules(saved.trained, parameters),
    )


def _find_adapter(folder: Path) -> Path:
    """Return the folder of the adapter. Raise InputError if there is none, or for unsafe files."""
    folder = find_weights_dir(folder)
    path = folder / "adapter" if (folder / "plan.json").is_file() else folder
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        fix = f"give a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}"
        if path != folder:
            fix = f"finish the run: tunesmith resume {folder}"
        raise InputError("there is no adapter in this folder", where=str(path), fix=fix)
    check_files(path)
    return path


# ---------------------------------------------------------------- names


def name_on_checkpoint(path: str, tensor_prefix: str) -> str:
    """Return a path of the text class on the whole model; the same without a prefix, and for the
    head, which both have in one place."""
    if not tensor_prefix or not path.startswith(TEXT_CLASS_PREFIX):
        return path
    return tensor_prefix + path.removeprefix(TEXT_CLASS_PREFIX)


def name_in_text_class(path: str) -> str:
    """Return a path of the whole model in the text class, whichever version of transformers has
    named it; others unchanged."""
    inner_path = f"{path}."
    for prefix, replacement in PREFIXES:
        if inner_path.startswith(prefix):
            return (replacement + inner_path.removeprefix(prefix)).removesuffix(".")
    return path


def rename_tensors(tensors: Mapping[str, T], tensor_prefix: str, file: Path) -> dict[str, T]:
    """Return the tensors of an adapter under PEFT's names on the text class. Raise InputError for
    those of a multimodal model on a base that is none, for those of a tower, and for two with one
    name."""
    renamed: dict[str, T] = {}
    for stored_name, tensor in tensors.items():
        path = stored_name.removeprefix(PREFIX)
        text_path = name_in_text_class(path)
        if text_path != path and not tensor_prefix:
            message = f"the adapter is for a multimodal model, but the base is not: {path:.200}"
            raise InputError(message, where=str(file), fix=MODEL_FIX)
        if tensor_prefix and not text_path.startswith(TEXT_MODULES):
            message = f"the adapter changes {path:.200}, which is not in the text part"
            raise InputError(message, where=str(file), fix=TEXT_FIX)
        name = f"{PREFIX}{text_path}" if path != stored_name else stored_name
        if name in renamed:
            message = f"the adapter holds {text_path:.200} under two names"
            raise InputError(message, where=str(file), fix=COPY_FIX)
        renamed[name] = tensor
    return renamed


# ---------------------------------------------------------------- adapter_config.json


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


# ---------------------------------------------------------------- weights


def _compare_tensors(
    stored: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]], file: Path
) -> None:
    """Raise InputError unless the file holds the expected tensors, and no others."""
    for name, tensor in stored.items():
        if name not in expected:
            message = (
                f"the tensor {name:.200} is not part of a LoRA adapter as {ADAPTER_CONFIG_FILE} "
                "describes it"
            )
            raise InputError(message, where=str(file), fix=SAVE_FIX)
        if tensor.shape != expected[name] or tensor.dtype not in DTYPES:
            message = (
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}; on this base it must "
                f"be {list(expected[name])} in {', '.join(DTYPES)}"
            )
            fix = BASE_FIX if tensor.shape != expected[name] else "save it in one of these dtypes"
            raise InputError(message, where=str(file), fix=fix)
    if missing := sorted(expected.keys() - stored.keys()):
        message = f"the adapter has no {missing[0]}, which {ADAPTER_CONFIG_FILE} requires"
        raise InputError(message, where=str(file), fix=COPY_FIX)


def _list_lora_paths(headers: Mapping[str, TensorHeader]) -> list[str]:
    paths: dict[str, None] = {}
    for name in headers:
        if match := LORA_KEY.fullmatch(name):
            paths[match.group(1)] = None
    return list(paths)


def _find_stacks(
    base: Mapping[str, TensorHeader], path: str, file: Path
) -> list[tuple[str, tuple[int, ...]]]:
    """Return PEFT's path and [experts, outputs, inputs] of a linear, which has one expert, or of
    both stacks that an adapter of experts has."""
    stacks: dict[str, tuple[int, ...]] = {path: ()}
    if is_expert_path(path):
        module = path.removesuffix(f".{INNER}")
        stacks = {name: _find_stack(base, name) for name in (module, f"{module}.{INNER}")}
    else:
        layer = base.get(f"{path}.weight")
        if layer is not None and len(layer.shape) == 2 and path != HEAD:
            stacks[path] = (1, *layer.shape)
    if () in stacks.values():
        message = f"the adapter has {path}, which is not a linear layer of the base's decoder"
        raise InputError(message, where=str(file), fix=BASE_FIX)
    if find_part(path) == ROUTER:
        message = f"the adapter changes the router {path}, which stays frozen here"
        raise InputError(message, where=str(file), fix=MERGE_FIX)
    return list(stacks.items())


def _find_stack(base: Mapping[str, TensorHeader], path: str) -> tuple[int, ...]:
    """Return experts, outputs and inputs of the stack at PEFT's path, () without one."""
    names = [name for name in list_stack_names(path) if name in base]
    if not names or len(base[names[0]].shape) != 3:
        return ()
    num_experts, outputs, inputs = base[names[0]].shape
    bias = base.get(f"{list_stack_names(path)[0]}_bias")
    if bias is not None and bias.shape[1] != outputs:  # gpt-oss stores [E, I, O]
        outputs, inputs = inputs, outputs
    return num_experts, outputs, inputs


def _read_token_rows(
    config: Mapping[str, Any], base: Mapping[str, TensorHeader], where: str
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return the new tokens that the adapter has rows for, and the shapes of these rows. In PEFT's
    config a list means the embedding alone."""
    indices = config.get("trainable_token_indices") or {}
    ids_by_module = indices if isinstance(indices, dict) else {EMBEDDING: indices}
    ids = next(iter(ids_by_module.values()), ())
    is_same_for_all = all(module_ids == ids for module_ids in ids_by_module.values())
    if not (_is_consecutive(ids) and is_same_for_all) or ids_by_module.keys() - {EMBEDDING, HEAD}:
        message = f"trainable_token_indices is {indices!r:.80}, not consecutive token ids"
        raise InputError(message, where=where, fix=MERGE_FIX)
    shapes: dict[str, tuple[int, ...]] = {}
    for module in ids_by_module:
        name = find_embedding([*base]) if module == EMBEDDING else f"{HEAD}.weight"
        if name not in base:
            message = f"trainable_token_indices names {module}, which the base model lacks"
            raise InputError(message, where=where, fix=BASE_FIX)
        path = name.removesuffix(".weight")
        shapes[f"{PREFIX}{path}.{TOKEN_ROWS_SUFFIX}"] = (len(ids), *base[name].shape[1:])
    return tuple(ids), shapes


def _is_consecutive(ids: Any) -> bool:
    if not isinstance(ids, (list, tuple)):
        return False
    if not all(type(index) is int and index >= 0 for index in ids):
        return False
    return not ids or list(ids) == list(range(ids[0], ids[0] + len(ids)))


@dataclass(frozen=True)
class _SavedModules:
    """Name in the file -> shape of what `modules_to_save` names, and the parameters among them that
    were `trained` in full, without a head that is the embedding."""

    shapes: Mapping[str, tuple[int, ...]]
    trained: tuple[str, ...]


def _read_modules(
    config: Mapping[str, Any],
    base: Mapping[str, TensorHeader],
    base_config: Mapping[str, Any],
    stored: Mapping[str, TensorHeader],
    file: Path,
) -> _SavedModules:
    names = config.get(SAVED_MODULES_KEY) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        message = f"{SAVED_MODULES_KEY} is {names!r:.80}, not a list of module names"
        raise _make_config_error(message, str(file.parent / ADAPTER_CONFIG_FILE))
    modules = [name_in_text_class(name) for name in names]
    head = f"{HEAD}.weight"
    embedding = find_embedding([*base])
    is_tied = head not in base
    if not is_tied and base_config.get("tie_word_embeddings") is not False:
        is_tied = has_equal_values(base[head], base[embedding])
    parameters = {**base, head: base[embedding]} if is_tied else base
    saved = match_saved_parameters(list(parameters), modules)
    for name in saved:
        if name == f"{HEAD}.bias" or is_transposed_linear(name):
            message = f"{SAVED_MODULES_KEY} has {name}, which cannot be trained here"
            raise InputError(message, where=str(file), fix=MERGE_FIX)
    if is_tied and {embedding, head} & {*saved}:
        _refuse_untied(stored, [name for name in (embedding, head) if name in saved], file)
    trained = tuple(name for name in saved if not (is_tied and name == head))
    return _SavedModules({f"{PREFIX}{name}": parameters[name].shape for name in saved}, trained)


def _refuse_untied(stored: Mapping[str, TensorHeader], names: Sequence[str], file: Path) -> None:
    """Raise InputError if an adapter of a model with a tied head has another head than embedding:
    PEFT trains a copy of each module that it saves."""
    matrices = [_read_bytes(stored[f"{PREFIX}{n}"]) for n in names if f"{PREFIX}{n}" in stored]
    if len(matrices) == 2 and matrices[0] == matrices[1]:
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


def _summarize_modules(saved: Sequence[str], base: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """Return the shortest form: names such as norm, or full paths where others end in the name."""
    modules: set[str] = set()
    for parameter in saved:
        path = parameter.rpartition(".")[0]
        name = path.rpartition(".")[2]
        is_unique = set(match_saved_parameters(list(base), [name])) <= set(saved)
        modules.add(name if is_unique else path)
    return tuple(sorted(modules))


def _summarize_targets(
    paths: list[str], base: Mapping[str, TensorHeader], saved: Mapping[str, Any]
) -> str | tuple[str, ...]:
    """Return the shortest form: all-linear, names such as q_proj, or full paths. Linears that are
    trained in full have no adapter."""
    paths = list_expert_modules(paths)
    names = {path.rpartition(".")[2] for path in paths}
    base_names: list[str] = []
    for path in list_linear_paths(base):
        is_saved = f"{PREFIX}{path}.weight" in saved
        is_omitted = find_part(path) == EXPERTS and EXPERTS not in names
        base_names += [] if is_saved or is_omitted else [path.rpartition(".")[2]]
    if sum(name in names for name in base_names) > len(paths):
        return tuple(sorted(paths))
    is_all_linear = names == set(base_names) and EXPERTS not in names
    return "all-linear" if is_all_linear else tuple(sorted(names))
