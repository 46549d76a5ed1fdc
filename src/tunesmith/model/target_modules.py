"""Select the linear layers that `lora_target_modules` names, and the parameters of the modules that
`modules_to_save` names.

In: the paths of a model's linears and the setting. Out: the selected paths. The setting is
all-linear; a word for a part of the layers (attention, recurrent, mlp, experts); a list of such
words and of names such as q_proj or layers.0.mlp.up_proj; or a regular expression for full paths,
as in PEFT. Routers never have an adapter, and experts only where the setting names them. A regular
expression is untrusted and Python's `re`, which PEFT uses, has no time limit, so it runs in a
process that can be killed. Loads no torch. Left out: adapters of experts that are stored as one
tensor (experts.py)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import TensorHeader

SETTING = "lora_target_modules"
MAX_MATCH_SECONDS = 5.0  # of a processor; all paths of a large model take milliseconds
MATCHER_SCRIPT = """
import json, re, signal, sys
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
patterns, paths = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in patterns]
matches = {}
for path in paths:
    first = (index for index, pattern in enumerate(patterns) if pattern.fullmatch(path))
    matches[path] = next(first, None)
print(json.dumps(matches))
"""
ALL_LINEAR = "all-linear"
ATTENTION = "attention"  # softmax attention
RECURRENT = "recurrent"  # linear attention, state space models, short convolutions
MLP = "mlp"  # of dense layers, and shared experts
EXPERTS = "experts"  # routed ones
ROUTER = "router"
PARTS = (ATTENTION, RECURRENT, MLP, EXPERTS)  # words of the setting
# module of a layer -> part; the innermost decides
PART_BY_MODULE = {
    **dict.fromkeys(("self_attn", "attn", "attention"), ATTENTION),
    **dict.fromkeys(("linear_attn", "mamba", "conv"), RECURRENT),
    **dict.fromkeys(("mlp", "feed_forward", "block_sparse_moe"), MLP),
    **dict.fromkeys(("shared_mlp", "shared_expert", "shared_experts"), MLP),
    "experts": EXPERTS,
    **dict.fromkeys(("router", "gate", "shared_expert_gate"), ROUTER),
}
# linears of nemotron_h, where every block is called mixer -> part; the others are MLPs
PART_BY_MIXER_LINEAR = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), ATTENTION),
    **dict.fromkeys(("in_proj", "out_proj"), RECURRENT),
}
# PEFT 0.21 refuses to load an adapter of these types on out_proj: mamba-ssm reads its weight past
# the adapter
PEFT_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
SAVED_MODULES_KEY = "modules_to_save"
HEAD = "lm_head"
EMBEDDING = "embed_tokens"
# of model types that call it otherwise
EMBEDDINGS = {"gpt2": "wte", "gpt_neox": "embed_in", "nemotron_h": "embeddings"}
# linears that files hold [I, O], as GPT-2 does; PEFT calls this fan_in_fan_out
CONV1D_TYPES = {"gpt2"}
TRANSPOSED_LINEAR = re.compile(r"transformer\.h\.\d+\..*\bc_(attn|fc|proj)\.weight")
LAYER = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.*)")


class LayerName(NamedTuple):
    """A layer of the decoder by its number, and the rest of a name in it."""

    number: int
    rest: str


def find_layer(name: str) -> LayerName | None:
    """Return the layer that a module or tensor belongs to, None for those outside of all."""
    match = LAYER.fullmatch(name)
    return None if match is None else LayerName(int(match[1]), match[2])


def list_linear_paths(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return the paths of the decoder's linears, from the names and shapes of a model's tensors.

    All experts of a layer are one path, however they are stored."""
    paths: dict[str, None] = {}
    for name, tensor in headers.items():
        if find_layer(name) is None:
            continue
        before, experts, _ = name.partition(f".{EXPERTS}.")
        if experts:
            paths[f"{before}.{EXPERTS}"] = None
        elif is_linear_weight(name, tensor):
            paths[name.removesuffix(".weight")] = None
    return [path for path in paths if find_part(path) != ROUTER]


