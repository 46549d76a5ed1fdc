"""Select the linear layers that `lora_target_modules` names, and the parameters of the modules that
`modules_to_save` names.

In: the paths of a model's linears and the setting. Out: the selected paths. The setting is
all-linear, attention or mlp; a list of names such as q_proj or layers.0.mlp.up_proj; or a regular
expression for full paths, as in PEFT. A regular expression is untrusted and Python's `re`, which
PEFT uses, has no time limit, so it runs in a process that can be killed. Loads no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import TensorHeader

SETTING = "lora_target_modules"
REGEX_TIMEOUT_SECONDS = 5.0  # all paths of a large model take milliseconds
MATCHER_SCRIPT = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in patterns]
matches = {}
for path in paths:
    first = (index for index, pattern in enumerate(patterns) if pattern.fullmatch(path))
    matches[path] = next(first, None)
print(json.dumps(matches))
"""
SAVED_MODULES_KEY = "modules_to_save"
HEAD = "lm_head"
EMBEDDING = "embed_tokens"


def list_linear_paths(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return the paths of the decoder's linears, from the names and shapes of a model's tensors."""
    paths: list[str] = []
    for name, tensor in headers.items():
        is_matrix = ".layers." in f".{name}" and len(tensor.shape) == 2
        if is_matrix and name.endswith(".weight"):
            paths.append(name.removesuffix(".weight"))
    return paths


def select_targets(
    paths: Sequence[str], targets: str | Sequence[str], *, seconds: float = REGEX_TIMEOUT_SECONDS
) -> list[str]:
    """Return the paths that `targets` selects, in their order.

    Raises InputError for a name without a match, an invalid regular expression, or one that takes
    longer than `seconds`."""
    if not isinstance(targets, str):
        return _match_names(paths, targets)
    if targets in GROUPS:
        is_target = GROUPS[targets]
        selected = [path for path in paths if is_target(path)]
        message = f"no linear layer belongs to {targets}"
    else:
        selected = list(match_patterns(paths, [targets], where=SETTING, seconds=seconds))
        message = f"no linear layer has a full path that matches {targets}"
    if not selected:
        names = ", ".join(_list_module_names(paths))
        fix = f"paths look like {paths[0]}; for names write a list: [{names}]"
        raise InputError(message, where=SETTING, fix=fix)
    return selected


def _match_names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    selected: set[str] = set()
    missing: list[str] = []
    for name in names:
        matches = [path for path in paths if path == name or path.endswith(f".{name}")]
        selected.update(matches)
        if not matches:
            missing.append(name)
    if missing:
        message = f"no linear layer is called {', '.join(missing)}"
        fix = f"use {', '.join(GROUPS)}, or names from: {', '.join(_list_module_names(paths))}"
        raise InputError(message, where=SETTING, fix=fix)
    return [path for path in paths if path in selected]


def match_patterns(
    paths: Sequence[str],
    patterns: Sequence[str],
    *,
    where: str,
    seconds: float = REGEX_TIMEOUT_SECONDS,
) -> dict[str, int]:
    """Return path -> index of the first regular expression that matches all of it.

    Raises InputError for an invalid expression, or if they take longer than `seconds`."""
    command = [sys.executable, "-I", "-S", "-c", MATCHER_SCRIPT]
    payload = json.dumps([list(patterns), list(paths)])
    shown = ", ".join(patterns)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            completed = subprocess.run(
                command,
                input=payload,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                cwd=scratch,
            )
    except subprocess.TimeoutExpired as error:
        message = (
            f"the regular expression {shown:.200} takes more than {seconds:g} s "
            f"on {len(paths):,} paths"
        )
        fix = "avoid nested repetition, or write a list of names"
        raise InputError(message, where=where, fix=fix) from error
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
    has_prefix = any(name.startswith("model.") for name in headers)
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


def name_tied_modules(modules: Sequence[str]) -> list[str]:
    """Return the names of modules for a model whose head is the embedding."""
    return [EMBEDDING if HEAD.endswith(module) else module for module in modules]


def select_saved_parameters(
    names: Sequence[str], modules: Sequence[str], *, is_tied: bool
) -> list[str]:
    """Return the parameters that `modules_to_save` trains. A tied head is the embedding.

    Raises InputError for a name without a match, and for a head with a bias."""
    if is_tied:
        names = [name for name in names if name != f"{HEAD}.weight"]
        modules = name_tied_modules(modules)
    if missing := [module for module in modules if not match_saved_parameters(names, [module])]:
        paths = [name.rpartition(".")[0] for name in names]
        fix = f"use names from: {', '.join(_list_module_names(paths))}"
        message = f"no module with weights has a path that ends in {', '.join(missing)}"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
    selected = match_saved_parameters(names, modules)
    if f"{HEAD}.bias" in selected:
        message = f"{HEAD} has a bias, which cannot be trained"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=f"leave {HEAD} out")
    return selected


def _build_block_matcher(block: str) -> Callable[[str], bool]:
    parent = re.compile(rf"(.*\.)?[a-z_]*{block}\.[^.]+")
    return lambda path: parent.fullmatch(path) is not None


GROUPS: dict[str, Callable[[str], bool]] = {
    "all-linear": lambda _path: True,
    "attention": _build_block_matcher("attn"),
    "mlp": _build_block_matcher("mlp"),
}
