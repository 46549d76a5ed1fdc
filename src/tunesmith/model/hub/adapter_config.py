"""An adapter folder, ours or PEFT's, judged from its configuration and its header before anything is allocated.

In: the folder, or a run folder that holds one, and the folder of the base. Out: `AdapterFolder`. Which layers are
adapted is read from the weights themselves, so no pattern of a stranger is ever evaluated; a key that would change what
those weights compute is refused by its name. Left out: the weights (saved.py), what the adapter belongs to
(provenance.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.atomic import sha256_of
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import trained_in
from tunesmith.model.hub.files import check_files
from tunesmith.model.hub.validate import TensorHeader, read_header, read_headers, read_json
from tunesmith.model.target_modules import linear_paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
LARGEST_RANK = 4096
DTYPES = ("F32", "F16", "BF16")
MAGNITUDE = "lora_magnitude_vector"
ROWS = "token_adapter.trainable_tokens_delta"  # the rows themselves, whatever PEFT's name says
KEY = re.compile(re.escape(PREFIX) + rf"([\w.]+)\.(lora_A\.weight|lora_B\.weight|{MAGNITUDE})")
MATRICES = ("embed_tokens", "lm_head")

# Keys that say nothing about the result, or that the weights answer better: which layers are adapted.
UNUSED = {
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Keys that may say this and no more; of any other key the value must be empty.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base
    "megatron_core": ("megatron.core", None),  # what PEFT always writes
}
READ = {"r", "lora_alpha", "use_rslora", "use_dora", "trainable_token_indices"}


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA or DoRA adapter that fits its base. `targets` in the form of `lora_target_modules`; `sha256` is of the
    weights; `new_ids` are the tokens that it has rows for, one after the other."""

    path: Path
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...]
    base: str  # what the adapter calls its base
    sha256: str
    new_ids: tuple[int, ...] = ()

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, rslora=self.rslora)


def scale_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """What B A x is multiplied with."""
    return alpha / (rank**0.5 if rslora else rank)


def read_adapter(given: Path, base: Path) -> AdapterFolder:
    """The adapter in folder `given`, or in its `adapter/` if it is a run folder. InputError unless it fits the base."""
    given = trained_in(given)
    path = given / "adapter" if (given / "plan.json").is_file() else given
    if not (path / CONFIG).is_file():
        fix = f"finish it: tunesmith resume {given}" if path != given else f"give a folder with {CONFIG} and {WEIGHTS}"
        raise InputError("there is no adapter here", where=str(path), fix=fix)
    check_files(path)
    config = read_json(path / CONFIG)
    rank, alpha = _check_config(config, str(path / CONFIG))
    if not (path / WEIGHTS).is_file():
        raise _no_weights(path)
    layers = read_headers(base)
    dora, adapter = bool(config.get("use_dora")), read_header(path / WEIGHTS)
    new_ids = _check_rows(adapter, layers, config.get("trainable_token_indices"), path)
    adapter = {name: tensor for name, tensor in adapter.items() if not name.endswith(ROWS)}
    paths = _check_weights(adapter, layers, rank, path / WEIGHTS)
    _check_complete(adapter, paths, path / WEIGHTS, dora=dora)
    return AdapterFolder(
        path=path,
        rank=rank,
        alpha=alpha,
        rslora=bool(config.get("use_rslora")),
        dora=dora,
        targets=_targets(paths, layers),
        base=str(config.get("base_model_name_or_path") or ""),
        sha256=sha256_of(path / WEIGHTS),
        new_ids=new_ids,
    )


