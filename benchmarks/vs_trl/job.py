"""The job that a side of the benchmark runs, its timing, and its start in a process.

    Job -> a process -> Outcome

Both sides read the same Job, and each runs in a new process, so that its peak memory is measured
alone. The file of token ids that both train on is written here too. Left out: the sides
(tunesmith_side.py, trl_side.py) and the choice of jobs (run.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.hardware import count_cores, read_peak_bytes
from tunesmith.core.types import Document

ROOT = Path(__file__).parents[2]
# Rows trained before the clock counts, so that one-time costs of either side are excluded.
WARM_UP_ROWS = 4
LORA = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "lora_target_modules": "all-linear",
    "seed": 0,
}


@dataclass(frozen=True)
class Job:
    """The work of one side: `batch_size` rows per optimizer step, in the order of the file.

    Both sides use this adapter, the linear schedule and AdamW.
    """

    model: str  # a folder
    documents: str  # a file of write_documents
    adapter: str  # a PEFT folder: the adapter before step 1
    batch_size: int
    steps: int  # optimizer steps, and the length of the schedule
    seconds: float  # no step starts after this much measured time
    learning_rate: float = 1e-3
    warmup_steps: int = 2
    max_grad_norm: float = 1.0
    options: dict[str, Any] = field(default_factory=dict[str, Any])  # of one side only


@dataclass(frozen=True)
class Step:
    tokens: int  # without padding
    supervised: int
    seconds: float  # since the end of the previous step
    loss: float | None


@dataclass(frozen=True)
class Outcome:
    steps: tuple[Step, ...]
    warm_up_steps: int  # the first steps, which do not count for the speed
    peak_bytes: int  # of the process, imports and loading included
    is_isolated: bool = True  # rows in one forward do not attend to each other

    @property
    def measured_steps(self) -> tuple[Step, ...]:
        return self.steps[self.warm_up_steps :]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.measured_steps)

    @property
    def tokens_per_second(self) -> float:
        return sum(step.tokens for step in self.measured_steps) / self.seconds

    def compute_flops(self, block_parameters: int, head_parameters: int) -> float:
        """Return the FLOP/s that LoRA cannot avoid.

        They are those of forward and input gradient, 2 FLOPs per parameter and token each; the
        head runs on supervised tokens only.
        """
        tokens = sum(step.tokens for step in self.measured_steps)
        supervised = sum(step.supervised for step in self.measured_steps)
        return 4 * (block_parameters * tokens + head_parameters * supervised) / self.seconds


class Clock:
    """Time the steps of a run; each lasts from the end of the previous one."""

    def __init__(self, job: Job, documents: Sequence[Document]) -> None:
        self.job = job
        self.steps: list[Step] = []
        self.warm_up_steps = -(-WARM_UP_ROWS // job.batch_size)
        self._documents = documents
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def finish_step(self, loss: float | None = None) -> bool:
        """Record a step; return True when the time is up."""
        now = time.perf_counter()
        start = len(self.steps) * self.job.batch_size
        documents = self._documents[start : start + self.job.batch_size]
        tokens = sum(len(document) for document in documents)
        supervised = sum(int((document.weights_L > 0).sum()) for document in documents)
        self.steps.append(Step(tokens, supervised, now - self._last, loss))
        self._last = now
        measured = self.steps[self.warm_up_steps :]
        return len(measured) > 1 and sum(step.seconds for step in measured) >= self.job.seconds

    def make_outcome(self, losses: Sequence[float] = (), *, is_isolated: bool = True) -> Outcome:
        """Return the outcome; `losses` has one per step if a side has them only at the end."""
        steps = self.steps
        if losses:
            steps = [replace(step, loss=x) for step, x in zip(steps, losses, strict=True)]
        return Outcome(tuple(steps), self.warm_up_steps, read_peak_bytes(), is_isolated)


# ---------------------------------------------------------------- files and processes


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for d in documents:
            file.write(json.dumps([d.id, d.tokens_L.tolist(), d.weights_L.tolist(), d.side]) + "\n")


def read_documents(path: str | Path) -> list[Document]:
    documents: list[Document] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        id, tokens, weights, side = json.loads(line)
        tokens_L = np.array(tokens, np.int32)
        documents.append(Document(id, tokens_L, np.array(weights, np.float32), side))
    return documents


def count_threads() -> int:
    """Return the threads per side: OMP_NUM_THREADS, or all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or count_cores())


def run_module(module: str, *args: str) -> Any:
    """Return the JSON that `python -m module args` prints last."""
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_job(module: str, job: Job) -> Outcome:
    outcome = run_module(module, json.dumps(asdict(job)))
    return Outcome(tuple(Step(**step) for step in outcome.pop("steps")), **outcome)


def parse_job(text: str) -> Job:
    return Job(**json.loads(text))


def print_outcome(outcome: Outcome) -> None:
    """Print the outcome, the last line that a side prints."""
    print(json.dumps(asdict(outcome)), flush=True)
