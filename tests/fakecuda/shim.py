"""Compile and load shim.cpp. It must be loaded before torch, which this module does not import."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")


def find_torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_shim(folder: Path) -> str:
    """Compile the library into a folder. Return why that is not possible, "" if it is."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler"
    torch_folder = find_torch_folder()
    include = torch_folder / "include"
    command = [
        *(compiler, "-shared", "-fPIC", "-O0", "-std=c++20"),
        *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
        *(str(SOURCE), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"),
        *("-o", str(folder / "shim.so")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return f"shim.cpp does not compile with this torch: {(errors or ['?'])[0]}"


def load_shim(folder: Path) -> None:
    """Load the library and put its device in place."""
    library_folder = find_torch_folder() / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        if (library_folder / name).exists():
            ctypes.CDLL(str(library_folder / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "shim.so"))
    assert library.install_absent_device() == 0, "torch does not find the hooks of CUDA"
