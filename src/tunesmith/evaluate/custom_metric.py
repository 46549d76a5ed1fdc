"""A metric of the user's own: a function `score(answer, expected) -> number` in a Python file.

    "my_metrics.py:score", pairs of texts -> a finite number for each

It runs in a process of its own (custom_metric_worker.py), which ends with the measuring; one answer
may take SECONDS. Code is run only for who asked for it with --allow-code. What the function raises
or returns instead of a number is an InputError that names the item. Left out: shutting it in; it
may do what its user may do."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tunesmith.core.errors import InputError
from tunesmith.recipe.fields import parse_custom_metric

ANSWER_SECONDS = 10.0  # for one answer
LOADING_SECONDS = 60.0  # for the file and what it imports
CHILD_SCRIPT = Path(__file__).with_name("custom_metric_worker.py")


def format_metric_name(metric: str) -> str:
    """What it is called in scores: without the folder."""
    custom_metric = parse_custom_metric(metric)
    return metric if custom_metric is None else f"{custom_metric[0].name}:{custom_metric[1]}"


def refuse_code(metrics: Sequence[str], *, allow_code: bool) -> None:
    """Raises InputError for a metric of the user's own that nobody has allowed to run, and for a
    missing file."""
    for metric in metrics:
        if (custom_metric := parse_custom_metric(metric)) is None:
            continue
        if not custom_metric[0].is_file():
            raise InputError(
                "there is no such file", where=f"metrics: {metric}", fix="check the path"
            )
        if not allow_code:
            message = (
                f"{format_metric_name(metric)} is code, and would run with all that you may do"
            )
            fix = "read the file; if you trust it, add --allow-code (allow_code=True in Python)"
            raise InputError(message, where=f"metrics: {metric}", fix=fix)


def score_answers(
    metric: str, pairs: Sequence[tuple[str, str]], ids: Sequence[str]
) -> tuple[float, ...]:
    """What the function says of each (answer, expected). Raises InputError naming the item that it
    fails on."""
    custom_metric = parse_custom_metric(metric)
    assert custom_metric is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.json"
        file.write_text(json.dumps(pairs), encoding="utf-8")
        command = [
            sys.executable,
            "-P",
            str(CHILD_SCRIPT),
            str(custom_metric[0]),
            custom_metric[1],
            str(file),
        ]
        with _run_child(command) as replies:
            _parse_reply(
                next(replies), format_metric_name(metric), str(custom_metric[0])
            )  # that the file is loaded
            return tuple(
                _parse_reply(next(replies), format_metric_name(metric), item) for item in ids
            )


@contextmanager
def _run_child(command: Sequence[str]) -> Generator[Iterator[dict[str, Any]]]:
    """What the process says, line by line. At the end of the block it ends, with all that it
    started."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        reader = threading.Thread(target=_enqueue_lines, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            yield _iter_replies(lines)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(timeout=ANSWER_SECONDS)


def _enqueue_lines(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _iter_replies(lines: queue.SimpleQueue[bytes]) -> Iterator[dict[str, Any]]:
    """The lines, or that the next one took too long, or that there will be none."""
    seconds = LOADING_SECONDS
    while True:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            yield {"error": f"takes over {seconds:g} seconds"}
            return
        yield json.loads(line) if line else {"error": "ended its process"}
        seconds = ANSWER_SECONDS


def _parse_reply(reply: dict[str, Any], name: str, where: str) -> float:
    if "error" in reply:
        fix = "correct the function: it takes (answer, expected), two texts, and returns a finite number"
        raise InputError(f"{name} {reply['error']}", where=where, fix=fix)
    return reply["value"]
