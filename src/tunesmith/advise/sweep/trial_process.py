"""A trial: a `tunesmith train` process in a run folder of its own.

    process = TrialProcess(folder, spec, recipe, share=Share(0, 2))     trains, or resumes
    process.list_scores() ...; process.has_ended(); process.read_problem()

Beside the run folder, `trial-000.yaml` holds its recipe and `trial-000.log` what the process wrote
to stderr. Processes that run at once have a GPU each, or a share of the cores. A process ends with
its parent. Left out: which trial is next (trial_study.py), and which stops early (run_sweep.py).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunesmith.advise.sweep.records import TrialSpec
from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.core.hardware import count_cores, count_gpus
from tunesmith.core.json_io import read_json
from tunesmith.core.ranks import THREADS_VARIABLE
from tunesmith.core.run_dir import EVENTS_FILE, RECORD_FILE, is_run, read_events, read_run_plan
from tunesmith.recipe.load import dump_recipe, read_recipe
from tunesmith.recipe.schema import Recipe

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
INTERRUPTED_CODES = (130, 143, -signal.SIGINT, -signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
STOP_SECONDS = 60  # to save a checkpoint


@dataclass(frozen=True)
class Share:
    """One of `count` equal parts of the machine."""

    index: int = 0
    count: int = 1

    def list_variables(self) -> dict[str, str]:
        """Return the environment variables that give a process its GPU and its threads; none to a
        process that has the machine to itself, as `tunesmith train` has."""
        if self.count == 1:
            return {}
        threads = os.environ.get(THREADS_VARIABLE, str(max(1, count_cores() // self.count)))
        variables = {THREADS_VARIABLE: threads}
        if count_gpus():
            visible = os.environ.get(DEVICES_VARIABLE)
            index = self.index
            variables[DEVICES_VARIABLE] = visible.split(",")[index] if visible else str(index)
        return variables

    def list_cores(self) -> list[int]:
        """Return the cores of a process, none where they are not divided."""
        if self.count == 1 or count_gpus() or not hasattr(os, "sched_getaffinity"):
            return []
        return sorted(os.sched_getaffinity(0))[self.index :: self.count]


class TrialProcess:
    """The process of a trial; none is started for one that has its record already."""

    def __init__(
        self,
        folder: Path,
        spec: TrialSpec,
        recipe: Recipe,
        *,
        share: Share = Share(),
        allow_code: bool = False,
    ) -> None:
        self.spec = spec
        self.path = folder / spec.name
        self.log = folder / f"{spec.name}.log"
        self.output = folder / f"{spec.name}.json"  # the record or the error, as --json prints it
        self.process: subprocess.Popen[bytes] | None = None
        self.judged: set[int] = set()  # percents of the steps
        self._scores: list[Score] = []
        self._num_bytes = 0
        if self.is_complete:
            return
        words = ["resume", str(self.path)]
        if not is_run(self.path):
            recipe_file = folder / f"{spec.name}.yaml"
            write_file(recipe_file, dump_recipe(recipe).encode())
            words = ["train", str(recipe_file)]
        flags = ["--json", *["--allow-code"] * allow_code]
        with self.output.open("wb") as output, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tunesmith", *words, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, **share.list_variables()},
                start_new_session=True,  # Ctrl-C is for the sweep, which stops its trials
                preexec_fn=_make_preparation(share.list_cores()),
            )

    @property
    def is_complete(self) -> bool:
        return (self.path / RECORD_FILE).exists()

    @cached_property
    def steps(self) -> int:
        """The planned steps, once the plan is written."""
        return read_run_plan(self.path).steps

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def list_scores(self) -> list[Score]:
        """Return the scores of the run so far."""
        file = self.path / EVENTS_FILE
        num_bytes = file.stat().st_size if is_run(self.path) and file.exists() else 0
        if num_bytes != self._num_bytes:
            self._num_bytes = num_bytes
            events = read_events(self.path)
            self._scores = [event for event in events if isinstance(event, Score)]
        return self._scores

    def was_interrupted(self) -> bool:
        code = self.process.returncode if self.process is not None else 0
        return not self.is_complete and code in INTERRUPTED_CODES

    def read_problem(self) -> str:
        """Return why the process ended without a record."""
        code = self.process.returncode if self.process is not None else 0
        with suppress(InputError):
            error = read_json(self.output)["error"]
            where = f"{error['where']}: " if error["where"] else ""
            return f"{where}{error['message']}"
        if code == -signal.SIGKILL:
            return "its process was killed: memory may have run out, use fewer --gpus"
        return f"its process ended with exit code {code}: see {self.log.name}"

    def stop(self) -> None:
        """Let the process save a checkpoint and end."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.kill()

    def request_stop(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _make_preparation(cores: Sequence[int]) -> Callable[[], None]:
    """Return what a new process does before its program: end with its parent, use its cores."""
    parent = os.getpid()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before the call
                os._exit(1)

    return prepare


def make_trial_recipe(recipe: Recipe, spec: TrialSpec, **changes: object) -> Recipe:
    """Return the recipe of a trial, without its sweep. Raises InputError for a contradiction."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values.pop("sweep", None)
    trial_recipe = read_recipe(values, **spec.settings, seed=spec.seed, **changes)
    assert isinstance(trial_recipe, Recipe), "stages are refused before"
    return trial_recipe
