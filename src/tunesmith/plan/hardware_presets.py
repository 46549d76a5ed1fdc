"""Machines that a plan can be made for without having one: `--target`, `--memory`.

In: the name of a GPU, a size in bytes, and the machine at hand. Out: the Machine to plan for.
Memory is what the data sheet says in units of 10^9 bytes (a card holds up to 7% more), rates are of
dense bf16 products that accumulate in fp32. Left out: several GPUs, and cards without bf16."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Machine

ASSUMED_VERSION = "assumed"  # version of a library that a target is assumed to have


@dataclass(frozen=True)
class HardwarePreset:
    """A GPU and its data sheet."""

    title: str
    memory_bytes: int
    flops: float  # dense bf16 operations per second
    bandwidth: float  # bytes per second
    source: str


def _make_preset(
    title: str, gigabytes: int, teraflops: float, gigabytes_per_second: float, source: str
) -> HardwarePreset:
    bandwidth = gigabytes_per_second * 1e9
    return HardwarePreset(title, gigabytes * 10**9, teraflops * 1e12, bandwidth, source)


HARDWARE_PRESETS = {
    "l4": _make_preset("NVIDIA L4", 24, 121, 300, "NVIDIA L4 data sheet"),
    "rtx3090": _make_preset("GeForce RTX 3090", 24, 71, 936, "NVIDIA Ampere GA102 white paper"),
    "rtx4090": _make_preset("GeForce RTX 4090", 24, 165.2, 1008, "NVIDIA Ada white paper"),
    "rtx5090": _make_preset(
        "GeForce RTX 5090", 32, 209.5, 1792, "NVIDIA RTX Blackwell white paper"
    ),
    "a100-40gb": _make_preset("A100 40GB SXM", 40, 312, 1555, "NVIDIA A100 data sheet"),
    "l40s": _make_preset("NVIDIA L40S", 48, 362, 864, "NVIDIA L40S data sheet"),
    "a100-80gb": _make_preset("A100 80GB SXM", 80, 312, 2039, "NVIDIA A100 data sheet"),
    "h100": _make_preset("H100 80GB SXM", 80, 989, 3350, "NVIDIA H100 data sheet"),
    "h200": _make_preset("H200 SXM", 141, 989, 4800, "NVIDIA H200 data sheet"),
    "b200": _make_preset("B200 SXM", 180, 2250, 8000, "NVIDIA HGX B200 data sheet"),
}
PRESET_NAMES = {preset.title: name for name, preset in HARDWARE_PRESETS.items()}
SIZE_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
UNIT_PREFIXES = " KMGT"


def choose_machine(
    local_machine: Machine, preset_name: str | None, memory_limit: str | None
) -> Machine:
    """Return the machine to plan for: this one, or a preset, with at most `memory_limit` free.

    All memory of a preset is free; it has the software of this machine, and bitsandbytes. Raises
    InputError for an unknown name or size."""
    machine = local_machine
    if preset_name is not None:
        machine = _make_machine(local_machine, find_preset(preset_name))
    if memory_limit is None:
        return machine
    available_bytes = min(parse_size(memory_limit), machine.available_bytes)
    return dataclasses.replace(machine, available_bytes=available_bytes)


def find_preset(name: str) -> HardwarePreset:
    key = name.lower().replace("_", "-").replace(" ", "")
    if key not in HARDWARE_PRESETS:
        fix = f"use one of {', '.join(HARDWARE_PRESETS)}"
        raise InputError(f"unknown machine: {name!r:.80}", where="--target", fix=fix)
    return HARDWARE_PRESETS[key]


def match_preset(machine: Machine) -> HardwarePreset | None:
    """Return the preset that a machine was made from, if any."""
    name = PRESET_NAMES.get(machine.device_name)
    return None if name is None else HARDWARE_PRESETS[name]


def list_machines(local_machine: Machine) -> dict[str, Machine]:
    """Return a machine for each preset, the smallest first."""
    return {name: _make_machine(local_machine, preset) for name, preset in HARDWARE_PRESETS.items()}


def assume_bitsandbytes(machine: Machine) -> Machine:
    """Return the machine with bitsandbytes, whether it is installed or not."""
    versions = {"bitsandbytes": ASSUMED_VERSION} | machine.versions
    return dataclasses.replace(machine, versions=versions)


def find_missing_for_triton(machine: Machine) -> str:
    """Return what our kernels for GPUs lack on this one, which then runs plain torch; empty if they
    run. Triton compiles how it calls them with a C compiler."""
    if machine.device != "cuda" or not machine.gpu_software:  # a preset has everything
        return ""
    if machine.gpu_software.startswith("ROCm"):
        return "a GPU of NVIDIA"
    if "triton" not in machine.versions:
        return "the package triton"
    return "" if machine.compiler else "a C compiler"


def _make_machine(local_machine: Machine, preset: HardwarePreset) -> Machine:
    return dataclasses.replace(
        assume_bitsandbytes(local_machine),
        device="cuda",
        device_name=preset.title,
        memory_bytes=preset.memory_bytes,
        available_bytes=preset.memory_bytes,
        has_bf16_matmul=True,
        num_gpus=1,
        gpu_software="",
        compute_capability="",
        unused_gpu="",
    )


def parse_size(text: str) -> int:
    """Bytes of `24GB` (10^9), `24GiB` (2^30), `512M`. Raises InputError."""
    match = SIZE_PATTERN.fullmatch(text.strip())
    size = 0
    if match is not None:
        number, unit, binary = match.groups()
        size = int(
            float(number) * (1024 if binary else 1000) ** UNIT_PREFIXES.index(unit.upper() or " ")
        )
    if match is None or not 10**6 <= size <= 10**15:
        raise InputError(
            f"{text!r:.80} is not a memory size",
            where="--memory",
            fix="write it as 24GB, 16GiB or 800MB",
        )
    return size
