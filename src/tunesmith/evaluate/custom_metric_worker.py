"""The process of a user-defined metric.

    python -P custom_metric_worker.py FILE FUNCTION PAIRS.json

Out: one line of JSON when the file is loaded, then one per pair: {"value": 0.5} or
{"error": "raised ..."}. What the function prints is discarded. Imports nothing of tunesmith, so
that it starts fast.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    path = Path(sys.argv[1]).absolute()
    name = sys.argv[2]
    pairs = json.loads(Path(sys.argv[3]).read_text("utf-8"))
    # Replies keep the pipe; the function's own output goes where stderr goes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(path.parent))

    def write_reply(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    sys.excepthook = lambda _, error, __: write_reply({"error": describe_error(error, path)})
    function = load_function(path, name)
    write_reply({"value": 0.0})
    for answer, expected in pairs:
        write_reply(build_reply(function(answer, expected)))


def load_function(path: Path, name: str) -> Callable[[str, str], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def build_reply(value: Any) -> dict[str, Any]:
    """Return the reply for a finite number (also a bool or a NumPy scalar), else an error."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return {"value": number}
    return {"error": f"returned {value!r:.60}, which is not a finite number"}


def describe_error(error: BaseException, path: Path) -> str:
    """Return the exception, and the last line of the user's file in its traceback."""
    line = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    message = f"raised {type(error).__name__}: {error}"[:300]
    return f"{message} ({path.name}:{line})" if line else message


if __name__ == "__main__":
    main()
