"""`python -m tunesmith` runs nothing of the folder in which it is called, and ends without a
traceback while it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.program_start import (
    drop_working_directory,
    is_command_run,
    is_module_run,
)


@pytest.mark.parametrize(
    ("argv", "program", "is_run"),
    [
        (["-m"], ["python", "-m", "tunesmith", "doctor"], True),
        (["-m"], ["python", "-X", "dev", "-m", "tunesmith.report.trackers"], True),
        (["-m"], ["python", "-m", "pytest", "tunesmith"], False),
        (["-m"], ["python", "-m", "tunesmithy"], False),
        (["script.py"], ["python", "script.py", "-m", "tunesmith"], False),
        ([], ["python"], False),
    ],
)
def test_other_programs_keep_their_path(argv: list[str], program: list[str], is_run: bool) -> None:
    assert is_module_run(argv, program) is is_run


def test_a_checkout_keeps_its_folder(tmp_path: Path) -> None:
    here = str(tmp_path)
    assert drop_working_directory([here, "", "/lib"], here, here) == [here, "", "/lib"]
    assert drop_working_directory([here, "", "/lib"], here, "/lib") == ["/lib"]


def test_a_file_named_as_a_library_does_not_run(tmp_path: Path) -> None:
    for name in ("yaml", "pydantic", "json", "wandb", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    command = [sys.executable, "-m", "tunesmith", "schema"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("argv", "is_run"),
    [
        (["/usr/bin/tunesmith", "plan"], True),
        (["tunesmith.exe"], True),
        (["/home/me/tunesmith/train.py"], False),
        (["pytest", "tunesmith"], False),
        ([], False),
    ],
)
def test_only_the_command_takes_the_signals(argv: list[str], is_run: bool) -> None:
    assert is_command_run(argv) is is_run


# As sitecustomize.py: it runs before the program does.
SEND_AT_IMPORT = """
import os, sys

class Sender:
    @staticmethod
    def find_spec(name, *_):
        if name == {imported!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Sender)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("imported", ["tunesmith.core.errors", "typer.core"])
def test_a_signal_while_it_imports_leaves_no_traceback(
    imported: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    program = SEND_AT_IMPORT.format(imported=imported, number=int(number))
    (tmp_path / "sitecustomize.py").write_text(program)
    command = [sys.executable, "-m", "tunesmith", "schema"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_changes_no_exit_code(closed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "init", "recipe.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, preexec_fn=lambda: os.close(closed), timeout=120, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "recipe.yaml").exists()


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys\n"
        "from tunesmith.core.program_start import open_closed_streams\n"
        "open_closed_streams()\n"
        "file = open('file', 'w')\n"
        "print('text', file=sys.stderr, flush=True)\n"
        "os.write(2, b'of a library')\n"
        "subprocess.run(['sh', '-c', 'echo text >&2'], check=True)\n"
    )
    command = [sys.executable, "-P", "-c", program]
    subprocess.run(command, cwd=tmp_path, preexec_fn=lambda: os.close(2), check=True)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("name", ["tunesmith", "mine.py"])
def test_only_the_command_stops_the_collector_and_only_while_it_imports(
    name: str, tmp_path: Path
) -> None:
    """A process that the command starts has its arguments too."""
    script = tmp_path / name
    script.write_text(
        "import gc, multiprocessing, sys\n"
        "import tunesmith\n"
        "from tunesmith.cli.app import main\n"
        "if __name__ == '__main__':\n"
        "    print(gc.isenabled())\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(gc.isenabled))\n"
        "    sys.stdout.flush()\n"
        "    show = lambda phase, _: sys.stderr.write(f'collecting: {phase}\\n')\n"
        "    gc.callbacks.append(show)\n"
        "    main()\n"
    )
    command = [sys.executable, str(script), "schema", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == [str(name != "tunesmith"), "True"]
    assert "collecting: start" in done.stderr


def test_a_library_leaves_the_signals_alone() -> None:
    program = (
        "import signal, tunesmith\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
