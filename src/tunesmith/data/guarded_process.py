"""A child process for code of strangers: chat templates, regular expressions, custom metrics.

    child = GuardedProcess("package.module:job", payload, ...)   # there: answer = job(payload)
    child.ask(request, seconds=5)                                # there: answer(request)

Requests and replies are lines of JSON. The child (`guarded_worker.py`) limits its memory, and its
processor time per request: a busy machine refuses nothing. After a failure a child is not asked
again: each `ask` raises the same ChildError. Nothing here keeps the child from reading files; what
runs there has its own sandbox (templates), or runs with the user's consent (metrics)."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import MachineError
from tunesmith.core.types import Json

MAX_START_SECONDS = 60.0  # until the interpreter has imported the job
MAX_WAIT_SECONDS = 120.0  # beyond the limit, for a child that gets little of a processor
MAX_REPLY_BYTES = 2**28
MAX_STDERR_CHARS = 500
READY_LINE = b'{"reply": "ready"}\n'
WORKER_SCRIPT = Path(__file__).with_name("guarded_worker.py")
START_FIX = "run tunesmith by a Python interpreter that can import its dependencies"

FailureKind = Literal["time", "wait", "ended", "garbled", "raised"]


class ChildError(RuntimeError):
    """`kind` is "time" (of a processor), "wait" (no reply), "ended" (too much memory, or its own
    exit), "garbled" (no reply of the worker), or "raised", with the exception in `details`."""

    def __init__(self, kind: FailureKind, details: Json) -> None:
        super().__init__(f"{kind}: {details}")
        self.kind = kind
        self.details = details


class GuardedProcess:
    """A child with a job. Threads take turns."""

    def __init__(
        self,
        job: str,
        payload: Any,
        *,
        load_seconds: float,
        max_bytes: int = 0,
        cwd: Path | None = None,
        threads: int = 1,
    ) -> None:
        """Start the child and its job. `max_bytes` of memory come on top of the imports; 0 is no
        limit. `cwd` is an empty folder by default. Raises MachineError, and ChildError for a job
        that does not start."""
        self.failure: ChildError | None = None
        self._lock = threading.Lock()
        self._process = _start_process(job, max_bytes, cwd, threads)
        self.pid = self._process.pid
        self._end = weakref.finalize(self, _end_process, self._process)
        try:
            self.ask(payload, seconds=load_seconds)
        except ChildError:
            self._end()
            raise

    def ask(
        self, request: Any, *, seconds: float, threads: int = 1, max_wait: float | None = None
    ) -> Any:
        """Return the job's answer. `seconds` are of processor time on each of the threads that the
        job may use; `max_wait` is the time to wait beyond. Raises ChildError."""
        line = json.dumps({"seconds": seconds * threads, "request": request}).encode() + b"\n"
        wait = MAX_WAIT_SECONDS if max_wait is None else max_wait
        with self._lock:  # a reply belongs to the request before it
            if self.failure is not None:
                raise self.failure
            try:
                reply = self._exchange(line, time.monotonic() + seconds + wait)
            except BaseException:  # Ctrl-C, too: the reply would answer the next request
                self._fail("ended", b"interrupted")
                raise
            try:
                answer = json.loads(reply)
            except (ValueError, RecursionError):
                answer = None
            if isinstance(answer, dict) and answer.keys() == {"reply"}:
                return answer["reply"]
            if isinstance(answer, dict) and answer.keys() == {"error"}:
                raise ChildError("raised", answer["error"])
            raise self._fail("garbled", reply)

    def close(self) -> None:
        self._end()

    def _exchange(self, line: bytes, deadline: float) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = _read_line(self._process, deadline)
        except BrokenPipeError:
            reply = b""
        if reply is None:
            raise self._fail("wait", b"")
        if not reply:
            is_time = self._process.wait() == -signal.SIGPROF
            raise self._fail("time" if is_time else "ended", b"")
        return reply

    def _fail(self, kind: FailureKind, reply: bytes) -> ChildError:
        if self.failure is None:
            self.failure = ChildError(kind, {"message": repr(reply[:80])})
            self._end()
        return self.failure


def _start_process(
    job: str, max_bytes: int, cwd: Path | None, threads: int
) -> subprocess.Popen[bytes]:
    """Start a child and wait until it has imported its job. Raises MachineError."""
    paths = json.dumps([path for path in sys.path if path])
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER_SCRIPT), paths, job, str(max_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=cwd or scratch,
                env={**os.environ, "RAYON_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        except OSError as error:
            raise MachineError(f"a child process cannot start: {error}", fix=START_FIX) from error
        try:
            line = _read_line(process, time.monotonic() + MAX_START_SECONDS)
        except BaseException:  # Ctrl-C, too: nobody else would end the process
            _end_process(process)
            raise
        if line == READY_LINE:
            return process
        _end_process(process)
        stderr.seek(0)
        written = stderr.read().decode(errors="replace").strip()[-MAX_STDERR_CHARS:]
        message = f"a child process did not start (status {process.returncode}): {written}"
        raise MachineError(message, fix=START_FIX)


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Return the next line of a process, b"" if it ends or never ends its line, None if it takes
    too long."""
    assert process.stdout is not None
    reply = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not reply.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                return None
            part = os.read(process.stdout.fileno(), 2**20)
            reply += part
            if not part or len(reply) > MAX_REPLY_BYTES:
                process.kill()
                return b""
    return bytes(reply)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """End a child and what it started in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
