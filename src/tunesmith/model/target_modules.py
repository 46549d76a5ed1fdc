"""Which linear layers `lora_target_modules` means.

In: the paths of a model's linears and the user's words. Out: the chosen paths. A word is
all-linear, attention or mlp; a list holds names, as q_proj or layers.0.mlp.up_proj; any other text
is a regular expression for whole paths, as in PEFT. It is a stranger's program, and Python's own
`re`, which is what PEFT takes, knows no time limit: so it runs in a process that can be ended.
Loads no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
    """The linears inside the decoder, by the names and shapes in the files of a model."""
    matrices = [
        name
        for name, tensor in headers.items()
        if ".layers." in f".{name}" and len(tensor.shape) == 2
    ]
    return [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]


def select_targets(
    paths: Sequence[str], targets: str | Sequence[str], *, seconds: float = REGEX_TIMEOUT_SECONDS
) -> list[str]:
    """The paths that `targets` means, in their order. InputError when a part of it means none, or
    when a regular expression is none or takes longer than `seconds`."""
    if not isinstance(targets, str):
        return _match_names(paths, targets)
    is_target = GROUPS.get(targets)
    chosen = (
        [path for path in paths if is_target(path)]
        if is_target
        else _match_regex(paths, targets, seconds)
    )
    if not chosen:
        message = f"no linear layer {'belongs to' if is_target else 'has a whole path that matches'} {targets}"
        fix = f"a path is like {paths[0]}; for names write a list: [{', '.join(_list_module_names(paths))}]"
        raise InputError(message, where=SETTING, fix=fix)
    return chosen


def _match_names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    matches = {name: [p for p in paths if p == name or p.endswith("." + name)] for name in names}
    if missing := [name for name, matched in matches.items() if not matched]:
        fix = f"use {', '.join(GROUPS)}, or names from: {', '.join(_list_module_names(paths))}"
        raise InputError(f"no linear layer is called {', '.join(missing)}", where=SETTING, fix=fix)
    chosen = {path for matched in matches.values() for path in matched}
    return [path for path in paths if path in chosen]


def _match_regex(paths: Sequence[str], pattern: str, seconds: float) -> list[str]:
    command, payload = (
        [sys.executable, "-I", "-S", "-c", MATCHER_SCRIPT],
        json.dumps([pattern, list(paths)]),
    )
    try:
        completed = subprocess.run(
            command, input=payload, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        message = f"the regular expression {pattern:.200} takes more than {seconds:g} s on {len(paths):,} paths"
        fix = "it may try too many ways to match: avoid repeats inside repeats, or write a list of names"
        raise InputError(message, where=SETTING, fix=fix) from error
    if completed.returncode:
        reason = completed.stderr.strip().rpartition("\n")[2]
        raise InputError(
            f"{pattern:.200} is no regular expression: {reason}", where=SETTING, fix="correct it"
        )
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
