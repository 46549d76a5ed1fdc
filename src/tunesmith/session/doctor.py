"""`tunesmith doctor`: what this machine has and lacks.

In: the folder in which runs would be written. Out: a Diagnosis. Left out: what a model needs
(`tunesmith plan --compare`), printing (cli/views/plan.py).
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import MachineError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.hardware import find_existing_parent, measure_machine, parse_version
from tunesmith.core.types import Machine
from tunesmith.model.hub.built_in import find_cache_dir
from tunesmith.plan.hardware_presets import MIN_GPU_TORCH, find_missing_for_triton

# in older versions, loading a model can run code from it: CVE-2026-4372 (transformers),
# CVE-2025-32434 (torch); the classes of model/hub/families.py are those of transformers 5.24
MIN_VERSIONS = {"python": "3.11", "torch": "2.6", "transformers": "5.24"}
# extra -> (its packages, what needs them)
EXTRAS = {
    "qlora": (("bitsandbytes",), "method: qlora, optim: adamw_8bit"),
    "fla": (("fla-core",), "gated delta layers on an NVIDIA GPU"),
    "audit": (
        ("datasketch", "py3langid", "scikit-learn"),
        "near duplicates and languages in data check, bag of words as a floor",
    ),
    "parquet": (("pyarrow",), "Parquet files"),
    "constrained": (("llguidance",), "answers that follow a JSON schema"),
    "serve": (("starlette", "uvicorn", "prometheus-client", "llguidance"), "tunesmith serve"),
    "sweep": (("optuna",), "tunesmith tune sweep"),
    "verify": (("httpx",), "tunesmith verify"),
    "tensorboard": (("tensorboardX",), "--track tensorboard"),
    "wandb": (("wandb",), "--track wandb"),
}
MODULES = {"fla-core": "fla", "scikit-learn": "sklearn"}  # of packages with another name
MIN_FREE_DISK_BYTES = 2 * 10**9


@dataclass(frozen=True)
class MachineCheck:
    """The result of a check. Without a required one nothing can be trained."""

    name: str
    is_ok: bool
    value: str
    is_required: bool = True
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    machine: Machine
    checks: tuple[MachineCheck, ...]
    cache_dir: Path

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks if check.is_required)


def diagnose(folder: Path = Path()) -> Diagnosis:
    """Check the machine; `folder` is where runs would be written."""
    machine = measure_machine(folder)
    checks = [
        *_check_versions(machine),
        *_check_gpu(machine),
        _check_compiler(machine),
        *_check_precision(machine),
        _check_disk(machine),
        _check_writable(folder),
        *_check_extras(),
    ]
    return Diagnosis(machine, tuple(checks), find_cache_dir())


def _check_versions(machine: Machine) -> list[MachineCheck]:
    checks: list[MachineCheck] = []
    min_versions = MIN_VERSIONS | ({"torch": MIN_GPU_TORCH} if machine.device == "cuda" else {})
    for package, min_version in min_versions.items():
        installed = machine.versions.get(package, "missing")
        is_ok = installed != "missing" and parse_version(installed) >= parse_version(min_version)
        fix = "" if is_ok else f"install {package} {min_version} or newer"
        checks.append(MachineCheck(package, is_ok, installed, fix=fix))
    return checks


def _check_gpu(machine: Machine) -> list[MachineCheck]:
    """Check the GPU that training would use; nothing on a machine that seems to have none."""
    if machine.unused_gpu:
        fix = "see docs/guides/gpu.md; until then, training runs on the CPU"
        return [MachineCheck("GPU", False, machine.unused_gpu, is_required=False, fix=fix)]
    if machine.device != "cuda":
        return []
    capability = machine.compute_capability
    parts = [
        machine.gpu_software,
        f"compute capability {capability}" if capability else "tunesmith has not been tried on it",
        f"{format_bytes(machine.available_bytes)} free",
        "bf16" if machine.has_bf16_matmul else "no bf16",
    ]
    if machine.num_gpus > 1:
        count = machine.num_gpus
        link = "directly" if machine.has_peer_access else "through main memory"
        parts.append(f"the first of {count}, `tunesmith train --gpus {count}` uses all")
        parts.append(f"which copy to each other {link}")
    is_ok = machine.has_bf16_matmul
    fix = "" if is_ok else "runs are planned in fp16, and those of Gemma in fp32"
    missing = find_missing_for_triton(machine)
    value = f"plain torch: they need {missing}" if missing else "compiled in the first step"
    triton_fix = f"with {missing}, a step moves a third of the bytes" if missing else ""
    return [
        MachineCheck("GPU", is_ok, ", ".join(parts), is_required=False, fix=fix),
        MachineCheck("GPU kernels", not missing, value, is_required=False, fix=triton_fix),
    ]


def _check_extras() -> list[MachineCheck]:
    """Check the optional packages; nothing is imported."""
    checks: list[MachineCheck] = []
    for extra, (packages, purpose) in EXTRAS.items():
        missing = [name for name in packages if find_spec(_get_module(name)) is None]
        value = f"{', '.join(missing)} not installed" if missing else ", ".join(packages)
        fix = f"pip install '.[{extra}]' in tunesmith's folder for {purpose}" if missing else ""
        checks.append(MachineCheck(f"extra {extra}", not missing, value, False, fix))
    return checks


def _get_module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def _check_compiler(machine: Machine) -> MachineCheck:
    problem = "none" if machine.compiler is None else _try_compiler(machine.compiler)
    fix = "install a C compiler (gcc or clang) for the faster CPU kernels" if problem else ""
    value = problem or str(machine.compiler)
    return MachineCheck("C compiler", not problem, value, is_required=False, fix=fix)


def _check_precision(machine: Machine) -> list[MachineCheck]:
    """Say what a CPU computes in; a GPU's line says it with its name."""
    if machine.device != "cpu":
        return []
    value = "bf16"
    if not machine.has_bf16_matmul:
        value = "fp32: no bf16 in hardware, so torch computes without the faster CPU kernels"
    return [MachineCheck("precision", True, value)]


def _try_compiler(compiler: str) -> str:
    """Compile a small library, and return the problem, "" if there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "sample.c"
        source.write_text("#include <math.h>\nfloat f(float x) { return sqrtf(x); }\n")
        library = Path(scratch) / "sample.so"
        command = [compiler, "-shared", "-fPIC", str(source), "-lm", "-o", str(library)]
        done = subprocess.run(command, capture_output=True, check=False, cwd=scratch)
        if done.returncode == 0 and library.is_file():
            return ""
    return f"{compiler} cannot compile: exit code {done.returncode}"


def _check_disk(machine: Machine) -> MachineCheck:
    is_ok = machine.disk_free_bytes >= MIN_FREE_DISK_BYTES
    free = f"{format_bytes(machine.disk_free_bytes)} free"
    fix = "" if is_ok else "free some disk space, or set output_dir to another disk"
    return MachineCheck("disk", is_ok, free, is_required=False, fix=fix)


def _check_writable(folder: Path) -> MachineCheck:
    """Write, fsync and rename a small file where runs would go, and read it back."""
    directory = find_existing_parent(folder)
    test_file = directory / ".tunesmith-doctor"
    try:
        write_file(test_file, b"written by tunesmith doctor")
        is_ok = test_file.read_bytes() == b"written by tunesmith doctor"
        test_file.unlink()
    except MachineError as error:
        fix = f"make {directory} writable"
        return MachineCheck("write, fsync, rename", False, error.message, fix=fix)
    return MachineCheck("write, fsync, rename", is_ok, str(directory))
