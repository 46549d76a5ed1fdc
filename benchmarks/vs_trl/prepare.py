"""Prepare the model, the rows and the files that both sides of the benchmark read."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.data.rows import select_rows, write_rows
from benchmarks.vs_trl.job import Job, run_module, write_documents

from tunesmith.core.types import Document, Json, ModelSpec
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec

MODEL = "smollm2-135m-instruct"
OUR_BATCH = 8  # rows an optimizer step


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int  # for training
    more_rows: int  # for start-up and rendering
    seconds: float  # measured time per setting
    rounds: int  # in which tunesmith and the fastest settings take turns
    round_seconds: float  # measured time per side and round
    gemm_seconds: float  # per product
    loss_steps: int


FULL = Size(
    rows=512,
    more_rows=1000,
    seconds=15,
    rounds=3,
    round_seconds=40,
    gemm_seconds=0.5,
    loss_steps=20,
)
QUICK = Size(
    rows=64,
    more_rows=150,
    seconds=0.1,
    rounds=2,
    round_seconds=0.1,
    gemm_seconds=0.02,
    loss_steps=6,
)


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the rows and the scratch folder; `quick` also means fewer settings."""

    spec: ModelSpec
    size: Size
    folder: Path  # scratch
    rows: list[Json]
    documents: list[Document]  # of the first rows
    quick: bool

    @property
    def model(self) -> str:
        return str(self.spec.path)

    @property
    def rows_file(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def documents_file(self) -> Path:
        return self.folder / "documents.jsonl"

    @property
    def job(self) -> Job:
        """The job with the values that all jobs share."""
        return Job(
            model=self.model,
            documents=str(self.documents_file),
            adapter=str(self.folder / "adapter"),
            batch_size=OUR_BATCH,
            steps=self.size.rows // OUR_BATCH,
            seconds=self.size.seconds,
        )

    def describe_rows(self) -> Json:
        lengths = [len(document) for document in self.documents]
        return {
            "sha256": hashlib.sha256(self.documents_file.read_bytes()).hexdigest(),
            "count": len(lengths),
            "tokens": {
                "min": min(lengths),
                "mean": sum(lengths) / len(lengths),
                "max": max(lengths),
            },
            "supervised": sum(int((d.weights_L > 0).sum()) for d in self.documents) / len(lengths),
        }


def prepare(folder: Path, *, quick: bool) -> Bench:
    """Write rows, token ids and the initial adapter into `folder`."""
    size = QUICK if quick else FULL
    spec = read_spec(resolve_model(MODEL, report=log), name=MODEL)
    log("making rows from the standard library")
    renderer = Renderer.from_folder(spec.path, now=datetime(2026, 1, 1))
    rows, documents = select_rows(renderer, size.more_rows)
    bench = Bench(spec, size, folder, rows, documents[: size.rows], quick)
    write_rows(bench.rows_file, rows)
    write_documents(bench.documents_file, bench.documents)
    run_module("benchmarks.vs_trl.tunesmith_side", "start", bench.model, bench.job.adapter)
    return bench


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