def _check_config(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Rank and alpha. Raises InputError that names the key."""
    fix = "only plain LoRA adapters, as PEFT's LoraConfig makes them by default, can be gone on with"
    for key, allowed in ONLY.items():
        if key in config and config[key] not in allowed:
            raise InputError(f"{key} is {config[key]!r:.80}, which is not supported", where=where, fix=fix)
    if not _of_transformers(config.get("auto_mapping")):
        raise InputError("auto_mapping names code outside of transformers", where=where, fix=fix)
    for key in sorted(config.keys() - UNUSED - ONLY.keys() - READ - {"auto_mapping"}):
        if config[key]:
            what = f"{key} is {config[key]!r:.80}: it changes what the adapter computes, and is not supported"
            raise InputError(what, where=where, fix=fix)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise InputError(f"r is {rank!r:.80}, not a whole number from 1 to {LARGEST_RANK}", where=where, fix=fix)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise InputError(f"lora_alpha is {alpha!r:.80}, not a number above 0", where=where, fix=fix)
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), (bool, type(None))):
            raise InputError(f"{key} is {config[key]!r:.80}, not true or false", where=where, fix=fix)
    return rank, alpha


def _of_transformers(mapping: Any) -> bool:
    """PEFT writes the class of a model without a task here. It is not used; PEFT itself would import it."""
    if not mapping:
        return True
    return isinstance(mapping, dict) and str(mapping.get("parent_library")).startswith("transformers.models.")


def _no_weights(path: Path) -> InputError:
    if (path / PICKLE).exists():
        fix = f"convert it in a place that you trust: load it there with PEFT and call save_pretrained, for {WEIGHTS}"
        what = f"only pickled weights ({PICKLE}): loading a pickle can run any code, so tunesmith does not"
        return InputError(what, where=str(path), fix=fix)
    return InputError(f"there is no {WEIGHTS}", where=str(path), fix="copy the whole adapter folder")


def _check_rows(
    adapter: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], wish: Any, folder: Path
) -> tuple[int, ...]:
    """The new tokens that it has rows for. In PEFT's config a list stands for the embedding alone."""
    by_matrix = wish if isinstance(wish, dict) else {MATRICES[0]: wish} if wish else {}
    ids = next(iter(by_matrix.values()), ())
    if not _in_a_row(ids) or set(by_matrix) - {*MATRICES}:
        what = f"trainable_token_indices is {wish!r:.80}: not the numbers of new tokens, one after the other"
        raise InputError(what, where=str(folder / CONFIG), fix="only rows of added tokens can be gone on with")
    own = {name: tensor for name, tensor in adapter.items() if name.endswith(f".{ROWS}")}
    found = {name.removeprefix(PREFIX).removesuffix(f".{ROWS}"): tensor for name, tensor in own.items()}
    if {path.rpartition(".")[2] for path in found} != set(by_matrix) or any(v != ids for v in by_matrix.values()):
        what = f"trainable_token_indices is {wish!r:.80}, and the weights have rows for {', '.join(found) or 'none'}"
        raise InputError(what, where=str(folder / CONFIG), fix="copy the adapter folder again")
    for path, tensor in found.items():
        matrix = _of_base(base, path)
        if matrix is None or tensor.shape != (len(ids), *matrix.shape[1:]) or tensor.dtype not in DTYPES:
            what = f"its rows for {path} are {tensor.dtype} {list(tensor.shape)}, which does not fit the base"
            raise InputError(what, where=str(folder / WEIGHTS), fix="give the adapter's own base as model:")
    return tuple(ids)


def _in_a_row(ids: Any) -> bool:
    if not isinstance(ids, (list, tuple)) or not all(type(index) is int and index >= 0 for index in ids):
        return False
    return not ids or list(ids) == list(range(ids[0], ids[0] + len(ids)))


def _check_weights(
    adapter: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], rank: int, file: Path
) -> list[str]:
    """The adapted modules. Every tensor must have the shape that its layer in the base asks for."""
    paths: dict[str, None] = {}
    for name, tensor in adapter.items():
        match = KEY.fullmatch(name)
        if match is None:
            what = f"the tensor {name[:200]} is no weight of a plain LoRA adapter on a linear layer"
            raise InputError(what, where=str(file), fix="only adapters on linear layers are supported")
        layer = _of_base(base, match[1])
        if layer is None or len(layer.shape) != 2 or match[1] == "lm_head":
            what = f"it adapts {match[1]}, which is no linear layer inside the base's decoder"
            raise InputError(what, where=str(file), fix="give the adapter's own base as model:")
        outputs, inputs = layer.shape
        wanted = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}.get(match[2], (outputs,))
        if tensor.shape != wanted or tensor.dtype not in DTYPES:
            what = (
                f"the tensor {name} is {tensor.dtype} {list(tensor.shape)}; with r {rank} on this base it must be "
                f"{list(wanted)}, in {', '.join(DTYPES)}"
            )
            raise InputError(what, where=str(file), fix="give the adapter's own base as model:")
        paths[match[1]] = None
    if not paths:
        raise InputError("it holds no weights", where=str(file))
    return list(paths)


def _check_complete(adapter: Mapping[str, TensorHeader], paths: list[str], file: Path, *, dora: bool) -> None:
    """Each adapted module has both halves, and a magnitude where the config says DoRA, else none."""
    for path in paths:
        for part in ("lora_A.weight", "lora_B.weight", *([MAGNITUDE] if dora else [])):
            if f"{PREFIX}{path}.{part}" not in adapter:
                what = f"{path} has no {part.removesuffix('.weight')}{', which use_dora wants' * (part == MAGNITUDE)}"
                raise InputError(what, where=str(file), fix="copy the adapter folder again")
        if not dora and f"{PREFIX}{path}.{MAGNITUDE}" in adapter:
            what = f"{path} has a magnitude, but use_dora is not true in {CONFIG}"
            raise InputError(what, where=str(file), fix="copy the adapter folder again")


def _of_base(base: Mapping[str, TensorHeader], path: str) -> TensorHeader | None:
    return base.get(f"{path}.weight") or base.get(f"{path.removeprefix('model.')}.weight")


def _targets(paths: list[str], base: Mapping[str, TensorHeader]) -> str | tuple[str, ...]:
    """The shortest of: all-linear, names such as q_proj, full paths."""
    linear = linear_paths(base)
    names = {path.rpartition(".")[2] for path in paths}
    if len([path for path in linear if path.rpartition(".")[2] in names]) > len(paths):
        return tuple(sorted(paths))
    return "all-linear" if names == {path.rpartition(".")[2] for path in linear} else tuple(sorted(names))
