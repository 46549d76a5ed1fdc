"""Build llama.cpp once from the sources of `llama-cpp-python`; the wheel is cached.

Only what the tests need is built: the library for this CPU, without tools, network code and images.
The build takes longer than all other slow tests together, so it needs TUNESMITH_BUILD_LLAMA, which
`make llama` sets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.model.hub.built_in import find_cache_dir

REQUIREMENT = "llama-cpp-python>=0.3.30,<0.4"
DISABLED = (
    "LLAVA_BUILD",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_TOOLS",
    "LLAMA_BUILD_SERVER",
)
DISABLED += ("LLAMA_CURL", "LLAMA_OPENSSL", "GGML_OPENMP")
OPTIMISED = ("CMAKE_C_FLAGS_RELEASE=-O2", "CMAKE_CXX_FLAGS_RELEASE=-O1")
NO_REGISTRY = (
    "No matching distribution",
    "Could not find a version",
    "Connection",
    "Temporary failure",
)


def install_llama_cpp(folder: Path) -> Path:
    """Install llama_cpp into `folder` and return it, to be put on the import path.

    Skips the test if there is no wheel and TUNESMITH_BUILD_LLAMA is not set, or no C++ compiler or
    package registry; a failing build fails the test.
    """
    wheels = find_cache_dir().parent / "wheels"
    if not list(wheels.glob("llama_cpp_python-*.whl")):
        if not os.environ.get("TUNESMITH_BUILD_LLAMA"):
            pytest.skip("llama.cpp is not compiled yet: make llama")
        if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("llama.cpp cannot be compiled here: there is no C++ compiler")
        flags = [*(f"{name}=OFF" for name in DISABLED), *OPTIMISED]
        environment = {
            "CMAKE_ARGS": " ".join(f"-D{flag}" for flag in flags),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        }
        run_pip(
            ["wheel", "--no-binary", "llama-cpp-python", "--wheel-dir", str(wheels), REQUIREMENT],
            **environment,
        )
    (wheel,) = wheels.glob("llama_cpp_python-*.whl")
    run_pip(["install", "--target", str(folder), str(wheel), "diskcache"])
    return folder


def run_pip(args: list[str], **environment: str) -> None:
    """Run pip; skip the test if the package registry cannot be reached."""
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", args[0], *options, *args[1:]]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode and any(message in done.stderr for message in NO_REGISTRY):
        pytest.skip(f"llama.cpp cannot be fetched here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