def is_linear_weight(name: str, tensor: TensorHeader) -> bool:
    """Return whether a tensor of a layer is the weight of a linear. A norm of Cohere can have a row
    of weights for each head."""
    is_matrix = len(tensor.shape) == 2 and name.endswith(".weight")
    return is_matrix and not is_norm(_get_module_name(name))


def is_norm(module_name: str) -> bool:
    """Return whether a module with this name in its parent is a norm."""
    return "norm" in module_name or module_name.startswith("ln_")


def find_part(path: str) -> str:
    """Return which part of its layer a linear belongs to: one of PARTS, ROUTER, or "" for others
    (the gates of per-layer embeddings)."""
    *modules, name = path.split(".")
    for module in (name, *reversed(modules)):
        if module == "mixer":
            return PART_BY_MIXER_LINEAR.get(name, MLP)
        if module in PART_BY_MODULE:
            return PART_BY_MODULE[module]
    return ""


def is_transposed_linear(parameter_name: str) -> bool:
    """Return whether files hold this weight of a linear [I, O], under the names of the text
    class."""
    return bool(TRANSPOSED_LINEAR.fullmatch(parameter_name))


def has_adapter_format(path: str, model_type: str) -> bool:
    """Return whether PEFT can load an adapter of this linear."""
    is_mamba_output = path.endswith(".out_proj") and find_part(path) == RECURRENT
    return not (model_type in PEFT_MAMBA_TYPES and is_mamba_output)


def list_words(targets: str | Sequence[str]) -> list[str]:
    """Return the words of the setting for parts of a layer, without names and expressions."""
    words = [targets] if isinstance(targets, str) else targets
    return [word for word in words if word == ALL_LINEAR or word in PARTS]


def has_only_words(targets: str | Sequence[str]) -> bool:
    """Return whether the setting names no single layer."""
    return len(list_words(targets)) == (1 if isinstance(targets, str) else len(targets))


def select_targets(
    paths: Sequence[str],
    targets: str | Sequence[str],
    model_type: str = "",
    *,
    seconds: float = MAX_MATCH_SECONDS,
) -> list[str]:
    """Return the paths that `targets` selects, in their order.

    `model_type` says what PEFT could not load. Raises InputError for a word or name without a
    match, an invalid regular expression, or one that takes longer than `seconds`."""
    usable: list[str] = []
    for path in paths:
        if find_part(path) != ROUTER and has_adapter_format(path, model_type):
            usable.append(path)
    if isinstance(targets, str) and not list_words(targets):
        matches = match_patterns(usable, [targets], where=SETTING, seconds=seconds)
        if not matches:
            _refuse_unmatched(
                f"no linear layer has a full path that matches {targets}", paths, usable
            )
        return list(matches)
    return _match_names(paths, usable, [targets] if isinstance(targets, str) else targets)


def _match_names(paths: Sequence[str], usable: Sequence[str], names: Sequence[str]) -> list[str]:
    selected: set[str] = set()
    for name in names:
        matches = _match_name(usable, name)
        selected.update(matches)
        if matches:
            continue
        excluded = [path for path in _match_name(paths, name) if find_part(path) != ROUTER]
        if excluded:
            message = f"PEFT could not load an adapter of {excluded[0]}: mamba-ssm would ignore it"
        elif name in PARTS:
            message = f"no linear layer belongs to {name}"
        else:
            message = f"no linear layer is called {name}"
        _refuse_unmatched(message, paths, usable)
    return [path for path in usable if path in selected]


def _match_name(paths: Sequence[str], name: str) -> list[str]:
    if name == ALL_LINEAR:
        return [path for path in paths if find_part(path) != EXPERTS]
    if name in PARTS:
        return [path for path in paths if find_part(path) == name]
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _refuse_unmatched(message: str, paths: Sequence[str], usable: Sequence[str]) -> NoReturn:
    names = ", ".join(_list_module_names(usable))
    words = ", ".join((ALL_LINEAR, *PARTS))
    fix = f"use {words}; or names in a list: [{names}]; paths look like {paths[0]}"
    raise InputError(message, where=SETTING, fix=fix)


