"""How many examples would do: err(n) = c + a * n^-b through the scores of short trainings.

    values by item of each size -> Curve (b with its interval, examples to the target, or why that is not said)

err is 1 - score. Fitted by least squares over the mean errors, weighted by 1 / variance, for each b
of a grid, with a and c not below 0; where nothing falls, b is 0. Intervals: percentiles of a
bootstrap over items and over trainings of one size. The form: Zhang 2024, Raghavendra 2024. Nothing
is said beyond FAR times the largest size, nor of a curve whose b may be 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_SIZES, MAX_EXTRAPOLATION = 4, 8
RESAMPLES = 1000
EXPONENTS_G = np.concatenate([np.arange(-1.0, 0.0, 0.1), [0.0], np.arange(0.05, 3.0001, 0.05)])


@dataclass(frozen=True)
class LearningCurve:
    """`needed`: examples to the target, least and most of its interval (None: beyond what may be
    said)."""

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    a: float
    b: float
    c: float
    b_low: float
    b_high: float
    target: float | None = None
    needed_examples: int | None = None
    needed_examples_low: int | None = None
    needed_examples_high: int | None = None
    refusal: str = ""


def fit_curve(
    scores: Mapping[int, Sequence[Sequence[float]]], target: float | None = None, *, seed: int = 0
) -> LearningCurve | None:
    """`scores`: size -> of each training the value of every item, in [0, 1], items in one order.
    None for fewer than two sizes."""
    sizes = sorted(scores)
    if len(sizes) < 2:
        return None
    sizes_K = np.array(sizes, dtype=float)
    errors_K = np.array([1 - np.mean(scores[size]) for size in sizes])
    a, b, c = _fit_power_law(sizes_K, errors_K[None], _compute_weights(scores, sizes))[0].tolist()
    resampled_RK = _resample_errors(scores, sizes, seed)
    fits_R3 = _fit_power_law(sizes_K, resampled_RK, _compute_weights(scores, sizes))
    low, high = (float(bound) for bound in np.quantile(fits_R3[:, 1], [0.025, 0.975]))
    curve = LearningCurve(tuple(sizes), tuple(errors_K.tolist()), a, b, c, low, high, target)
    return _add_needed_examples(curve, fits_R3)


def _compute_weights(
    scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int]
) -> np.ndarray:
    """1 / variance of each mean error. A size without spread has that of one more right and one
    more wrong answer."""
    weights = []
    for size in sizes:
        values = np.asarray(scores[size], dtype=float).mean(axis=0)
        num_items = len(values)
        min_variance = (1 / (num_items + 2)) * (1 - 1 / (num_items + 2))
        weights.append(num_items / max(float(values.var()), min_variance))
    return np.array(weights)


def _resample_errors(
    scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int], seed: int
) -> np.ndarray:
    """Mean errors [RESAMPLES, K]: the same items are drawn for every size, trainings within
    each."""
    rng = np.random.default_rng(seed)
    num_items = len(scores[sizes[0]][0])
    item_indices_RN = rng.integers(num_items, size=(RESAMPLES, num_items))
    columns = []
    for size in sizes:
        values_SN = np.asarray(scores[size], dtype=float)
        seeds_RS = rng.integers(len(values_SN), size=(RESAMPLES, len(values_SN)))
        resampled_RN = np.stack(
            [values_SN[seeds_RS[:, index]] for index in range(len(values_SN))]
        ).mean(axis=0)
        columns.append(1 - np.take_along_axis(resampled_RN, item_indices_RN, axis=1).mean(axis=1))
    return np.stack(columns, axis=1)


def _fit_power_law(sizes_K: np.ndarray, errors_RK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """(a, b, c) of each row of errors [R, 3]."""
    best_R, fits_R3 = np.full(len(errors_RK), np.inf), np.zeros((len(errors_RK), 3))
    normalized_K = weights_K / weights_K.sum()
    mean_R = errors_RK @ normalized_K
    for b in sorted(
        EXPONENTS_G.tolist(), key=abs
    ):  # 0 first: a curve that falls must be better than a flat one
        x_K = sizes_K**-b
        centre = float(x_K @ normalized_K)
        spread = float(normalized_K @ (x_K - centre) ** 2)
        a_R = (
            np.zeros(len(errors_RK))
            if spread < 1e-12
            else (errors_RK - mean_R[:, None]) @ (normalized_K * (x_K - centre)) / spread
        )
        a_R = np.clip(a_R, 0, None)
        c_R = mean_R - a_R * centre
        is_negative_R = c_R < 0
        a_R = np.where(
            is_negative_R,
            np.clip(errors_RK @ (normalized_K * x_K) / float(normalized_K @ x_K**2), 0, None),
            a_R,
        )
        c_R = np.where(is_negative_R, 0.0, c_R)
        residual_R = ((c_R[:, None] + a_R[:, None] * x_K - errors_RK) ** 2) @ normalized_K
        is_better_R = residual_R < best_R - 1e-12
        best_R = np.where(is_better_R, residual_R, best_R)
        fits_R3[is_better_R] = np.stack([a_R, np.where(a_R > 0, b, 0.0), c_R], axis=1)[is_better_R]
    return fits_R3


def _add_needed_examples(curve: LearningCurve, fits_R3: np.ndarray) -> LearningCurve:
    """With the examples to the target, or the reason why they are not said."""
    max_examples = MAX_EXTRAPOLATION * curve.sizes[-1]
    if len(curve.sizes) < MIN_SIZES:
        return replace(
            curve, refusal=f"{len(curve.sizes)} sizes were trained: a curve takes {MIN_SIZES}"
        )
    if curve.b_low <= 0:
        return replace(
            curve,
            refusal=f"it may not fall: b is {curve.b:.2f} [{curve.b_low:.2f}, {curve.b_high:.2f}]",
        )
    if curve.target is None:
        return curve
    needed_examples = solve_examples(curve.target, curve.a, curve.b, curve.c)
    if needed_examples > max_examples:
        amount = (
            "more than any number of"
            if math.isinf(needed_examples)
            else f"about {needed_examples:,.0f}"
        )
        return replace(
            curve,
            refusal=f"the target takes {amount} examples by the curve; nothing is said beyond {max_examples:,}",
        )
    low, high = np.quantile(
        [solve_examples(curve.target, *fit) for fit in fits_R3], [0.025, 0.975], method="nearest"
    )
    bounds = {
        "needed_examples_low": math.ceil(low),
        "needed_examples_high": math.ceil(high) if high <= max_examples else None,
    }
    return replace(curve, needed_examples=math.ceil(needed_examples), **bounds)


def solve_examples(target: float, a: float, b: float, c: float) -> float:
    """Infinite where the curve never gets there."""
    error = 1 - target
    if a <= 0 or b <= 0:
        return 1.0 if a + c <= error else math.inf
    return math.inf if error <= c else max(1.0, (a / (error - c)) ** (1 / b))
