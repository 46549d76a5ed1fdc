"""What the machine has: `Machine`, and the memory that this process has taken.

In: the folder in which a run would write. Out: plain numbers, read from /proc, cgroups and the
operating system; torch is imported only where device files of a GPU exist, since its import takes
seconds. Where the system hides a number the fallback is said in the function. Left out: what fits
(`plan/memory.py`), the measured speed of the machine, and Windows outside WSL."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from pathlib import Path

from tunesmith.core.types import Machine

PACKAGES = (
    "tunesmith",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "peft",
    "bitsandbytes",
)
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last is WSL's
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM
COMPILERS = ("cc", "gcc", "clang")


def measure_machine(folder: Path) -> Machine:
    """The machine as it is now. `folder` need not exist yet; its disk is the one that counts.

    Memory is the device's: of the GPU where there is one, else main memory within the limits of the
    cgroup."""
    gpu = _probe_gpu()
    name, total, available, bf16 = gpu or (
        read_processor_name(),
        *read_main_memory(),
        bool(BF16_FLAGS & _read_processor_flags()),
    )
    return Machine(
        device="cuda" if gpu else "cpu",
        device_name=name,
        cores=count_cores(),
        memory_bytes=total,
        available_bytes=available,
        disk_free_bytes=shutil.disk_usage(find_existing_parent(folder)).free,
        has_bf16_matmul=bf16,
        compiler=find_compiler(),
        versions=collect_versions(),
    )


def read_main_memory() -> tuple[int, int]:
    """Main memory and how much of it is free, in bytes, within this process's cgroup limits.

    Outside Linux the free part is unknown and reported as all of it.
    """
    meminfo = _read_key_values(Path("/proc/meminfo"))
    if "MemTotal" in meminfo:
        total, available = (
            meminfo["MemTotal"] * 1024,
            meminfo.get("MemAvailable", meminfo["MemTotal"]) * 1024,
        )
    else:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _read_cgroup_limits(_find_cgroup_folders()):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def count_cores() -> int:
    """Cores that this process may use: its affinity, cut by the CPU quota of its cgroup."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _find_cgroup_folders():
        quota = _read_text(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def read_processor_name() -> str:
    """The model name of the processor, or the architecture where the system does not tell."""
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_compiler() -> str | None:
    """The path of the C compiler: $CC, else the first of cc, gcc and clang."""
    names = [os.environ.get("CC", ""), *COMPILERS]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def collect_versions() -> dict[str, str]:
    """Python, and the installed ones of the packages that a run depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_peak_bytes() -> int:
    """The most main memory that this process has held at once, in bytes, since its start or
    `reset_peak`."""
    peak = _read_key_values(Path("/proc/self/status")).get("VmHWM")
    if peak is not None:
        return peak * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def reset_peak() -> bool:
    """Start `peak_bytes` again from what is held now. False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def find_existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest parent of it that exists."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _probe_gpu() -> tuple[str, int, int, bool] | None:
    """Name, memory, free memory and bf16 of the first CUDA device; None without one."""
    if not any(os.path.exists(path) for path in GPU_FILES):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return (
        torch.cuda.get_device_name(0),
        total,
        free,
        torch.cuda.is_bf16_supported(including_emulation=False),
    )


def _read_processor_flags() -> set[str]:
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _read_cgroup_limits(folders: list[Path]) -> list[tuple[int, int]]:
    """(limit, bytes in use) of each cgroup that has a limit. Cached files count as free."""
    limits: list[tuple[int, int]] = []
    for folder in folders:
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = (
                _read_text(folder / limit_name).strip(),
                _read_text(folder / used_name).strip(),
            )
            if limit.isdigit() and used.isdigit():
                limits.append(
                    (int(limit), int(used) - _read_key_values(folder / "memory.stat").get(cache, 0))
                )
    return limits


def _find_cgroup_folders() -> list[Path]:
    """The folders of this process's cgroups (versions 1 and 2) and of all their parents."""
    folders: list[Path] = []
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, cgroup_path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        cgroup_dir = root / cgroup_path.lstrip("/")
        # In a container the path may be the host's, which is not there: then only the root counts.
        folders += [
            folder
            for folder in (cgroup_dir, *cgroup_dir.parents)
            if folder.is_relative_to(root) and folder.is_dir()
        ]
    return folders


def _read_key_values(path: Path) -> dict[str, int]:
    """The numbers of a file with lines like `MemTotal: 16 kB` or `inactive_file 4096`, units
    dropped."""
    split_lines = (line.replace(":", " ").split() for line in _read_text(path).splitlines())
    return {
        parts[0]: int(parts[1]) for parts in split_lines if len(parts) > 1 and parts[1].isdigit()
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
