"""Machines that a plan can be made for without having one: `--target`, `--fit`.

In: the name of a GPU, a size in bytes, and the machine at hand. Out: the Machine to plan for. Memory is what the data
sheet says in units of 10^9 bytes (a card holds up to 7% more), rates are of dense bf16 products that accumulate in
fp32. Left out: several GPUs, and cards without bf16.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Machine

ASSUMED = "assumed"  # the version of what a target is taken to have


@dataclass(frozen=True)
class Target:
    """A GPU: memory in bytes, dense bf16 products in operations a second, memory bandwidth in bytes a second."""

    title: str
    memory_bytes: int
    flops: float
    bandwidth: float
    source: str


def _target(title: str, gigabytes: int, teraflops: float, gigabytes_a_second: float, source: str) -> Target:
    return Target(title, gigabytes * 10**9, teraflops * 1e12, gigabytes_a_second * 1e9, source)


TARGETS = {
    "l4": _target("NVIDIA L4", 24, 121, 300, "NVIDIA L4 data sheet"),
    "rtx3090": _target("GeForce RTX 3090", 24, 71, 936, "NVIDIA Ampere GA102 white paper"),
    "rtx4090": _target("GeForce RTX 4090", 24, 165.2, 1008, "NVIDIA Ada white paper"),
    "rtx5090": _target("GeForce RTX 5090", 32, 209.5, 1792, "NVIDIA RTX Blackwell white paper"),
    "a100-40gb": _target("A100 40GB SXM", 40, 312, 1555, "NVIDIA A100 data sheet"),
    "l40s": _target("NVIDIA L40S", 48, 362, 864, "NVIDIA L40S data sheet"),
    "a100-80gb": _target("A100 80GB SXM", 80, 312, 2039, "NVIDIA A100 data sheet"),
    "h100": _target("H100 80GB SXM", 80, 989, 3350, "NVIDIA H100 data sheet"),
    "h200": _target("H200 SXM", 141, 989, 4800, "NVIDIA H200 data sheet"),
    "b200": _target("B200 SXM", 180, 2250, 8000, "NVIDIA HGX B200 data sheet"),
}
NAMES = {target.title: name for name, target in TARGETS.items()}
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
UNITS = " KMGT"


def machine_for(here: Machine, target: str | None, fit: str | None) -> Machine:
    """The machine to plan for: `here` unless a target is named, with no more free memory than `fit`. A target is empty,
    and has the software of this machine and bitsandbytes. Raises InputError for an unknown name or size."""
    machine = here if target is None else _empty(here, find_target(target))
    if fit is None:
        return machine
    return dataclasses.replace(machine, available_bytes=min(read_size(fit), machine.available_bytes))


def find_target(name: str) -> Target:
    key = name.lower().replace("_", "-").replace(" ", "")
    if key not in TARGETS:
        raise InputError(f"no machine is called {name!r:.80}", where="--target", fix=f"use one of {', '.join(TARGETS)}")
    return TARGETS[key]


def target_of(machine: Machine) -> Target | None:
    """The row of the table that a machine is, if it is one."""
    name = NAMES.get(machine.device_name)
    return None if name is None else TARGETS[name]


def machines(here: Machine) -> dict[str, Machine]:
    """All of the table, the smallest first."""
    return {name: _empty(here, target) for name, target in TARGETS.items()}


def equipped(machine: Machine) -> Machine:
    """With the library that 4 and 8 bits need, whether it is installed or not."""
    return dataclasses.replace(machine, versions={"bitsandbytes": ASSUMED} | machine.versions)


def _empty(here: Machine, target: Target) -> Machine:
    return dataclasses.replace(
        equipped(here),
        device="cuda",
        device_name=target.title,
        memory_bytes=target.memory_bytes,
        available_bytes=target.memory_bytes,
        bf16_matmul=True,
    )


def read_size(text: str) -> int:
    """Bytes of `24GB` (10^9), `24GiB` (2^30), `512M`. Raises InputError."""
    match = SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** UNITS.index(unit.upper() or " "))
    if match is None or not 10**6 <= size <= 10**15:
        raise InputError(f"{text!r:.80} is no size of a memory", where="--fit", fix="write it as 24GB, 16GiB or 800MB")
    return size