def match_patterns(
    paths: Sequence[str],
    patterns: Sequence[str],
    *,
    where: str,
    seconds: float = MAX_MATCH_SECONDS,
) -> dict[str, int]:
    """Return path -> index of the first regular expression that matches all of it.

    Raises InputError for an invalid expression, or if they take more than `seconds` of a processor,
    however busy the machine is."""
    command = [sys.executable, "-I", "-S", "-c", MATCHER_SCRIPT, str(seconds)]
    payload = json.dumps([list(patterns), list(paths)])
    shown = ", ".join(patterns)
    with tempfile.TemporaryDirectory() as scratch:
        completed = subprocess.run(
            command, input=payload, capture_output=True, text=True, check=False, cwd=scratch
        )
    if completed.returncode == -signal.SIGPROF:
        message = (
            f"the regular expression {shown:.200} takes more than {seconds:g} s "
            f"on {len(paths):,} paths"
        )
        fix = "avoid nested repetition, or write a list of names"
        raise InputError(message, where=where, fix=fix)
    if completed.returncode:
        reason = completed.stderr.strip().rpartition("\n")[2]
        message = f"{shown:.200} is not a regular expression: {reason}"
        raise InputError(message, where=where, fix="correct it")
    matches: dict[str, int | None] = json.loads(completed.stdout)
    return {path: index for path, index in matches.items() if index is not None}


def _list_module_names(paths: Sequence[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


# ---------------------------------------------------------------- modules_to_save


def list_parameter_names(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return the names of a model's parameters. Files of a decoder alone lack the prefix
    `model.`."""
    has_prefix = any(name.startswith(("model.", "gpt_neox.", "transformer.")) for name in headers)
    names: list[str] = []
    for name in headers:
        is_full = has_prefix or name.startswith(f"{HEAD}.")
        names.append(name if is_full else f"model.{name}")
    return names


def match_saved_parameters(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the parameters of each module whose path ends in one of `modules`, and of the modules
    inside it, as PEFT matches its modules_to_save."""
    return [name for name in names if _is_inside(name, tuple(modules))]


def _is_inside(parameter_name: str, modules: tuple[str, ...]) -> bool:
    path = parameter_name.rpartition(".")[0]
    while path:
        if path.endswith(modules):
            return True
        path = path.rpartition(".")[0]
    return False


def find_embedding(names: Sequence[str]) -> str:
    """Return the parameter of a model that is its embedding, "" without one."""
    modules = {EMBEDDING, *EMBEDDINGS.values()}
    return next((name for name in names if _get_module_name(name) in modules), "")


def _get_module_name(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0].rpartition(".")[2]


def name_tied_modules(modules: Sequence[str], embedding: str) -> list[str]:
    """Return the names of modules for a model whose head is the embedding, whose parameter has the
    name `embedding`."""
    module_name = _get_module_name(embedding)
    return [module_name if HEAD.endswith(module) else module for module in modules]


def select_saved_parameters(
    names: Sequence[str], modules: Sequence[str], *, is_tied: bool
) -> list[str]:
    """Return the parameters that `modules_to_save` trains. A tied head is the embedding.

    Raises InputError for a name without a match, for experts, routers and linears that are stored
    transposed, and for a head with a bias."""
    if is_tied:
        names = [name for name in names if name != f"{HEAD}.weight"]
        modules = name_tied_modules(modules, find_embedding(names))
    if missing := [module for module in modules if not match_saved_parameters(names, [module])]:
        paths = [name.rpartition(".")[0] for name in names]
        fix = f"use names from: {', '.join(_list_module_names(paths))}"
        message = f"no module with weights has a path that ends in {', '.join(missing)}"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
    selected = match_saved_parameters(names, modules)
    for name in selected:
        if find_part(name.rpartition(".")[0]) in (EXPERTS, ROUTER):
            message = f"{name} belongs to experts or to a router, which stay frozen"
            fix = f"{SETTING}: [attention, experts] adapts the experts"
            raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
        if is_transposed_linear(name):
            message = (
                f"{name} is stored transposed and cannot be trained in full next to an adapter"
            )
            fix = f"name it in {SETTING} instead"
            raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
    if f"{HEAD}.bias" in selected:
        message = f"{HEAD} has a bias, which cannot be trained"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=f"leave {HEAD} out")
    return selected
