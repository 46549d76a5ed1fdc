"""The child of `guarded_process.py`, run as a script.

    python -I guarded_worker.py SYS_PATH MODULE:JOB MAX_BYTES

In: the payload of the job, then requests, one a line. Out: a line when the job is imported, then
one per line of input: {"reply": ...} or {"error": {"type", "message", "frames", ...}}. A line that
takes more processor time than its `seconds` ends the process by SIGPROF, even where the parent was
killed and nobody waits. What the job prints is discarded; it cannot read the requests."""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

MAX_MESSAGE_CHARS = 2_000
MAX_FRAMES = 50


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    module, _, name = sys.argv[2].partition(":")
    answer = getattr(importlib.import_module(module), name)
    limit_memory(int(sys.argv[3]))
    replies.write(json.dumps({"reply": "ready"}) + "\n")
    replies.flush()
    os.dup2(null, 2)  # the lines of a panic in Rust
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends even a search that is stuck
    is_started = False
    for line in requests:
        try:
            content = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, content["seconds"])
            value = answer(content["request"])
            if not is_started:
                answer = value
                value = None
                is_started = True
            reply = json.dumps({"reply": value})
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
            reply = json.dumps({"error": describe_error(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


def limit_memory(max_bytes: int) -> None:
    """Limit the address space to what it is now and some more."""
    if max_bytes:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + max_bytes, size + max_bytes))


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return what an exception says; an InputError of tunesmith has `where` and `fix`."""
    frames = traceback.extract_tb(error.__traceback__, limit=-MAX_FRAMES)
    message = getattr(error, "message", None) or str(error)
    return {
        "type": type(error).__name__,
        "message": str(message)[:MAX_MESSAGE_CHARS],
        "where": str(getattr(error, "where", "")),
        "fix": str(getattr(error, "fix", "")),
        "frames": [[frame.filename, frame.lineno or 0] for frame in frames],
    }


if __name__ == "__main__":
    main()
