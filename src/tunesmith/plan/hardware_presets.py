"""Machines that a plan can be made for without having one: `--target`, `--memory`.

In: the name of a GPU, alone or in a number (`8xh100`, `4x8xh100`), a size in bytes, and the machine
at hand. Out: the Machine to plan for. Memory is what the data sheet says in units of 10^9 bytes (a
card holds up to 7% more), rates are of dense bf16 products that accumulate in fp32. Links are those
of the data sheet in one direction, times a share that collectives reach. Left out: cards without
bf16, and how the GPUs share a run (mesh.py)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.hardware import parse_version
from tunesmith.core.types import Machine

ASSUMED_VERSION = "assumed"  # version of a library that a target is assumed to have
MIN_GPU_TORCH = "2.8"  # from here on, its operators of flash attention are those that are called


@dataclass(frozen=True)
class HardwarePreset:
    """A GPU and its data sheet. Links are bytes per second and GPU, as collectives reach them."""

    title: str
    memory_bytes: int
    flops: float  # dense bf16 operations per second
    bandwidth: float  # bytes per second
    link: float  # between the GPUs of a node
    network: float  # between nodes
    link_source: str


# how the machines with a kind of card are usually wired: GB/s in one direction inside a node (data
# sheets count NVLink in both), Gb/s between nodes, and the shares that collectives reach, which are
# assumed
NETWORK_SHARE = 0.8
LINKS = {
    "NVLink 3": (300, 0.78, 200, "NVLink 3, 600 GB/s; DGX A100: 200 Gb/s per GPU"),
    "NVLink 4": (450, 0.78, 400, "NVLink 4, 900 GB/s; DGX H100: 400 Gb/s per GPU"),
    "NVLink 5": (900, 0.78, 400, "NVLink 5, 1.8 TB/s; DGX B200: 400 Gb/s per GPU"),
    "PCIe 4": (32, 0.69, 25, "PCIe 4.0 x16; 25 Gb/s per GPU between nodes is assumed"),
    "PCIe 5": (64, 0.69, 25, "PCIe 5.0 x16; 25 Gb/s per GPU between nodes is assumed"),
}
# name -> title, GB, bf16 TFLOP/s, GB/s, links: data sheets of NVIDIA; white papers of GA102 (3090),
# Ada (4090) and RTX Blackwell (5090)
DATA_SHEETS = {
    "l4": ("NVIDIA L4", 24, 121, 300, "PCIe 4"),
    "rtx3090": ("GeForce RTX 3090", 24, 71, 936, "PCIe 4"),
    "rtx4090": ("GeForce RTX 4090", 24, 165.2, 1008, "PCIe 4"),
    "rtx5090": ("GeForce RTX 5090", 32, 209.5, 1792, "PCIe 5"),
    "a100-40gb": ("A100 40GB SXM", 40, 312, 1555, "NVLink 3"),
    "l40s": ("NVIDIA L40S", 48, 362, 864, "PCIe 4"),
    "a100-80gb": ("A100 80GB SXM", 80, 312, 2039, "NVLink 3"),
    "h100": ("H100 80GB SXM", 80, 989, 3350, "NVLink 4"),
    "h200": ("H200 SXM", 141, 989, 4800, "NVLink 4"),
    "b200": ("B200 SXM", 180, 2250, 8000, "NVLink 5"),
}


def _make_preset(
    title: str, gigabytes: int, teraflops: float, bandwidth: float, links: str
) -> HardwarePreset:
    link, share, network, source = LINKS[links]
    return HardwarePreset(
        title=title,
        memory_bytes=gigabytes * 10**9,
        flops=teraflops * 1e12,
        bandwidth=bandwidth * 1e9,
        link=share * link * 1e9,
        network=NETWORK_SHARE * network * 1e9 / 8,
        link_source=source,
    )


HARDWARE_PRESETS = {name: _make_preset(*row) for name, row in DATA_SHEETS.items()}
PRESET_NAMES = {preset.title: name for name, preset in HARDWARE_PRESETS.items()}
SIZE_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
UNIT_PREFIXES = " KMGT"
# nodes x GPUs x card; the numbers may be left out
TARGET_PATTERN = re.compile(r"(?:(?:(\d{1,4})x)?(\d{1,4})x)?([a-z][a-z0-9-]*)")
MAX_GPUS_PER_NODE = 16
TARGET_FORMS = "write the GPUs of a node as 8xh100, and several nodes as 4x8xh100"


@dataclass(frozen=True)
class Target:
    """GPUs to plan for: `num_gpus` in each of `num_nodes` nodes."""

    name: str  # of the preset
    num_gpus: int = 1
    num_nodes: int = 1

    @property
    def preset(self) -> HardwarePreset:
        return HARDWARE_PRESETS[self.name]

    def __str__(self) -> str:
        if self.num_nodes > 1:
            return f"{self.num_nodes}x{self.num_gpus}x{self.name}"
        return f"{self.num_gpus}x{self.name}" if self.num_gpus > 1 else self.name


def choose_machine(
    local_machine: Machine, target_name: str | None, memory_limit: str | None
) -> Machine:
    """Return the machine to plan for: this one, or a target, with at most `memory_limit` free.

    All memory of a target is free; it has the software of this machine, and bitsandbytes. Memory is
    that of one GPU. Raises InputError for an unknown name or size."""
    machine = local_machine
    if target_name is not None:
        machine = make_machine(local_machine, parse_target(target_name))
    if memory_limit is None:
        return machine
    available_bytes = min(parse_size(memory_limit), machine.available_bytes)
    return dataclasses.replace(machine, available_bytes=available_bytes)


def parse_target(text: str) -> Target:
    """Parse `h100`, `8xh100` or `4x8xh100` (nodes x GPUs x card). Raises InputError."""
    words = text.lower().replace("_", "-").replace(" ", "")
    match = TARGET_PATTERN.fullmatch(words)
    if match is None or match[3] not in HARDWARE_PRESETS:
        fix = f"use one of {', '.join(HARDWARE_PRESETS)}; {TARGET_FORMS}"
        raise InputError(f"unknown machine: {text!r:.80}", where="--target", fix=fix)
    num_nodes = int(match[1] or 1)
    num_gpus = int(match[2] or 1)
    if not (1 <= num_gpus <= MAX_GPUS_PER_NODE and num_nodes):
        raise InputError(
            f"{text!r:.80} has {num_gpus} GPUs in each of {num_nodes} nodes",
            where="--target",
            fix=f"a node has 1 to {MAX_GPUS_PER_NODE} GPUs: {TARGET_FORMS}",
        )
    return Target(match[3], num_gpus, num_nodes)


def match_preset(machine: Machine) -> HardwarePreset | None:
    """Return the preset of the GPUs that a machine was made from, if any."""
    name = PRESET_NAMES.get(machine.device_name)
    return None if name is None else HARDWARE_PRESETS[name]


def list_machines(local_machine: Machine) -> dict[str, Machine]:
    """Return a machine for each preset, the smallest first."""
    return {name: make_machine(local_machine, Target(name)) for name in HARDWARE_PRESETS}


def describe_target(machine: Machine) -> str:
    """Return the name by which a machine that was made from a preset is a target."""
    name = PRESET_NAMES[machine.device_name]
    return str(Target(name, machine.num_gpus, max(1, machine.num_nodes)))


def assume_bitsandbytes(machine: Machine) -> Machine:
    """Return the machine with bitsandbytes, whether it is installed or not."""
    versions = {"bitsandbytes": ASSUMED_VERSION} | machine.versions
    return dataclasses.replace(machine, versions=versions)


def find_missing_for_triton(machine: Machine) -> str:
    """Return what our kernels for GPUs lack on this one, which then runs plain torch; empty if they
    run. Triton compiles how it calls them with a C compiler and Python's headers."""
    if machine.device != "cuda" or not machine.gpu_software:  # a preset has everything
        return ""
    if machine.gpu_software.startswith("ROCm"):
        return "a GPU of NVIDIA"
    if "triton" not in machine.versions:
        return "the package triton"
    if not machine.compiler:
        return "a C compiler"
    return "" if machine.has_python_headers else "Python's headers (such as python3-dev)"


def find_old_torch(machine: Machine) -> str:
    """Return the version of torch if it is older than MIN_GPU_TORCH on a GPU of this machine."""
    version = machine.versions.get("torch", MIN_GPU_TORCH)
    is_here = machine.device == "cuda" and bool(machine.gpu_software)  # and no preset
    return version if is_here and parse_version(version) < parse_version(MIN_GPU_TORCH) else ""


def make_machine(local_machine: Machine, target: Target) -> Machine:
    """Return the machine of a target, with the software and the disk of this one."""
    preset = target.preset
    return dataclasses.replace(
        assume_bitsandbytes(local_machine),
        device="cuda",
        device_name=preset.title,
        memory_bytes=preset.memory_bytes,
        available_bytes=preset.memory_bytes,
        has_bf16_matmul=True,
        num_gpus=target.num_gpus,
        num_nodes=target.num_nodes,
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
