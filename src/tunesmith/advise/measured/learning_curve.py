"""How many examples would do: err(n) = c + a * n^-b through the scores of short trainings.

    values by item of each size -> Curve (b with its interval, examples to the target, or why that is not said)

err is 1 - score. Fitted by least squares over the mean errors, weighted by 1 / variance, for each b of a grid, with a
and c not below 0; where nothing falls, b is 0. Intervals: percentiles of a bootstrap over items and over trainings of
one size. The form: Zhang 2024, Raghavendra 2024. Nothing is said beyond FAR times the largest size, nor of a curve
whose b may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEAST_SIZES, FAR = 4, 8
RESAMPLES = 1000
GRID_G = np.concatenate([np.arange(-1.0, 0.0, 0.1), [0.0], np.arange(0.05, 3.0001, 0.05)])


@dataclass(frozen=True)
class Curve:
    """`needed`: examples to the target, least and most of its interval (None: beyond what may be said)."""

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    a: float
    b: float
    c: float
    b_low: float
    b_high: float
    target: float | None = None
    needed: int | None = None
    needed_low: int | None = None
    needed_high: int | None = None
    refused: str = ""


def fit_curve(
    scores: Mapping[int, Sequence[Sequence[float]]], target: float | None = None, *, seed: int = 0
) -> Curve | None:
    """`scores`: size -> of each training the value of every item, in [0, 1], items in one order. None for fewer than
    two sizes."""
    sizes = sorted(scores)
    if len(sizes) < 2:
        return None
    sizes_K = np.array(sizes, dtype=float)
    errors_K = np.array([1 - np.mean(scores[size]) for size in sizes])
    a, b, c = _fit(sizes_K, errors_K[None], _weights(scores, sizes))[0].tolist()
    drawn_RK = _resampled(scores, sizes, seed)
    fits_R3 = _fit(sizes_K, drawn_RK, _weights(scores, sizes))
    low, high = (float(x) for x in np.quantile(fits_R3[:, 1], [0.025, 0.975]))
    found = Curve(tuple(sizes), tuple(errors_K.tolist()), a, b, c, low, high, target)
    return _with_needed(found, fits_R3)


def _weights(scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int]) -> np.ndarray:
    """1 / variance of each mean error. A size without spread has that of one more right and one more wrong answer."""
    found = []
    for size in sizes:
        values = np.asarray(scores[size], dtype=float).mean(axis=0)
        n = len(values)
        least = (1 / (n + 2)) * (1 - 1 / (n + 2))
        found.append(n / max(float(values.var()), least))
    return np.array(found)


def _resampled(scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int], seed: int) -> np.ndarray:
    """Mean errors [RESAMPLES, K]: the same items are drawn for every size, trainings within each."""
    random = np.random.default_rng(seed)
    items = len(scores[sizes[0]][0])
    chosen_RN = random.integers(items, size=(RESAMPLES, items))
    columns = []
    for size in sizes:
        values_SN = np.asarray(scores[size], dtype=float)
        seeds_RS = random.integers(len(values_SN), size=(RESAMPLES, len(values_SN)))
        drawn = np.stack([values_SN[seeds_RS[:, place]] for place in range(len(values_SN))]).mean(axis=0)
        columns.append(1 - np.take_along_axis(drawn, chosen_RN, axis=1).mean(axis=1))
    return np.stack(columns, axis=1)


def _fit(sizes_K: np.ndarray, errors_RK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """(a, b, c) of each row of errors [R, 3]."""
    best_R, found_R3 = np.full(len(errors_RK), np.inf), np.zeros((len(errors_RK), 3))
    w = weights_K / weights_K.sum()
    mean_R = errors_RK @ w
    for b in sorted(GRID_G.tolist(), key=abs):  # 0 first: a curve that falls must be better than a flat one
        x_K = sizes_K**-b
        centre = float(x_K @ w)
        spread = float(w @ (x_K - centre) ** 2)
        a_R = (
            np.zeros(len(errors_RK))
            if spread < 1e-12
            else (errors_RK - mean_R[:, None]) @ (w * (x_K - centre)) / spread
        )
        a_R = np.clip(a_R, 0, None)
        c_R = mean_R - a_R * centre
        through = c_R < 0
        a_R = np.where(through, np.clip(errors_RK @ (w * x_K) / float(w @ x_K**2), 0, None), a_R)
        c_R = np.where(through, 0.0, c_R)
        off_R = ((c_R[:, None] + a_R[:, None] * x_K - errors_RK) ** 2) @ w
        better = off_R < best_R - 1e-12
        best_R = np.where(better, off_R, best_R)
        found_R3[better] = np.stack([a_R, np.where(a_R > 0, b, 0.0), c_R], axis=1)[better]
    return found_R3


def _with_needed(curve: Curve, fits_R3: np.ndarray) -> Curve:
    """With the examples to the target, or the reason why they are not said."""
    most = FAR * curve.sizes[-1]
    if len(curve.sizes) < LEAST_SIZES:
        return replace(curve, refused=f"{len(curve.sizes)} sizes were trained: a curve takes {LEAST_SIZES}")
    if curve.b_low <= 0:
        return replace(curve, refused=f"it may not fall: b is {curve.b:.2f} [{curve.b_low:.2f}, {curve.b_high:.2f}]")
    if curve.target is None:
        return curve
    needed = examples_to(curve.target, curve.a, curve.b, curve.c)
    if needed > most:
        what = "more than any number of" if math.isinf(needed) else f"about {needed:,.0f}"
        return replace(curve, refused=f"the target takes {what} examples by the curve; nothing is said beyond {most:,}")
    low, high = np.quantile([examples_to(curve.target, *fit) for fit in fits_R3], [0.025, 0.975], method="nearest")
    bounds = {"needed_low": math.ceil(low), "needed_high": math.ceil(high) if high <= most else None}
    return replace(curve, needed=math.ceil(needed), **bounds)


def examples_to(target: float, a: float, b: float, c: float) -> float:
    """Infinite where the curve never gets there."""
    error = 1 - target
    if a <= 0 or b <= 0:
        return 1.0 if a + c <= error else math.inf
    return math.inf if error <= c else max(1.0, (a / (error - c)) ** (1 / b))
