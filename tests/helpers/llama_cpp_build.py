"""llama.cpp, compiled once from the sources of `llama-cpp-python` and kept as a wheel in
tunesmith's cache.

    llama_cpp_site(folder) -> a folder to import `llama_cpp` from

Only what the tests need is built: the library for this CPU, no tools, no network code, no images.
That takes longer than all other slow tests together, so it is done only when asked for: `make
llama` sets TUNESMITH_BUILD_LLAMA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.model.hub.resolve import find_cache_dir

REQUIREMENT = "llama-cpp-python>=0.3.30,<0.4"
LEFT_OUT = (
    "LLAVA_BUILD",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_TOOLS",
    "LLAMA_BUILD_SERVER",
)
LEFT_OUT += ("LLAMA_CURL", "LLAMA_OPENSSL", "GGML_OPENMP")
OPTIMISED = ("CMAKE_C_FLAGS_RELEASE=-O2", "CMAKE_CXX_FLAGS_RELEASE=-O1")
NO_REGISTRY = (
    "No matching distribution",
    "Could not find a version",
    "Connection",
    "Temporary failure",
)


def install_llama_cpp(folder: Path) -> Path:
    """Skips where it is not kept and was not asked for, and where there is no C++ compiler or no
    package registry; a build that fails is a failed test."""
    wheels = find_cache_dir().parent / "wheels"
    if not list(wheels.glob("llama_cpp_python-*.whl")):
        if not os.environ.get("TUNESMITH_BUILD_LLAMA"):
            pytest.skip("llama.cpp is not compiled yet: make llama")
        if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("llama.cpp cannot be compiled here: there is no C++ compiler")
        flags = [*(f"{name}=OFF" for name in LEFT_OUT), *OPTIMISED]
        built = {
            "CMAKE_ARGS": " ".join(f"-D{flag}" for flag in flags),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        }
        run_pip(
            ["wheel", "--no-binary", "llama-cpp-python", "--wheel-dir", str(wheels), REQUIREMENT],
            **built,
        )
    (wheel,) = wheels.glob("llama_cpp_python-*.whl")
    run_pip(["install", "--target", str(folder), str(wheel), "diskcache"])
    return folder


def run_pip(words: list[str], **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        words[0],
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        *words[1:],
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode and any(said in done.stderr for said in NO_REGISTRY):
        pytest.skip(f"llama.cpp cannot be fetched here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
