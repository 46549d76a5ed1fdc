"""Where the parameters of the text part lie in the weight files.

    read_text_tensors(folder) -> TextTensors(parameters, omitted)

In: a folder that `validate.check_folder` has checked. Out: the name of each parameter of
transformers' text class -> the tensors that hold it, and the tensors that text training does not
load: vision and audio towers, projectors, and layers for multi-token prediction. Files name the
same parameter in several ways: a multimodal checkpoint has prefixes, older checkpoints other words,
and experts are one tensor or one per expert. Left out: whether a parameter is missing
(text_network.py), reading values (safetensors_io.py)."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.model.hub.families import (
    TEXT_PREFIX,
    find_family,
    find_text_type,
    get_tensor_prefix,
    get_text_config,
)
from tunesmith.model.hub.packed_tensors import MXFP4_DTYPE, attach_scales, find_packing
from tunesmith.model.hub.validate import TensorHeader, read_headers, read_model_json
from tunesmith.model.target_modules import is_transposed_linear

# The text part's prefixes in files -> those of the text class. The first that fits is taken; the
# second was written by transformers 5.10 to 5.23, the last three by versions before 4.52.
PREFIXES = (
    (f"{TEXT_PREFIX}model.", "model."),
    (TEXT_PREFIX, "model."),
    ("model.text_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.", "model."),
    ("lm_head.", "lm_head."),
)
# Types of text classes whose checkpoints may have these names: transformers saves them so when it
# has loaded them from the whole model.
PREFIXED_TEXT_TYPES = {"qwen3_5_text", "qwen3_5_moe_text"}
# One matrix of one expert. `w1` and `w3` are the gate and the other input, `w2` the output.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
INPUT_PAIRS = (("gate_proj", "up_proj"), ("w1", "w3"))
SINGLE_MATRICES = {"up_proj": "up_proj", "down_proj": "down_proj", "w2": "down_proj"}
# Parts of one parameter, one after another along its first dimension.
CONVOLUTION = re.compile(r"(.*\.)[qkv](_conv1d\.weight)")
# Tables that are computed today, in checkpoints of the first families.
OLD_BUFFER = re.compile(r".*\.(rotary_emb\.inv_freq|(attention|attn)\.(masked_)?bias)")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
KEYS_AND_VALUES = re.compile(r".*\.self_attn\.[kv]_(proj|norm)\..*")
TRANSPOSED_TYPES = {"qwen3_vl_moe"}  # files hold their fused experts [E, I, O], the class does not
TRANSPOSED_STACKS = {"gpt_oss"}  # text types whose class has [E, I, O], as its files do
INDEXER = ".self_attn.indexer."  # chooses keys, and is not needed where all are seen
PREDICTING_PREFIXES = ("mtp.", "model.mtp_")  # of what predicts further tokens
# their layers beyond the last one do
PREDICTING_TYPES = {"deepseek_v3", "glm4_moe", "glm4_moe_lite"}
SHARING_TYPES = {"gemma4_text", "gemma4_unified_text"}
SAMPLE_BYTES = 2**16
DOWNLOAD_FIX = "download the model again"


@dataclass(frozen=True)
class StoredParameter:
    """The tensors of one parameter, each [O, I] or [E, O, I].

    Several are concatenated along O. With `num_experts` they belong to the experts one after
    another, the same number to each, and the experts are stacked. `is_transposed`: the file has
    [E, I, O]."""

    headers: tuple[TensorHeader, ...]
    num_experts: int = 0
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        first = self.headers[0].shape
        if self.is_transposed:
            return (*first[:-2], first[-1], first[-2])
        if self.num_experts:
            return (self.num_experts, *_concat_shapes(self.get_expert(0)))
        return _concat_shapes(self.headers)

    @property
    def is_plain(self) -> bool:
        """Whether one tensor of the files is the parameter, row by row."""
        is_packed = self.headers[0].scales is not None
        return len(self.headers) == 1 and not (self.is_transposed or self.num_experts or is_packed)

    def get_expert(self, index: int) -> tuple[TensorHeader, ...]:
        """Return the tensors of one of the experts that are stored one by one."""
        count = len(self.headers) // self.num_experts
        return self.headers[index * count : (index + 1) * count]

    def get_header(self) -> TensorHeader:
        """Return one header for the whole parameter, for what only counts and names."""
        if len(self.headers) == 1 and not self.is_transposed:
            return self.headers[0]
        num_bytes = sum(header.end - header.begin for header in self.headers)
        first = self.headers[0]
        return replace(first, shape=self.shape, begin=0, end=num_bytes)


def _concat_shapes(headers: tuple[TensorHeader, ...]) -> tuple[int, ...]:
    shape = headers[0].shape
    if len(headers) == 1:
        return shape
    return (sum(header.shape[0] for header in headers), *shape[1:])


@dataclass(frozen=True)
class TextTensors:
    """The tensors of a model folder: `parameters` by the name in the text class, `omitted` by the
    name in the files."""

    parameters: Mapping[str, StoredParameter]
    omitted: Mapping[str, TensorHeader]


@dataclass(frozen=True)
class TensorNaming:
    """How a checkpoint names its tensors."""

    is_multimodal: bool = False
    text_type: str = ""
    num_layers: int | None = None  # config.json leaves it to transformers' default
    hidden_size: int | None = None
    # the last layers, which take keys and values of others; files of Gemma 4 have weights for them
    num_sharing_layers: int = 0
    is_transposed: bool = False
    renamings: tuple[tuple[str, str], ...] = ()  # of transformers, pattern and replacement

    @property
    def has_transposed_stacks(self) -> bool:
        """Whether the parameters of experts are [E, I, O] in the text class."""
        return self.text_type in TRANSPOSED_STACKS

    def name_parameter(self, name: str) -> str | None:
        """Return the parameter that a tensor belongs to, or None for one that is left out."""
        for pattern, replacement in self.renamings:
            name = re.sub(pattern, replacement, name)
        if self.is_multimodal:
            prefixes = [pair for pair in PREFIXES if name.startswith(pair[0])]
            if not prefixes:
                return None
            prefix, replacement = prefixes[0]
            name = replacement + name.removeprefix(prefix)
        elif name.startswith(PREDICTING_PREFIXES) or OLD_BUFFER.fullmatch(name):
            return None
        elif self.text_type in PREFIXED_TEXT_TYPES and name.startswith(TEXT_PREFIX):
            name = f"model.{name.removeprefix(TEXT_PREFIX)}"
        if self.text_type == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"  # files of the decoder alone, as its first ones are
        if INDEXER in name:
            return None
        layer = LAYER.match(name)
        return None if layer is not None and self._is_unused(name, int(layer[1])) else name

    def _is_unused(self, name: str, layer: int) -> bool:
        """Return whether no module of this layer has the parameter."""
        if self.num_layers is None:
            return False
        if KEYS_AND_VALUES.fullmatch(name) and self.num_sharing_layers:
            return layer >= self.num_layers - self.num_sharing_layers
        return self.text_type in PREDICTING_TYPES and layer >= self.num_layers


PLAIN_NAMING = TensorNaming()  # as in the text class


def read_naming(config: Json) -> TensorNaming:
    """Return how the checkpoint of this config.json names its tensors."""
    text = get_text_config(config)
    keys = ("num_hidden_layers", "hidden_size", "num_kv_shared_layers")
    sizes = {key: text[key] if type(text.get(key)) is int else None for key in keys}
    text_type = find_text_type(config)
    renamings: list[tuple[str, str]] = []
    model_type = str(config.get("model_type"))
    family = find_family(model_type)
    if family is None or not family.is_uniform:
        from tunesmith.model.hub.transformers_families import find_renamings

        classes = config.get("architectures")
        names = [*map(str, classes if isinstance(classes, list) else [])]
        if family is not None:
            names.append(family.causal_class)
        renamings = find_renamings(*names, model_type, text_type)
    num_sharing_layers = sizes["num_kv_shared_layers"] if text_type in SHARING_TYPES else 0
    return TensorNaming(
        is_multimodal=bool(get_tensor_prefix(config)),
        text_type=text_type,
        num_layers=sizes["num_hidden_layers"],
        num_sharing_layers=num_sharing_layers or 0,
        is_transposed=config.get("model_type") in TRANSPOSED_TYPES,
        hidden_size=sizes["hidden_size"],
        renamings=tuple(renamings),
    )


def read_text_tensors(folder: Path) -> TextTensors:
    """Sort the tensors of a folder. Raises InputError for a folder without a text part, and for
    experts that are missing or of different shapes."""
    config_file = folder / "config.json"
    config = read_model_json(config_file)
    naming = read_naming(config)
    packing = find_packing(config, naming.text_type, str(config_file))
    headers = attach_scales(read_headers(folder), packing, str(folder))
    single: dict[str, TensorHeader] = {}
    omitted: dict[str, TensorHeader] = {}
    for file_name, header in headers.items():
        name = naming.name_parameter(file_name)
        if name is None:
            omitted[file_name] = header
        elif name in single:
            message = f"the weights hold {name} twice, once as {file_name}"
            raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
        else:
            single[name] = header
    if not single:
        message = f"the weights have no text part: no tensor's name starts with {TEXT_PREFIX}"
        raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
    return TextTensors(_group_tensors(single, naming, folder), omitted)


def has_uniform_layers(folder: Path) -> bool:
    """Return whether all layers are alike and the files hold parameters as transformers does: under
    their names, and not packed."""
    config = read_model_json(folder / "config.json")
    if config.get("quantization_config"):
        return False
    family = find_family(str(config.get("model_type")))
    return family is None or family.is_uniform


def read_parameter_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return one header for each parameter in the weights of a folder."""
    parameters = read_text_tensors(folder).parameters
    return {name: stored.get_header() for name, stored in parameters.items()}


