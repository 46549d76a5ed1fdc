"""No process that the package starts runs code of the working directory: Python gets -P or -I, and
every process a folder of its own, except where it reads what the user names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
STARTERS = {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
OTHER_MODULES = {"multiprocessing", "pty", "runpy", "code"}
TORCH_STARTERS = (  # they start `python -m MODULE`, or a copy of this process, without -P
    "torch.distributed.run",
    "torch.distributed.launch",
    "torch.distributed.elastic.agent",
    "torch.multiprocessing",
    "torch.utils.cpp_extension",
)
TORCH_PARENTS = {"torch", "torch.distributed", "torch.distributed.elastic", "torch.utils"}
SAFE_PATH = 'os.environ[SAFE_PATH_VARIABLE] = "1"'  # what such a file does first
OS_STARTERS = ("exec", "spawn", "posix_spawn", "system", "popen", "fork", "startfile")
SAFE_FLAGS = {"-P", "-I"}
PIPES = "multiprocessing.connection"  # starts nothing
USES_WORKING_DIRECTORY = {
    "advise/sweep/trial_process.py",  # the files of the recipe
}


def find_problems(source: str, *, needs_cwd: bool = True) -> Iterator[str]:
    """Yield what could run code of the working directory."""
    for node in ast.walk(ast.parse(source)):
        yield from find_import_problems(node)
        if isinstance(node, (ast.List, ast.Tuple)):
            yield from find_command_problems(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr.startswith(OS_STARTERS):
                yield f"os.{node.attr}"
            if node.attr.startswith(("create_subprocess", "subprocess_", "ProcessPool")):
                yield node.attr
        elif isinstance(node, ast.Call) and needs_cwd and is_start(node.func):
            keywords = {keyword.arg for keyword in node.keywords}
            if "cwd" not in keywords:
                yield f"line {node.lineno}: no cwd"
            if "shell" in keywords:
                yield f"line {node.lineno}: shell"


def find_import_problems(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
        if node.module in {"subprocess", "os", "sys", "concurrent.futures", *TORCH_PARENTS}:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        if any(alias.name in {"subprocess", "sys"} and alias.asname for alias in node.names):
            yield "another name for subprocess or sys"
    else:
        return
    for name in names:
        head, _, attribute = name.partition(".")
        is_forbidden = (head in OTHER_MODULES and name != PIPES) or name == "sys.executable"
        is_forbidden |= name.startswith(TORCH_STARTERS)
        is_pool = name.endswith("ProcessPoolExecutor")
        is_starter = head == "os" and attribute.startswith(OS_STARTERS)
        is_starter |= head == "subprocess" and attribute in STARTERS
        if is_forbidden or is_pool or is_starter:
            yield name


def find_command_problems(command: ast.List | ast.Tuple) -> Iterator[str]:
    for index, word in enumerate(command.elts):
        if ast.unparse(word) == "sys.executable":
            flag = command.elts[index + 1] if index + 1 < len(command.elts) else None
            if not (isinstance(flag, ast.Constant) and flag.value in SAFE_FLAGS):
                yield f"line {word.lineno}: Python without -P or -I"


def is_start(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and ast.unparse(function.value) == "subprocess"
        and function.attr in STARTERS
    )


def count_executables(source: str) -> tuple[int, int]:
    """Return how often sys.executable occurs, and how often as a word of a command."""
    nodes = list(ast.walk(ast.parse(source)))
    commands = [node for node in nodes if isinstance(node, (ast.List, ast.Tuple))]
    uses = [node for node in nodes if isinstance(node, ast.Attribute)]
    num_uses = sum(ast.unparse(node) == "sys.executable" for node in uses)
    words = [ast.unparse(word) for command in commands for word in command.elts]
    return num_uses, words.count("sys.executable")


@pytest.mark.promise
def test_no_subprocess_runs_code_of_the_working_directory() -> None:
    problems: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        source = path.read_text()
        for problem in find_problems(source, needs_cwd=name not in USES_WORKING_DIRECTORY):
            if not (problem.startswith(TORCH_STARTERS) and SAFE_PATH in source):
                problems.append(f"{name}: {problem}")
        num_uses, num_words = count_executables(source)
        if num_uses != num_words:
            problems.append(f"{name}: sys.executable outside of a command")
    assert not problems


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run([sys.executable, '-m', 'pip'], cwd=scratch)",
        "subprocess.run([sys.executable, *words], cwd=scratch)",
        "subprocess.Popen([sys.executable, '-P', '-m', 'pip'])",
        "subprocess.check_output(['git', 'status'])",
        "subprocess.run('cc x.c', shell=True, cwd=scratch)",
        "from subprocess import run",
        "import subprocess as sp",
        "from sys import executable",
        "os.system('cc x.c')",
        "os.execv(path, words)",
        "from os import popen",
        "import multiprocessing",
        "from concurrent.futures import ProcessPoolExecutor",
        "asyncio.create_subprocess_exec('cc')",
        "from torch.distributed.run import parse_args, run",
        "from torch.distributed import launcher",
        "import torch.multiprocessing as mp",
        "from torch import multiprocessing",
    ],
)
def test_another_start_would_be_noticed(line: str) -> None:
    assert list(find_problems(line))
