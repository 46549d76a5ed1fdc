"""What this machine has, lacks and can train: `tunesmith doctor`.

In: perhaps a model name, and the folder in which runs would be written. Out: a `Diagnosis`. The memory figures are a
rough rule for a pack of 2,048 tokens, good to tell "easily" from "never"; the plan of a run predicts its own.
Left out: printing, and the settings that a run would choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import size, write_file
from tunesmith.core.errors import MachineError
from tunesmith.core.hardware import existing_parent, measure_machine
from tunesmith.core.types import Machine, ModelSpec
from tunesmith.model.hub.resolve import cache_folder, resolve
from tunesmith.model.hub.spec import read_spec
from tunesmith.plan.memory import NF4_BYTES

# Below these, loading a model can run code from it: CVE-2026-4372 (transformers), CVE-2025-32434 (torch).
FLOORS = {"python": "3.11", "torch": "2.6", "transformers": "5.3"}
LITTLE_DISK = 2 * 10**9
PACK_TOKENS = 2048
RUNTIME_BYTES = 700 * 10**6  # Python, torch and transformers themselves
LORA_RANK = 16


@dataclass(frozen=True)
class Check:
    """One thing looked at. `required`: without it nothing can be trained."""

    name: str
    ok: bool
    found: str
    required: bool = True
    fix: str = ""


@dataclass(frozen=True)
class Fit:
    """Roughly what training the model by `method` takes, and whether that is free now."""

    method: str
    needed_bytes: int
    fits: bool


@dataclass(frozen=True)
class Diagnosis:
    machine: Machine
    checks: tuple[Check, ...]
    cache: Path
    model: ModelSpec | None = None
    fits: tuple[Fit, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks if check.required)


def diagnose(
    model: str | None = None, *, folder: Path = Path(), report: Callable[[str], None] | None = None
) -> Diagnosis:
    """Look at the machine, and at `model` if one is named; it is fetched if need be, `report` says so.

    `folder` is where runs would be written. InputError or MachineError when the model cannot be had.
    """
    machine = measure_machine(folder)
    checks = (*_versions(machine), _compiler(machine), _disk(machine), _writes(folder))
    if model is None:
        return Diagnosis(machine, checks, cache_folder())
    spec = read_spec(resolve(model, report=report), name=model)
    fits = tuple(_fit(machine, method, bytes_for(spec)) for method, bytes_for in METHODS.items())
    return Diagnosis(machine, (*checks, *_tokenizer(spec)), cache_folder(), spec, fits)


def _versions(machine: Machine) -> tuple[Check, ...]:
    checks = []
    for package, floor in FLOORS.items():
        found = machine.versions.get(package, "missing")
        ok = found != "missing" and _numbers(found) >= _numbers(floor)
        checks.append(Check(package, ok, found, fix="" if ok else f"install {package} {floor} or newer"))
    return tuple(checks)


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13); enough to compare with the floors."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _compiler(machine: Machine) -> Check:
    found = machine.compiler or "none"
    fix = "" if machine.compiler else "install a C compiler (gcc or clang) for the faster CPU kernels"
    return Check("C compiler", machine.compiler is not None, found, required=False, fix=fix)


def _disk(machine: Machine) -> Check:
    ok = machine.disk_free_bytes >= LITTLE_DISK
    fix = "" if ok else "free some room, or set output_dir to another disk"
    return Check("disk", ok, f"{size(machine.disk_free_bytes)} free", required=False, fix=fix)


def _writes(folder: Path) -> Check:
    """Write, fsync and rename a small file where runs would go, and read it back."""
    place = existing_parent(folder)
    probe = place / ".tunesmith-doctor"
    try:
        write_file(probe, b"written by tunesmith doctor")
        ok = probe.read_bytes() == b"written by tunesmith doctor"
        probe.unlink()
    except MachineError as error:
        return Check("write, fsync, rename", False, error.what, fix=f"get the right to write in {place}")
    return Check("write, fsync, rename", ok, str(place))


def _tokenizer(spec: ModelSpec) -> tuple[Check, ...]:
    tokenizer = (spec.path / "tokenizer.json").is_file()
    config = spec.path / "tokenizer_config.json"
    template = (spec.path / "chat_template.jinja").is_file() or (
        config.is_file() and b'"chat_template"' in config.read_bytes()
    )
    no_template = "give template: in the recipe, or train on prompt/completion or plain text"
    return (
        Check("tokenizer", tokenizer, "tokenizer.json" if tokenizer else "no tokenizer.json"),
        Check("chat template", template, "found" if template else "none", False, "" if template else no_template),
    )


def _fit(machine: Machine, method: str, needed: int) -> Fit:
    return Fit(method, needed, needed <= machine.available_bytes)


def _activation_bytes(spec: ModelSpec) -> int:
    """bf16 values kept for the backward pass: about 10 of the hidden and 4 of the inner size per token and layer."""
    kept = PACK_TOKENS * spec.num_layers * (10 * spec.hidden_size + 4 * spec.intermediate_size) * 2
    logits = min(PACK_TOKENS, 512) * spec.vocab_size * 4 * 2  # one chunk of the head, and its gradient
    return kept + logits


def _lora_bytes(spec: ModelSpec) -> int:
    """bf16 weights, and fp32 masters, gradients and two moments for rank-16 adapters on all linear layers."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ends = 2 * (spec.hidden_size + q) + 2 * (spec.hidden_size + kv) + 3 * (spec.hidden_size + spec.intermediate_size)
    adapters = spec.num_layers * LORA_RANK * ends
    return RUNTIME_BYTES + 2 * spec.parameters + 16 * adapters + _activation_bytes(spec)


def _qlora_bytes(spec: ModelSpec) -> int:
    """As LoRA, with the matrices of the decoder in 4 bits and one of them widened."""
    saved = (2 - NF4_BYTES) * spec.block_parameters - 2 * spec.hidden_size * spec.intermediate_size
    return _lora_bytes(spec) - int(saved)


def _full_bytes(spec: ModelSpec) -> int:
    """bf16 weights and gradients, and fp32 masters and two moments for every parameter."""
    return RUNTIME_BYTES + (2 + 2 + 4 + 8) * spec.parameters + _activation_bytes(spec)


METHODS = {"lora": _lora_bytes, "qlora": _qlora_bytes, "full": _full_bytes}
