"""Run a user-defined metric: a function `score(answer, expected) -> number` in a Python file.

In: "my_metrics.py:score" and pairs of texts. Out: a finite number per pair.
The function runs in its own process (custom_metric_worker.py), which is killed afterwards, and only
with --allow-code. An exception, a timeout or anything but a finite number is an InputError that
names the item. There is no sandbox: the code may do whatever the user may do, and a daemon that it
starts in a session of its own goes on; nothing waits for it.
"""

from __future__ import annotations

import json
import math
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

ANSWER_SECONDS = 10.0  # per answer
LOADING_SECONDS = 60.0  # for the file and its imports
CLOSING_SECONDS = 0.5  # for the pipe
MAX_LINE_BYTES = 2**16
WORKER_SCRIPT = Path(__file__).with_name("custom_metric_worker.py")


def format_metric_name(metric: str) -> str:
    """Return the name of a metric in scores: without the folder of a custom metric."""
    custom_metric = parse_custom_metric(metric)
    return metric if custom_metric is None else f"{custom_metric[0].name}:{custom_metric[1]}"


def refuse_code(metrics: Sequence[str], *, allow_code: bool) -> None:
    """Raise InputError for a custom metric that is not allowed to run, or that has no file."""
    for metric in metrics:
        custom_metric = parse_custom_metric(metric)
        if custom_metric is None:
            continue
        where = f"metrics: {metric}"
        if not custom_metric[0].is_file():
            raise InputError("no such file", where=where, fix="check the path")
        if not allow_code:
            message = f"{format_metric_name(metric)} is code that would run with your permissions"
            fix = "read the file; if you trust it, add --allow-code (allow_code=True in Python)"
            raise InputError(message, where=where, fix=fix)


def score_answers(
    metric: str, pairs: Sequence[tuple[str, str]], ids: Sequence[str]
) -> tuple[float, ...]:
    """Return the function's value for each (answer, expected).

    Raises InputError with the id of the item that it fails on.
    """
    custom_metric = parse_custom_metric(metric)
    assert custom_metric is not None
    file, function = custom_metric
    name = format_metric_name(metric)
    with tempfile.TemporaryDirectory() as folder:
        pairs_file = Path(folder) / "pairs.json"
        pairs_file.write_text(json.dumps(pairs), encoding="utf-8")
        script = str(WORKER_SCRIPT)
        command = [sys.executable, "-P", script, str(file), function, str(pairs_file)]
        with _run_worker(command) as replies:
            # The first reply says that the file is loaded.
            _parse_reply(next(replies), name, str(file))
            return tuple(_parse_reply(next(replies), name, item) for item in ids)


@contextmanager
def _run_worker(command: Sequence[str]) -> Generator[Iterator[dict[str, Any]]]:
    """Yield the replies of the process; kill it and its children at the end of the block."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    # The thread closes the pipe, at its end: a daemon of the metric may hold it open for long.
    reader = threading.Thread(target=_enqueue_lines, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        yield _iter_replies(lines)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=CLOSING_SECONDS)


def _enqueue_lines(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on until the pipe is closed, each cut at MAX_LINE_BYTES."""
    with stream:
        while line := stream.readline(MAX_LINE_BYTES):
            lines.put(line)
    lines.put(b"")


def _iter_replies(lines: queue.SimpleQueue[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the replies; an error for a timeout, and for the end of the process."""
    seconds = LOADING_SECONDS
    while True:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            yield {"error": f"takes over {seconds:g} seconds"}
            return
        yield _read_reply(line) if line else {"error": "ended its process"}
        seconds = ANSWER_SECONDS


def _read_reply(line: bytes) -> dict[str, Any]:
    """Return a reply of the worker; an error for a line that the metric's own code wrote there."""
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    reply: dict[str, Any] = content if isinstance(content, dict) and len(content) == 1 else {}
    value: Any = reply.get("value")
    has_value = isinstance(value, (int, float)) and math.isfinite(value)
    if has_value or isinstance(reply.get("error"), str):
        return reply
    return {"error": f"writes lines of its own where the values go: {line[:80]!r}"}


def _parse_reply(reply: dict[str, Any], name: str, where: str) -> float:
    if "error" in reply:
        fix = "correct the function: it takes two strings, and returns a finite number"
        raise InputError(f"{name} {reply['error']}", where=where, fix=fix)
    return reply["value"]
