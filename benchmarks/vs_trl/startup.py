"""Measure the time to the first step, and the speed of rendering and tokenizing rows.

`measure_startup` runs the command line with a cached model and ends it after the first step;
`measure_rendering` renders and tokenizes distinct rows as planning does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from benchmarks.data.rows import make_example

from tunesmith.core.events import TrainStep
from tunesmith.core.run_dir import read_all_events
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.length_stats import BATCH_ROWS

RECIPE = "model: {model}\ndata: {rows}\nmax_steps: 100\nbatch_size: 8\noutput_dir: {run}\n"
LONGEST_WAIT = 300  # seconds
WARM_UP_ROWS = 100
PASSES = 3


def measure_startup(model: str, rows: Path, scratch: Path) -> Json:
    """Return the seconds from process start to the begin and the end of the first step.

    There are no held-out rows, hence no evaluation before training.
    """
    recipe, run = scratch / "recipe.yaml", scratch / "run"
    recipe.write_text(RECIPE.format(model=model, rows=rows, run=run), encoding="utf-8")
    started = time.time()
    with (scratch / "train.log").open("w+") as log:
        command = [sys.executable, "-m", "tunesmith.cli.app", "train", str(recipe)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            first = _first_step(process, run, started + LONGEST_WAIT)
        finally:
            process.terminate()
            process.wait()
        if first is None:
            log.seek(0)
            raise SystemExit(f"tunesmith train ended without a step:\n{log.read()[-4000:]}")
    written, step = first
    done = written - started
    return {
        "rows": len(rows.read_text().splitlines()),
        "begun": done - step.seconds,
        "done": done,
    }


def _first_step(
    process: subprocess.Popen[bytes], run: Path, until: float
) -> tuple[float, TrainStep] | None:
    while time.time() < until:
        ended = process.poll() is not None
        for logged in read_all_events(run):
            if isinstance(logged.event, TrainStep):
                return logged.time, logged.event
        if ended:
            return None
        time.sleep(0.1)
    return None


def measure_rendering(model: str, rows: Sequence[Json]) -> float:
    """Return rows per second: the median of passes, each with a new renderer and empty caches."""
    examples = [make_example(row, number) for number, row in enumerate(rows)]
    warm, measured = examples[:WARM_UP_ROWS], examples[WARM_UP_ROWS:]
    passes: list[float] = []
    for _ in range(PASSES):
        renderer = Renderer.from_folder(Path(model), now=datetime(2026, 1, 1))
        for row in warm:
            renderer.render(row)
        started = time.perf_counter()
        for start in range(0, len(measured), BATCH_ROWS):
            renderer.render_rows(measured[start : start + BATCH_ROWS])
        passes.append(len(measured) / (time.perf_counter() - started))
    return median(passes)
