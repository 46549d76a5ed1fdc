"""Run a user-defined metric: a function `score(answer, expected) -> number` in a Python file.

In: "my_metrics.py:score" and pairs of texts. Out: a finite number per pair.
The function runs in its own process (`data/guarded_process.py`), which is killed afterwards, and
only with --allow-code. An exception, a timeout or anything but a finite number is an InputError
that names the item. There is no sandbox and no limit of memory: the code may do whatever the user
may do, and a daemon that it starts in a session of its own goes on; nothing waits for it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.data.guarded_process import ChildError, GuardedProcess
from tunesmith.recipe.fields import parse_custom_metric

ANSWER_SECONDS = 10.0  # per answer, of a processor and of waiting
LOADING_SECONDS = 60.0  # for the file and its imports


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
    values: list[float] = []
    where = str(file)
    seconds = LOADING_SECONDS
    job = "tunesmith.evaluate.custom_metric:load_metric"
    payload = [str(file.absolute()), function]
    try:
        with closing(GuardedProcess(job, payload, load_seconds=seconds, cwd=Path.cwd())) as child:
            seconds = ANSWER_SECONDS
            for item, pair in zip(ids, pairs, strict=True):
                where = item
                values.append(child.ask(pair, seconds=seconds, max_wait=0))
    except ChildError as error:
        fix = "correct the function: it takes two strings, and returns a finite number"
        problem = _describe(error, file, seconds)
        raise InputError(f"{name} {problem}", where=where, fix=fix) from error
    return tuple(values)


def _describe(error: ChildError, file: Path, seconds: float) -> str:
    """Return what went wrong; an exception with the last line of the user's file in it."""
    details = error.details
    if error.kind in ("time", "wait"):
        return f"takes over {seconds:g} seconds"
    if error.kind == "ended":
        return "ended its process"
    if error.kind == "garbled":
        return f"writes lines of its own where the values go: {details['message']}"
    if details["type"] == NotFiniteError.__name__:
        return details["message"]
    message = f"raised {details['type']}: {details['message']}"[:300]
    lines = [line for name, line in details["frames"] if name == str(file.absolute())]
    return f"{message} ({file.name}:{lines[-1]})" if lines else message


# ---------------------------------------------------------------- the child


class NotFiniteError(ValueError):
    """A function that returned something else than a finite number."""


def load_metric(file_and_function: Sequence[str]) -> Callable[[Sequence[str]], float]:
    """Return the job of the child: the value of a pair."""
    path = Path(file_and_function[0])
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    score: Callable[[str, str], Any] = getattr(module, file_and_function[1])
    return lambda pair: _make_number(score(*pair))


def _make_number(value: Any) -> float:
    """Return a finite number (also a bool or a NumPy scalar) as a float."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise NotFiniteError(f"returned {value!r:.60}, which is not a finite number")
    return number
