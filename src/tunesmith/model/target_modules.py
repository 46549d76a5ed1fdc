"""Select the linear layers that `lora_target_modules` names.

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
pattern, paths = json.load(sys.stdin)
pattern = re.compile(pattern)
print(json.dumps([path for path in paths if pattern.fullmatch(path)]))
"""


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
        selected = _match_regex(paths, targets, seconds)
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


def _match_regex(paths: Sequence[str], pattern: str, seconds: float) -> list[str]:
    command = [sys.executable, "-I", "-S", "-c", MATCHER_SCRIPT]
    payload = json.dumps([pattern, list(paths)])
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
            f"the regular expression {pattern:.200} takes more than {seconds:g} s "
            f"on {len(paths):,} paths"
        )
        fix = "avoid nested repetition, or write a list of names"
        raise InputError(message, where=SETTING, fix=fix) from error
    if completed.returncode:
        reason = completed.stderr.strip().rpartition("\n")[2]
        message = f"{pattern:.200} is not a regular expression: {reason}"
        raise InputError(message, where=SETTING, fix="correct it")
    return json.loads(completed.stdout)


def _list_module_names(paths: Sequence[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _build_block_matcher(block: str) -> Callable[[str], bool]:
    parent = re.compile(rf"(.*\.)?[a-z_]*{block}\.[^.]+")
    return lambda path: parent.fullmatch(path) is not None


GROUPS: dict[str, Callable[[str], bool]] = {
    "all-linear": lambda _path: True,
    "attention": _build_block_matcher("attn"),
    "mlp": _build_block_matcher("mlp"),
}
