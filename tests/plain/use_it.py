"""Use the plain package, without extras: `python tests/plain/use_it.py`, as .ci/run does.

A development environment hides a missing dependency, because something in it brings the library.
In: an environment with the wheel alone. Out: every verb of a first day on a tiny random model, each
with its exit code; the first that fails, or a file that the wheel lacks, ends it with 1.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tunesmith
from tiny_export import save_model
from tiny_runs import build_sum_rows, write_rows
from tunesmith.export.request import ENGINES, TARGET_TYPES
from tunesmith.recipe import demo

RECIPE = """\
model: model
data: train.jsonl
eval_data: eval.jsonl
test_data: test.jsonl
batch_size: 4
num_train_epochs: 1
max_steps: 4
metrics: [json_valid, exact_match]
output_dir: run
"""

COMMANDS = [
    "--help",
    "doctor",
    "advise --need format --examples 300",
    "data check recipe.yaml",
    "data show recipe.yaml",
    "plan recipe.yaml",
    "train recipe.yaml",
    "eval run",
    "compare base run",
    "report run",
]
EXPORTS = [
    *(("peft", ""), ("merged", "")),
    *((target, kind) for target in ("gguf", "ollama") for kind in TARGET_TYPES[target]),
    *((engine, "") for engine in ENGINES),
]


def main() -> None:
    check_files()
    folder = Path(tempfile.mkdtemp())
    save_model(folder / "model")
    write_rows(folder / "train.jsonl", build_sum_rows(0, 32))
    write_rows(folder / "eval.jsonl", build_sum_rows(100, 10))
    write_rows(folder / "test.jsonl", build_sum_rows(200, 10))
    (folder / "recipe.yaml").write_text(RECIPE)
    for command in (*COMMANDS, *map(format_export, EXPORTS)):
        run_command(command, folder)
    run_command("chat run", folder, text="1 and 1\n")
    stop_training(folder)
    run_command("resume stopped", folder)
    copy_demo(folder / "demo")
    run_command("train recipe.yaml --max-steps 2", folder / "demo")
    print(f"{len(COMMANDS) + len(EXPORTS) + 3} passed, 0 failed")


def check_files() -> None:
    """End if the installed package lacks a file of the source: a template, a kernel, a row."""
    source = Path(__file__).parents[2] / "src" / "tunesmith"
    missing = list_files(source) - list_files(Path(tunesmith.__file__).parent)
    if missing:
        sys.exit(f"not in the package: {sorted(missing)}")


def list_files(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {str(file.relative_to(folder)) for file in files}


def format_export(target_and_type: tuple[str, str]) -> str:
    target, kind = target_and_type
    options = f" --type {kind}" if kind else ""
    return f"export run --to {target}{options} --out exported-{target}-{kind}"


def copy_demo(folder: Path) -> None:
    """Copy the embedded example, with the built-in model, and few rows to evaluate."""
    shutil.copytree(Path(demo.__file__).parent, folder)
    for name in ("eval.jsonl", "test.jsonl", "general.jsonl"):
        rows = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(rows[:8]))


def stop_training(folder: Path) -> None:
    """Start a run and stop it after its first step."""
    command = "train recipe.yaml --output-dir stopped --max-steps 60"
    arguments = [sys.executable, "-m", "tunesmith", *command.split()]
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or []:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGTERM)
    if process.returncode != 128 + signal.SIGTERM:
        sys.exit(f"stopped with exit code {process.returncode}")


def run_command(command: str, folder: Path, text: str = "") -> None:
    arguments = [sys.executable, "-m", "tunesmith", *command.split()]
    done = subprocess.run(
        arguments, cwd=folder, input=text, capture_output=True, text=True, check=False
    )
    print(f"{'ok' if done.returncode == 0 else 'failed':8}tunesmith {command}", flush=True)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main()
