"""Compile the C kernels, once per machine, and call them.

In: kernels.c, attention.c, decode.c and lora.c. Out: the shared library in the user's cache, whose
name is a hash of the sources, the compiler flags and the processor; None without a C compiler. Left
out: which operation uses a kernel (ops.py)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

SOURCE_NAMES = ("kernels.c", "attention.c", "decode.c", "lora.c")
SOURCES = tuple(Path(__file__).with_name(name) for name in SOURCE_NAMES)
HEADER = Path(__file__).with_name("vectors.h")
# Reassociation lets the compiler vectorise sums. -ffast-math itself would break NaN detection and
# flush denormals in the whole process.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


def get_cache_dir() -> Path:
    """Return the folder of compiled kernels: in $TUNESMITH_CACHE, else in the XDG cache."""
    root = os.environ.get("TUNESMITH_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tunesmith"
    return Path(root).expanduser() / "kernels"


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the compiled kernels, None without a C compiler. They use threads if torch's own
    OpenMP can be shared."""
    compiler = None
    for name in (os.environ.get("CC", "cc"), "gcc", "clang"):
        compiler = compiler or shutil.which(name)
    if compiler is None:
        return None
    _share_torch_openmp()
    for use_openmp in (True, False):
        key_parts = [source.read_text() for source in (*SOURCES, HEADER)]
        key_parts += [*FLAGS, _describe_processor(), compiler, str(use_openmp)]
        key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:16]
        target = get_cache_dir() / f"kernels-{key}.so"
        if not target.exists() and not _compile_library(compiler, target, use_openmp):
            continue
        try:
            return ctypes.CDLL(str(target))
        except OSError:
            # this process has no OpenMP to resolve the symbols: the version without threads loads
            continue
    return None


def _describe_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return platform.machine() + (flags.group() if flags else platform.processor())


def _compile_library(compiler: str, target: Path, use_openmp: bool) -> bool:
    """Return whether the sources compile.

    Objects are compiled with -fopenmp but linked without it: the symbols then resolve to torch's
    OpenMP, so that two thread pools do not compete for the cores."""
    target.parent.mkdir(parents=True, exist_ok=True)
    openmp_flags = ["-fopenmp"] if use_openmp else []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects: list[str] = []
        commands: list[list[str]] = []
        for source in SOURCES:
            object_file = str(Path(folder) / f"{source.stem}.o")
            objects.append(object_file)
            commands.append([compiler, *FLAGS, *openmp_flags, "-c", str(source), "-o", object_file])
        library = str(Path(folder) / target.name)
        commands.append([compiler, "-shared", *objects, "-lm", "-o", library])
        for command in commands:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        os.replace(library, target)
    return True


def _share_torch_openmp() -> None:
    """Make the symbols of the OpenMP library that torch loaded visible to ours."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    loaded = re.findall(r"\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read_text())
    for library in sorted(set(loaded)):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def call_kernel(name: str, *arguments: Tensor | int | float) -> int:
    """Run a C function on contiguous tensors (passed as pointers), longs and floats."""
    converted: list[ctypes.c_void_p | ctypes.c_long | ctypes.c_float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous(), f"{name} takes contiguous tensors"
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        else:
            converted.append(ctypes.c_float(argument))
    return getattr(load_library(), name)(*converted)
