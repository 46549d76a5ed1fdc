"""What the machine has (`measure_machine`), and the memory of this process.

In: the folder in which a run would write. Out: plain numbers. Memory, cores and disk are psutil's,
cut by the cgroup limits of a container, which psutil ignores. torch is imported only where device
files of a GPU exist, since its import takes seconds. Left out: what fits (`plan/memory.py`), and
Windows outside WSL.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil

from tunesmith.core.mesh import Machine

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
    "triton",
    "fla-core",
)
WSL_FILE = "/dev/dxg"
NVIDIA_FILES = ("/dev/nvidia0", "/dev/nvidiactl", WSL_FILE)
AMD_FILE = "/dev/kfd"
# blocks of memory of a GPU that grow: packs of ever new sizes leave fewer gaps
ALLOCATOR_SETTING = "expandable_segments:True"
ALLOCATOR_ENV = "PYTORCH_ALLOC_CONF"
OLD_ALLOCATOR_ENV = "PYTORCH_CUDA_ALLOC_CONF"  # the only one before torch 2.9
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM
COMPILERS = ("cc", "gcc", "clang")


def measure_machine(folder: Path) -> Machine:
    """Measure the machine as it is now.

    `folder` need not exist yet; its disk is the one measured. Memory is that of the GPU if there is
    one, else main memory."""
    machine = _measure_gpu(folder)
    if machine is not None:
        return machine
    total, available = read_main_memory()
    return Machine(
        device="cpu",
        device_name=read_processor_name(),
        cores=count_cores(),
        memory_bytes=total,
        available_bytes=available,
        disk_free_bytes=read_free_disk(folder),
        has_bf16_matmul=bool(BF16_FLAGS & _read_processor_flags()),
        compiler=find_compiler(),
        versions=collect_versions(),
        unused_gpu=_explain_unused_gpu(),
    )


def read_main_memory() -> tuple[int, int]:
    """Return the total and the available main memory in bytes, within the cgroup limits."""
    memory = psutil.virtual_memory()
    total = memory.total
    available = memory.available
    for limit, used in _read_cgroup_limits(_find_cgroup_folders()):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return total, available


def read_free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return psutil.disk_usage(str(find_existing_parent(folder))).free


def count_cores() -> int:
    """Return how many cores this process may use: its affinity, cut by its cgroup's CPU quota."""
    process = psutil.Process()
    # macOS has no affinity
    has_affinity = hasattr(process, "cpu_affinity")
    cores = len(process.cpu_affinity()) if has_affinity else psutil.cpu_count() or 1
    for folder in _find_cgroup_folders():
        quota = _read_text(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def count_gpus() -> int:
    """Return how many GPUs torch sees. No CUDA context is made for it, which takes half a gigabyte
    of a GPU for as long as the process lives."""
    if not any(map(os.path.exists, (*NVIDIA_FILES, AMD_FILE))):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def read_processor_name() -> str:
    """Return the model name of the processor, or the architecture if it is unknown."""
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_compiler() -> str | None:
    """Return the path of the C compiler: $CC, else the first of cc, gcc and clang."""
    for name in (os.environ.get("CC", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def has_python_headers() -> bool:
    """Return whether a C compiler finds Python.h, which some distributions package apart."""
    return Path(str(sysconfig.get_config_var("INCLUDEPY")), "Python.h").exists()


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def parse_version(version: str) -> tuple[int, ...]:
    """Return the first two numbers: 2.13.0+cpu -> (2, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def read_peak_bytes(device: str = "cpu") -> int:
    """Return the peak memory of this process in bytes, since its start or `reset_peak`.

    On "cuda", that is the memory of the GPU that torch has reserved; the CUDA context comes on
    top."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    peak = _read_key_values(Path("/proc/self/status")).get("VmHWM")
    if peak is not None:
        return peak * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def reset_peak() -> bool:
    """Restart `read_peak_bytes` from the current memory. Returns False if the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_memory() -> None:
    """Return freed memory to the system.

    glibc keeps what small blocks were freed for later small ones, and large buffers do not reuse
    it: after training, the KV cache of an evaluation came on top of the activations. Other C
    libraries do this themselves. torch keeps freed memory of a GPU in blocks of the sizes that were
    asked for."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def set_allocator() -> None:
    """Set how torch takes memory of a GPU, unless the user has. torch reads it once, with the first
    call that needs the driver. In WSL, drivers before R615 fail at the first memory that grows
    (pytorch#192330), so it stays as it is."""
    names = (ALLOCATOR_ENV, OLD_ALLOCATOR_ENV)
    if not os.environ.keys() & set(names) and not os.path.exists(WSL_FILE):
        is_old = parse_version(importlib.metadata.version("torch")) < (2, 9)
        os.environ[names[is_old]] = ALLOCATOR_SETTING


def read_free_gpu_bytes() -> int:
    """Return the bytes of the GPU that this process can still take."""
    import torch

    return torch.cuda.mem_get_info()[0]


def upload(values: Any, device: Any, dtype: Any = None) -> Any:
    """Return a tensor of these numbers (a list, an array, a CPU tensor) on a device.

    A GPU gets them from memory that the system keeps in place: the copy is queued, and this process
    goes on. From other memory torch copies only after the GPU has done all of its work so far."""
    import torch

    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cpu":
        return tensor
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def find_existing_parent(folder: Path) -> Path:
    """Return `folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _measure_gpu(folder: Path) -> Machine | None:
    """Measure the machine with the CUDA device of this process, if it has one: the first one, or
    that of its local rank. Asking for another one would take half a gigabyte there."""
    num_gpus = count_gpus()
    if not num_gpus:
        return None
    import torch

    set_allocator()
    try:
        device = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(device)
    # another process has it for itself, or all of its memory
    except (RuntimeError, torch.cuda.DeferredCudaCallError):
        return None
    neighbor = (device + 1) % num_gpus
    hip_version = torch.version.hip
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(
        device="cuda",
        device_name=torch.cuda.get_device_name(device),
        cores=count_cores(),
        memory_bytes=total,
        available_bytes=free,
        disk_free_bytes=read_free_disk(folder),
        has_bf16_matmul=torch.cuda.is_bf16_supported(including_emulation=False),
        compiler=find_compiler(),
        versions=collect_versions(),
        num_gpus=num_gpus,
        has_peer_access=num_gpus > 1 and torch.cuda.can_device_access_peer(device, neighbor),
        gpu_software=f"ROCm {hip_version}" if hip_version else f"CUDA {torch.version.cuda}",
        compute_capability="" if hip_version else f"{major}.{minor}",
        has_python_headers=has_python_headers(),
    )


def _explain_unused_gpu() -> str:
    """Say why a GPU that this machine seems to have is not used; empty if it seems to have none."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Apple GPUs (MPS) are not supported: training runs on the CPU"
    if any(map(os.path.exists, NVIDIA_FILES)):
        kind = "NVIDIA"
    elif os.path.exists(AMD_FILE):
        kind = "AMD"
    else:
        return ""
    import torch

    if kind == "NVIDIA" and torch.version.cuda is None:
        return "there is an NVIDIA GPU, but the installed torch is built without CUDA"
    if kind == "AMD" and torch.version.hip is None:
        return "there is an AMD GPU, but the installed torch is built without ROCm"
    try:
        torch.cuda.init()
        torch.cuda.mem_get_info()
    # no driver, one that is too old, no room for a CUDA context
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        problem = str(error).strip().partition("\n")[0]
        return f"there is an {kind} GPU, but torch cannot use it: {problem}"
    return f"there are files of an {kind} GPU, but torch finds no device"


def _read_processor_flags() -> set[str]:
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# limit, bytes in use, and the key of reclaimable file cache in memory.stat: cgroup v2 and v1
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _read_cgroup_limits(folders: list[Path]) -> list[tuple[int, int]]:
    """Return (limit, bytes in use) of each cgroup that has a limit. File cache counts as free."""
    limits: list[tuple[int, int]] = []
    for folder in folders:
        for limit_name, used_name, cache_key in CGROUP_FILES:
            limit = _read_text(folder / limit_name).strip()
            used = _read_text(folder / used_name).strip()
            if limit.isdigit() and used.isdigit():
                cache = _read_key_values(folder / "memory.stat").get(cache_key, 0)
                limits.append((int(limit), int(used) - cache))
    return limits


def _find_cgroup_folders() -> list[Path]:
    """Return the folders of this process's cgroups (versions 1 and 2) and of all their parents."""
    folders: list[Path] = []
    for line in _read_text(CGROUP_MEMBERSHIP).splitlines():
        _, controllers, cgroup_path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUP_ROOT / controllers
        cgroup_dir = root / cgroup_path.lstrip("/")
        # In a container the path may be the host's, which does not exist here; the root does.
        for folder in (cgroup_dir, *cgroup_dir.parents):
            if folder.is_relative_to(root) and folder.is_dir():
                folders.append(folder)
    return folders


def _read_key_values(path: Path) -> dict[str, int]:
    """Return the numbers of a file with lines like `VmHWM: 16 kB` or `inactive_file 4096`."""
    numbers: dict[str, int] = {}
    for line in _read_text(path).splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) > 1 and parts[1].isdigit():
            numbers[parts[0]] = int(parts[1])
    return numbers


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
