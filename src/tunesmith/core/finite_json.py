"""JSON that tunesmith wrote, which holds finite numbers only.

    load_finite_json(bytes) -> the same as json.loads

Python reads NaN, Infinity and integers of any length. json_io.py writes no such float, and nothing
here has such an integer, so that a file with one is damaged or forged, and every reader may compute
with what it finds.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DIGITS = 300  # of an integer that a float can hold


def load_finite_json(content: str | bytes) -> Any:
    """Decode JSON. Raises ValueError for anything else and for a number that no float can hold,
    RecursionError if it is nested too deeply."""
    return json.loads(
        content, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int
    )


def _parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.20} is not a finite number")
