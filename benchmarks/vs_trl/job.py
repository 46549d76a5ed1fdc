"""What one side of the benchmark is told to do, how it times its steps, and how it is started.

    Job -> a process of its own -> Outcome

Both sides read the same Job, and each runs in a fresh process, so that its peak memory is its own.
Here is also the file of token ids that both train on. Left out: what a side does (ours.py,
theirs.py), which jobs are run (run.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.hardware import count_cores, read_peak_bytes
from tunesmith.core.types import Document

ROOT = Path(__file__).parents[2]
# rows trained before the clock counts: first-time costs of either side are left out
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
    """Train `batch` rows an optimizer step, in the order of the file. Both sides take the adapter,
    the linear schedule and AdamW from here."""

    model: str  # a folder
    documents: str  # a file of write_documents
    adapter: str  # a PEFT folder: the adapter before step 1
    batch: int
    steps: int  # optimizer steps, and the length of the schedule
    seconds: float  # once that much is measured no step is begun
    learning_rate: float = 1e-3
    warmup_steps: int = 2
    max_grad_norm: float = 1.0
    options: dict[str, Any] = field(default_factory=dict[str, Any])  # what only one side knows


@dataclass(frozen=True)
class Step:
    tokens: int  # of the rows, padding not counted
    supervised: int
    seconds: float  # since the end of the step before
    loss: float | None


@dataclass(frozen=True)
class Outcome:
    steps: tuple[Step, ...]
    warm: int  # the first steps, which do not count for the speed
    peak_bytes: int  # of the whole process, imports and loading included
    isolated: bool = True  # rows that share a forward do not see each other

    @property
    def measured(self) -> tuple[Step, ...]:
        return self.steps[self.warm :]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.measured)

    @property
    def tokens_per_second(self) -> float:
        return sum(step.tokens for step in self.measured) / self.seconds

    def work(self, block_parameters: int, head_parameters: int) -> float:
        """FLOP/s that a LoRA step cannot do without: forward and input gradient, 2 FLOPs a
        parameter each."""
        tokens = sum(step.tokens for step in self.measured)
        supervised = sum(step.supervised for step in self.measured)
        return 4 * (block_parameters * tokens + head_parameters * supervised) / self.seconds


class Clock:
    """The steps of a run so far. Each lasts from the end of the one before, whatever a side does in
    between."""

    def __init__(self, job: Job, documents: Sequence[Document]) -> None:
        self.job, self.steps = job, []
        self.warm = -(-WARM_UP_ROWS // job.batch)
        self._counts = [
            (len(document), int((document.weights_L > 0).sum())) for document in documents
        ]
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def step_done(self, loss: float | None = None) -> bool:
        """Notes a step; True when the time is up."""
        now, first = time.perf_counter(), len(self.steps) * self.job.batch
        rows = self._counts[first : first + self.job.batch]
        self.steps.append(
            Step(sum(t for t, _ in rows), sum(s for _, s in rows), now - self._last, loss)
        )
        self._last = now
        measured = self.steps[self.warm :]
        return len(measured) > 1 and sum(step.seconds for step in measured) >= self.job.seconds

    def outcome(self, losses: Sequence[float] = (), *, isolated: bool = True) -> Outcome:
        """`losses`, one a step, where a side knows them only at the end."""
        steps = self.steps
        if losses:
            steps = [
                Step(s.tokens, s.supervised, s.seconds, x)
                for s, x in zip(steps, losses, strict=True)
            ]
        return Outcome(tuple(steps), self.warm, read_peak_bytes(), isolated)


# ---------------------------------------------------------------- files and processes


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for d in documents:
            file.write(json.dumps([d.id, d.tokens_L.tolist(), d.weights_L.tolist(), d.side]) + "\n")


def read_documents(path: str | Path) -> list[Document]:
    rows = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [
        Document(id, np.array(tokens, np.int32), np.array(weights, np.float32), side)
        for id, tokens, weights, side in rows
    ]


def threads() -> int:
    """Threads that each side computes with: all cores, unless OMP_NUM_THREADS says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS") or count_cores())


def call(module: str, *words: str) -> Any:
    """The JSON that `python -m module words` prints last. What it says on stderr is shown only if
    it fails."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_job(module: str, job: Job) -> Outcome:
    found = call(module, json.dumps(asdict(job)))
    return Outcome(tuple(Step(**step) for step in found.pop("steps")), **found)


def job_of(word: str) -> Job:
    return Job(**json.loads(word))


def say(outcome: Outcome) -> None:
    """The last thing that a side prints."""
    print(json.dumps(asdict(outcome)), flush=True)
