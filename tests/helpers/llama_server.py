"""llama.cpp's server as the command that `export --to llama-server` starts, and where to get it.

The server is that of the PyPI package xllamacpp, which brings llama.cpp compiled. As a script, this
file takes the flags of our serve.sh, and no others, and prints the address that it listens on."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

REQUIREMENT = "xllamacpp==2026.10.11549"


def find_llama_server(folder: Path) -> Path:
    """Return an executable that stands for llama-server; its package is installed into `folder`.

    Skips the test unless the package is importable, or TUNESMITH_BUILD_LLAMA is set, as by `make
    llama`, and a package registry can be reached."""
    if importlib.util.find_spec("xllamacpp") is None:
        if not os.environ.get("TUNESMITH_BUILD_LLAMA"):
            pytest.skip("llama.cpp's server is not installed: make llama")
        from llama_cpp_build import run_pip

        run_pip(["install", "--only-binary", "xllamacpp", "--target", str(folder), REQUIREMENT])
    script = folder / "llama-server"
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{sys.executable}" "{Path(__file__)}" "$@"\n'
    )
    script.chmod(0o755)
    return script


def serve(arguments: list[str]) -> None:
    """Serve a model until a signal ends the process."""
    import xllamacpp

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--jinja", action="store_true")
    flags = parser.parse_args(arguments)
    params = xllamacpp.CommonParams()
    params.model.path = flags.model
    params.model_alias = {flags.alias}
    params.n_ctx = flags.ctx_size
    params.hostnames = [flags.host]
    params.port = flags.port
    params.use_jinja = flags.jinja
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    serve(sys.argv[1:])