def has_equal_values(first: TensorHeader, second: TensorHeader) -> bool:
    """Return whether two tensors are equal, as far as their first and last bytes say it: a head
    that is stored beside the embedding it is equal to."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return _read_ends(first) == _read_ends(second)


def _read_ends(header: TensorHeader) -> bytes:
    with header.file.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start + header.begin)
        begin = file.read(min(SAMPLE_BYTES, header.end - header.begin))
        file.seek(start + max(header.begin, header.end - SAMPLE_BYTES))
        return begin + file.read(min(SAMPLE_BYTES, header.end - header.begin))


def _group_tensors(
    single: Mapping[str, TensorHeader], naming: TensorNaming, folder: Path
) -> dict[str, StoredParameter]:
    """Return the parameters. Experts and parts of a convolution are collected."""
    parameters: dict[str, StoredParameter] = {}
    experts: defaultdict[str, dict[tuple[int, str], TensorHeader]] = defaultdict(dict)
    for name, header in single.items():
        if match := EXPERT.fullmatch(name):
            experts[match[1]][int(match[2]), match[3]] = header
        elif match := CONVOLUTION.fullmatch(name):
            names = [f"{match[1]}{part}{match[2]}" for part in "qkv"]
            parts = {name: single[name] for name in names if name in single}
            _refuse_differences(parts, folder, first_dimension=1)
            parameters[f"{match[1]}conv1d.weight"] = StoredParameter(tuple(parts.values()))
        else:
            is_transposed = is_stored_transposed(name, header, naming)
            parameters[name] = StoredParameter((header,), is_transposed=is_transposed)
    for path, matrices in experts.items():
        stacked = _stack_experts(path, matrices, folder)
        for name in stacked.keys() & parameters.keys():
            message = f"the weights hold {name} twice, once expert by expert"
            raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
        parameters |= stacked
    return parameters


def _refuse_differences(
    parts: Mapping[str, TensorHeader], folder: Path, *, first_dimension: int = 0
) -> None:
    """Raise InputError for parts that cannot be one tensor."""
    first_name, first = next(iter(parts.items()))
    expected = (first.dtype, first.shape[first_dimension:])
    for name, header in parts.items():
        if (header.dtype, header.shape[first_dimension:]) != expected:
            message = (
                f"the parts of a parameter differ: {name} is {header.dtype} {list(header.shape)}, "
                f"{first_name} {first.dtype} {list(first.shape)}"
            )
            raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)


def is_stored_transposed(name: str, header: TensorHeader, naming: TensorNaming) -> bool:
    """Return whether a file holds fused experts [E, I, O] where the class has [E, O, I], or the
    other way round in MXFP4."""
    if header.dtype == MXFP4_DTYPE or is_transposed_linear(name):
        return True
    dimension = {"gate_up_proj": -1, "down_proj": -2}.get(name.rpartition(".")[2])
    if not naming.is_transposed or dimension is None or len(header.shape) != 3:
        return False
    # as in transformers, what has the shape of the parameter is the parameter
    return header.shape[dimension] != naming.hidden_size


def _stack_experts(
    path: str, matrices: Mapping[tuple[int, str], TensorHeader], folder: Path
) -> dict[str, StoredParameter]:
    """Return the stacked parameters of experts that are stored one by one."""
    words = {word for _, word in matrices}
    groups: dict[str, tuple[str, ...]] = {}
    for pair in INPUT_PAIRS:
        if pair[0] in words or (pair[1] in words and pair[1] not in SINGLE_MATRICES):
            groups["gate_up_proj"] = pair
            words -= {*pair}
    for word in sorted(words):
        groups[SINGLE_MATRICES[word]] = (word,)
    num_experts = 1 + max(index for index, _ in matrices)
    parameters: dict[str, StoredParameter] = {}
    for parameter, pieces in groups.items():
        headers: dict[str, TensorHeader] = {}
        for expert, piece in itertools.product(range(num_experts), pieces):
            name = f"{path}.{expert}.{piece}.weight"
            if (expert, piece) not in matrices:
                message = f"the weights have no {name}"
                raise InputError(message, where=str(folder), fix=DOWNLOAD_FIX)
            headers[name] = matrices[expert, piece]
        _refuse_differences(headers, folder)
        parameters[f"{path}.{parameter}"] = StoredParameter(tuple(headers.values()), num_experts)
    return parameters
