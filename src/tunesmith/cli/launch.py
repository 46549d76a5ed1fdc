"""Processes of one run: `--gpus N` starts them under torchrun, and each finds its part.

    launch(2, ["train", "recipe.yaml"])    torchrun --standalone ... -m tunesmith train recipe.yaml
    follow_main_rank(ranks)                what a process does that is not rank 0

torchrun's variables say everything: a cluster that starts torchrun needs nothing of this file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.output import write_stderr
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.formatting import format_count
from tunesmith.core.hardware import measure_machine
from tunesmith.core.ranks import WORLD_VARIABLE, Ranks, is_distributed, run_torchrun

THREADS_VARIABLE = "OMP_NUM_THREADS"

GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=1,
        help="Start N processes under torchrun, one per GPU.",
        show_default=False,
    ),
]


def launch(num_processes: int, words: Sequence[str]) -> int:
    """Run a command in several processes on this machine; return the exit code of rank 0, or of the
    first rank that failed.

    Raises InputError for more processes than GPUs, or than cores where there is no GPU."""
    if is_distributed():
        message = f"--gpus starts processes, and {WORLD_VARIABLE} says that this is one of several"
        raise InputError(message, where="command line", fix="leave --gpus out under torchrun")
    _check_devices(num_processes)
    return run_torchrun(num_processes, words)


def _check_devices(num_processes: int) -> None:
    """Raise InputError for too many processes; on a CPU, give each its cores and say so."""
    machine = measure_machine(Path())
    num_gpus = machine.num_gpus
    if machine.device == "cuda":
        if num_processes > num_gpus:
            message = f"{num_processes} processes, and this machine has {num_gpus} GPUs"
            raise InputError(message, where="--gpus", fix=f"use --gpus {num_gpus}")
        return
    cores = machine.cores
    if num_processes > cores:
        message = f"no GPU here, and {num_processes} processes need more than {cores} cores"
        raise InputError(message, where="--gpus", fix=f"use --gpus {cores}, or leave it out")
    threads = cores // num_processes
    os.environ.setdefault(THREADS_VARIABLE, str(threads))
    share = format_count(threads, "core")
    write_stderr(f"note: no GPU here: {num_processes} processes of {share} each\n")


def follow_main_rank(ranks: Ranks) -> int:
    """Do what rank 0 says; return its exit code. Only an error of this rank alone is printed."""
    from tunesmith.train.follow import follow

    try:
        return follow(ranks)
    except TunesmithError as error:
        write_stderr(f"error: {ranks.name}: {error}\n")
        return error.exit_code
