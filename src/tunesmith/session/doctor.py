"""What this machine has, lacks and can train: `tunesmith doctor`.

In: perhaps a model name, and the folder in which runs would be written. Out: a `Diagnosis`. The
memory figures are a rough rule for a pack of 2,048 tokens, good to tell "easily" from "never"; the
plan of a run predicts its own. Left out: printing, and the settings that a run would choose."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import MachineError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.hardware import find_existing_parent, measure_machine
from tunesmith.core.types import Machine, ModelSpec
from tunesmith.model.hub.resolve import find_cache_dir, resolve_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.plan.memory import NF4_BYTES

# Below these, loading a model can run code from it: CVE-2026-4372 (transformers), CVE-2025-32434
# (torch).
MIN_VERSIONS = {"python": "3.11", "torch": "2.6", "transformers": "5.3"}
MIN_FREE_DISK_BYTES = 2 * 10**9
PACK_TOKENS = 2048
RUNTIME_BYTES = 700 * 10**6  # Python, torch and transformers themselves
LORA_RANK = 16


@dataclass(frozen=True)
class MachineCheck:
    """One thing looked at. `required`: without it nothing can be trained."""

    name: str
    is_ok: bool
    value: str
    is_required: bool = True
    fix: str = ""


@dataclass(frozen=True)
class MemoryFit:
    """Roughly what training the model by `method` takes, and whether that is free now."""

    method: str
    needed_bytes: int
    has_enough_memory: bool


@dataclass(frozen=True)
class Diagnosis:
    machine: Machine
    checks: tuple[MachineCheck, ...]
    cache_dir: Path
    model: ModelSpec | None = None
    memory_fits: tuple[MemoryFit, ...] = ()

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks if check.is_required)


def diagnose(
    model: str | None = None, *, folder: Path = Path(), report: Callable[[str], None] | None = None
) -> Diagnosis:
    """Look at the machine, and at `model` if one is named; it is fetched if need be, `report` says
    so.

    `folder` is where runs would be written. InputError or MachineError when the model cannot be
    had."""
    machine = measure_machine(folder)
    checks = (
        *_check_versions(machine),
        _check_compiler(machine),
        _check_disk(machine),
        _check_writable(folder),
    )
    if model is None:
        return Diagnosis(machine, checks, find_cache_dir())
    spec = read_spec(resolve_model(model, report=report), name=model)
    fits = tuple(
        _estimate_fit(machine, method, estimate_bytes(spec))
        for method, estimate_bytes in MEMORY_ESTIMATORS.items()
    )
    return Diagnosis(machine, (*checks, *_check_tokenizer(spec)), find_cache_dir(), spec, fits)


def _check_versions(machine: Machine) -> tuple[MachineCheck, ...]:
    checks = []
    for package, min_version in MIN_VERSIONS.items():
        installed = machine.versions.get(package, "missing")
        is_ok = installed != "missing" and _parse_version(installed) >= _parse_version(min_version)
        checks.append(
            MachineCheck(
                package,
                is_ok,
                installed,
                fix="" if is_ok else f"install {package} {min_version} or newer",
            )
        )
    return tuple(checks)


def _parse_version(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13); enough to compare with the floors."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_compiler(machine: Machine) -> MachineCheck:
    compiler = machine.compiler or "none"
    fix = (
        "" if machine.compiler else "install a C compiler (gcc or clang) for the faster CPU kernels"
    )
    return MachineCheck(
        "C compiler", machine.compiler is not None, compiler, is_required=False, fix=fix
    )


def _check_disk(machine: Machine) -> MachineCheck:
    is_ok = machine.disk_free_bytes >= MIN_FREE_DISK_BYTES
    fix = "" if is_ok else "free some room, or set output_dir to another disk"
    return MachineCheck(
        "disk", is_ok, f"{format_bytes(machine.disk_free_bytes)} free", is_required=False, fix=fix
    )


def _check_writable(folder: Path) -> MachineCheck:
    """Write, fsync and rename a small file where runs would go, and read it back."""
    directory = find_existing_parent(folder)
    test_file = directory / ".tunesmith-doctor"
    try:
        write_file(test_file, b"written by tunesmith doctor")
        is_ok = test_file.read_bytes() == b"written by tunesmith doctor"
        test_file.unlink()
    except MachineError as error:
        return MachineCheck(
            "write, fsync, rename",
            False,
            error.message,
            fix=f"get the right to write in {directory}",
        )
    return MachineCheck("write, fsync, rename", is_ok, str(directory))


def _check_tokenizer(spec: ModelSpec) -> tuple[MachineCheck, ...]:
    has_tokenizer = (spec.path / "tokenizer.json").is_file()
    config = spec.path / "tokenizer_config.json"
    has_template = (spec.path / "chat_template.jinja").is_file() or (
        config.is_file() and b'"chat_template"' in config.read_bytes()
    )
    template_fix = "give template: in the recipe, or train on prompt/completion or plain text"
    return (
        MachineCheck(
            "tokenizer", has_tokenizer, "tokenizer.json" if has_tokenizer else "no tokenizer.json"
        ),
        MachineCheck(
            "chat template",
            has_template,
            "found" if has_template else "none",
            False,
            "" if has_template else template_fix,
        ),
    )


def _estimate_fit(machine: Machine, method: str, needed_bytes: int) -> MemoryFit:
    return MemoryFit(method, needed_bytes, needed_bytes <= machine.available_bytes)


def _estimate_activation_bytes(spec: ModelSpec) -> int:
    """bf16 values kept for the backward pass: about 10 of the hidden and 4 of the inner size per
    token and layer."""
    activations = (
        PACK_TOKENS * spec.num_layers * (10 * spec.hidden_size + 4 * spec.intermediate_size) * 2
    )
    logits = (
        min(PACK_TOKENS, 512) * spec.vocab_size * 4 * 2
    )  # one chunk of the head, and its gradient
    return activations + logits


def _estimate_lora_bytes(spec: ModelSpec) -> int:
    """bf16 weights, and fp32 masters, gradients and two moments for rank-16 adapters on all linear
    layers."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    in_out_sizes = (
        2 * (spec.hidden_size + q)
        + 2 * (spec.hidden_size + kv)
        + 3 * (spec.hidden_size + spec.intermediate_size)
    )
    adapters = spec.num_layers * LORA_RANK * in_out_sizes
    return RUNTIME_BYTES + 2 * spec.parameters + 16 * adapters + _estimate_activation_bytes(spec)


def _estimate_qlora_bytes(spec: ModelSpec) -> int:
    """As LoRA, with the matrices of the decoder in 4 bits and one of them widened."""
    saved_bytes = (
        2 - NF4_BYTES
    ) * spec.block_parameters - 2 * spec.hidden_size * spec.intermediate_size
    return _estimate_lora_bytes(spec) - int(saved_bytes)


def _estimate_full_bytes(spec: ModelSpec) -> int:
    """bf16 weights and gradients, and fp32 masters and two moments for every parameter."""
    return RUNTIME_BYTES + (2 + 2 + 4 + 8) * spec.parameters + _estimate_activation_bytes(spec)


MEMORY_ESTIMATORS = {
    "lora": _estimate_lora_bytes,
    "qlora": _estimate_qlora_bytes,
    "full": _estimate_full_bytes,
}
