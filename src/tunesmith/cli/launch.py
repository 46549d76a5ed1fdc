"""Processes of one run: `--gpus N` starts them under torchrun, and each finds its part.

    launch(2, ["train", "recipe.yaml"])    torchrun --standalone ... -m tunesmith train recipe.yaml
    with main_rank() as ranks: ...         what rank 0 does; the others follow its commands
    with lockstep() as ranks: ...          what all do, before rank 0 goes on alone

torchrun's variables say everything: a cluster that starts torchrun needs nothing of this file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any

from tunesmith.cli.help import option
from tunesmith.cli.output import write_stderr
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.formatting import format_count
from tunesmith.core.hardware import count_cores, count_gpus
from tunesmith.core.ranks import (
    THREADS_VARIABLE,
    Ranks,
    open_ranks,
    refuse_processes,
    run_torchrun,
)
from tunesmith.core.types import Json

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe, Stages

GpusOption = Annotated[
    int | None, option("N", "Start N processes under torchrun, one per GPU.", "--gpus", min=1)
]


def launch(num_processes: int, words: Sequence[str]) -> int:
    """Run a command in several processes on this machine; return the exit code of rank 0, or of the
    first rank that failed.

    Raises InputError for more processes than GPUs, or than cores where there is no GPU."""
    check_processes(num_processes)
    if not count_gpus():
        os.environ.setdefault(THREADS_VARIABLE, str(count_cores() // num_processes))
    return run_torchrun(num_processes, words)


def check_processes(num_processes: int) -> None:
    """Say that there is no GPU, and what each process has instead. Raise InputError for too many
    processes."""
    refuse_processes(num_processes)
    if not count_gpus():
        share = format_count(count_cores() // num_processes, "core")
        write_stderr(f"note: no GPU here: {num_processes} processes of {share} each\n")


def _follow_main_rank(ranks: Ranks) -> int:
    """Do what rank 0 says; return its exit code. Only an error of this rank alone is printed."""
    from tunesmith.train.follow import follow

    try:
        return follow(ranks)
    except TunesmithError as error:
        write_stderr(f"error: {ranks.name}: {error}\n")
        return error.exit_code


def _compare_recipes(ranks: Ranks, read_recipe: Callable[[], Recipe | Stages]) -> None:
    """Let rank 0 raise what is wrong with the recipe of any rank; the others go on to follow it."""
    from tunesmith.recipe.schema import Stages

    values: list[Json] = []
    problem: TunesmithError | None = None
    try:
        recipe = read_recipe()
        stages = recipe.recipes if isinstance(recipe, Stages) else (recipe,)
        values = [stage.model_dump(mode="json") for stage in stages]
    except TunesmithError as error:
        problem = error
    with nullcontext() if ranks.is_main else suppress(TunesmithError):
        answers = ranks.gather_answers([ranks.name, values], problem)
        for name, others in answers if ranks.is_main else []:
            if others != values:
                message = f"another recipe than that of rank 0: {_name_changes(values, others)}"
                fix = "start all ranks with the same recipe and flags, under the same path"
                raise InputError(message, where=name, fix=fix)


def _name_changes(stages: Sequence[Json], others: Sequence[Json]) -> str:
    """Return the keys of the recipe that differ."""
    if len(stages) != len(others):
        return "stage"
    changed: list[str] = []
    for stage, other in zip(stages, others, strict=True):
        changed += [key for key in stage if stage[key] != other[key]]
    return ", ".join(dict.fromkeys(changed))


@contextmanager
def main_rank(read_recipe: Callable[[], Recipe | Stages] | None = None) -> Iterator[Ranks]:
    """Yield the ranks to rank 0; any other follows it instead, and exits with its code. Raise
    InputError if another rank was started with another recipe."""
    with open_ranks() as ranks:
        if read_recipe is not None and ranks.world > 1:
            _compare_recipes(ranks, read_recipe)
        if ranks.is_main:
            yield ranks
            return
        code = _follow_main_rank(ranks)
    raise SystemExit(code)


@contextmanager
def lockstep() -> Iterator[Ranks]:
    """Yield the ranks to all of them: each runs the block, and rank 0 alone goes on after it. A
    problem of another rank reaches rank 0 where they next exchange results."""
    with open_ranks() as ranks:
        ranks.is_lockstep = ranks.world > 1
        try:
            yield ranks
            if ranks.is_lockstep:
                ranks.gather_in_lockstep("end")
        except TunesmithError as error:
            if ranks.is_main:
                raise
            with suppress(TunesmithError):
                ranks.gather_answers(None, error)
            raise SystemExit(error.exit_code) from error
    if not ranks.is_main:
        raise SystemExit(0)


def list_flags(**options: Any) -> list[str]:
    """Return options as words of a command line, without those that are not set."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words
