"""Compile the C kernels, once per machine, and call them.

In: the C files beside it. Out: the shared library in the user's cache, whose name is a hash of the
sources, compiler, flags, threads and processor, with its sha256 in a second file; None without a C
compiler, or if compiling or loading fails. Left out: which operation uses a kernel (ops.py,
lora.py, scan.py)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunesmith.core.atomic import fsync_path, hash_file
from tunesmith.core.hardware import find_compiler

logger = logging.getLogger("tunesmith.model.kernels")

SOURCE_NAMES = (
    "kernels.c",
    "attention.c",
    "decode.c",
    "lora.c",
    "matmul.c",
    "layers.c",
    "convolution.c",
    "recurrence.c",
)
SOURCES = tuple(Path(__file__).with_name(name) for name in SOURCE_NAMES)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "products.h", "steps.h"))
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
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


@dataclass(frozen=True)
class Kernels:
    """`sources` is a hash of the sources and the compiler flags, `sha256` that of the library.
    Without a library, `problem` says why."""

    library: ctypes.CDLL | None
    sources: str = ""
    sha256: str = ""
    has_threads: bool = False
    problem: str = ""

    def describe(self) -> str:
        """Return what decides the results of a run on the same processor and compiler."""
        if self.library is None:
            return "none"
        threads = "OpenMP threads" if self.has_threads else "a single thread"
        return f"compiled from {self.sources[:16]}, {threads}"


def load_library() -> ctypes.CDLL | None:
    return load_kernels().library


@functools.cache
def load_kernels() -> Kernels:
    """Return the compiled kernels, without a library where they cannot be compiled. They use
    threads if torch's own OpenMP can be shared.

    A cached library is loaded only if it is as it was compiled: a truncated one would end the
    process with SIGBUS, and a changed one would compute something else."""
    kernels = _load_or_compile()
    if kernels.library is None:
        logger.warning(describe_reference(kernels))
    return kernels


def describe_reference(kernels: Kernels) -> str:
    """Return the warning about a process without kernels."""
    return (
        f"bf16 on this CPU is computed by plain torch, which is slower and rounds differently: "
        f"{kernels.problem}"
    )


def _load_or_compile() -> Kernels:
    compiler = find_compiler()
    if compiler is None:
        return Kernels(None, problem="there is no C compiler: cc, gcc or clang")
    _share_torch_openmp()
    sources = _hash_texts([*(file.read_text() for file in (*SOURCES, *HEADERS)), *FLAGS])
    problem = ""
    with ExitStack() as stack:
        folder = _open_cache_dir(stack)
        for has_threads in (True, False):
            key = _hash_texts([sources, _describe_processor(), compiler, str(has_threads)])
            target = folder / f"kernels-{key[:16]}.so"
            try:
                sha256 = _hash_intact(target) or _compile_library(compiler, target, has_threads)
                return Kernels(ctypes.CDLL(str(target)), sources, sha256, has_threads)
            except OSError as error:
                # without OpenMP in this process, only the version without threads can be loaded
                problem = " ".join(str(error).split())[:200]
    return Kernels(None, problem=f"the kernels cannot be compiled: {problem}")


def _hash_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# ---------------------------------------------------------------- the cache


def _open_cache_dir(stack: ExitStack) -> Path:
    """Return the cache folder, which only this user can write; a temporary folder if the cache
    cannot be written or belongs to another user."""
    folder = get_cache_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            if status.st_mode & WRITABLE_BY_OTHERS:
                folder.chmod(0o700)
            if os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-kernels-")))


def _get_checksum_path(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _hash_intact(target: Path) -> str:
    """Return the sha256 of a cached library, "" if it must be compiled again: it is missing,
    differs from its checksum, or could have been written by another user."""
    checksum_file = _get_checksum_path(target)
    try:
        for file in (target, checksum_file):
            status = file.lstat()
            is_safe = status.st_uid == os.getuid() and not status.st_mode & WRITABLE_BY_OTHERS
            if not (stat.S_ISREG(status.st_mode) and is_safe):
                return ""
        sha256 = hash_file(target)
        return sha256 if checksum_file.read_bytes() == f"{sha256}\n".encode() else ""
    except OSError:
        return ""


def _describe_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return platform.machine() + (flags.group() if flags else platform.processor())


def _compile_library(compiler: str, target: Path, has_threads: bool) -> str:
    """Compile the sources to `target`, with its checksum beside it, and return its sha256. Raises
    OSError if that fails.

    Objects are compiled with -fopenmp but linked without it: the symbols then resolve to torch's
    OpenMP, so that two thread pools do not compete for the cores."""
    program = str(Path(compiler).absolute())
    openmp_flags = ["-fopenmp"] if has_threads else []
    with tempfile.TemporaryDirectory(dir=target.parent.absolute()) as folder:
        objects: list[str] = []
        commands: list[list[str]] = []
        for source in SOURCES:
            object_file = str(Path(folder) / f"{source.stem}.o")
            objects.append(object_file)
            commands.append([program, *FLAGS, *openmp_flags, "-c", str(source), "-o", object_file])
        library = Path(folder) / target.name
        commands.append([program, "-shared", *objects, "-lm", "-o", str(library)])
        for command in commands:
            done = subprocess.run(command, capture_output=True, check=False, cwd=folder)
            if done.returncode:
                detail = done.stderr.decode(errors="replace").strip()
                raise OSError(f"{program} exits with {done.returncode}: {detail}")
        return _install_library(library, target)


def _install_library(library: Path, target: Path) -> str:
    """Move a library and its checksum into the cache, both forced to the disk first."""
    sha256 = hash_file(library)
    checksum_file = _get_checksum_path(library)
    checksum_file.write_text(f"{sha256}\n")
    for file in (library, checksum_file):
        file.chmod(0o600)
        fsync_path(file)
    os.replace(library, target)
    os.replace(checksum_file, _get_checksum_path(target))
    fsync_path(target.parent)
    return sha256


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
