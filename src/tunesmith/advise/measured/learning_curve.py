"""Fit a learning curve, error(n) = c + a * n^-b, to the scores of short trainings.

    scores by item for each size -> LearningCurve: b with its interval, and examples to the target

The error is 1 - score. The fit is least squares over the mean errors, weighted by 1 / variance, for
each b of a grid, with a and c at least 0; where nothing falls, b is 0. Intervals are percentiles of
a bootstrap over items, and over trainings of one size. The form: Zhang 2024, Raghavendra 2024.
Nothing is extrapolated beyond MAX_EXTRAPOLATION times the largest size, or if b may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_SIZES = 4
MIN_CURVE_ITEMS = 20  # a percentile bootstrap of fewer is too narrow
MAX_EXTRAPOLATION = 8
RESAMPLES = 1000
EXPONENTS_G = np.concatenate([np.arange(-1.0, 0.0, 0.1), [0.0], np.arange(0.05, 3.0001, 0.05)])


@dataclass(frozen=True)
class LearningCurve:
    """A fitted curve; `refusal` says why it is not extrapolated to the target."""

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    a: float
    b: float
    c: float
    b_low: float
    b_high: float
    target: float | None = None
    needed_examples: int | None = None  # to the target
    needed_examples_low: int | None = None
    needed_examples_high: int | None = None  # None: beyond the extrapolation limit
    refusal: str = ""


def fit_curve(
    scores: Mapping[int, Sequence[Sequence[float]]], target: float | None = None
) -> LearningCurve | None:
    """Fit `scores`: size -> trainings -> the value of every item, in [0, 1], in one order.

    Returns None for fewer than two sizes.
    """
    sizes = sorted(scores)
    if len(sizes) < 2:
        return None
    sizes_K = np.array(sizes, dtype=float)
    errors_K = np.array([1 - np.mean(scores[size]) for size in sizes])
    a, b, c = _fit_power_law(sizes_K, errors_K[None], _compute_weights(scores, sizes))[0].tolist()
    resampled_RK = _resample_errors(scores, sizes)
    fits_R3 = _fit_power_law(sizes_K, resampled_RK, _compute_weights(scores, sizes))
    low, high = (float(bound) for bound in np.quantile(fits_R3[:, 1], [0.025, 0.975]))
    curve = LearningCurve(tuple(sizes), tuple(errors_K.tolist()), a, b, c, low, high, target)
    num_items = len(scores[sizes[0]][0])
    if num_items < MIN_CURVE_ITEMS:
        refusal = f"{num_items} items were measured, a curve needs {MIN_CURVE_ITEMS}"
        return replace(curve, refusal=refusal)
    return _add_needed_examples(curve, fits_R3)


def _compute_weights(
    scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int]
) -> np.ndarray:
    """Return 1 / variance of each mean error; a constant size counts one more hit and miss."""
    weights: list[float] = []
    for size in sizes:
        values = np.asarray(scores[size], dtype=float).mean(axis=0)
        num_items = len(values)
        min_variance = (1 / (num_items + 2)) * (1 - 1 / (num_items + 2))
        weights.append(num_items / max(float(values.var()), min_variance))
    return np.array(weights)


def _resample_errors(
    scores: Mapping[int, Sequence[Sequence[float]]], sizes: Sequence[int]
) -> np.ndarray:
    """Return mean errors [RESAMPLES, K]: the same items for every size, trainings within each."""
    rng = np.random.default_rng(0)
    num_items = len(scores[sizes[0]][0])
    item_indices_RN = rng.integers(num_items, size=(RESAMPLES, num_items))
    columns: list[np.ndarray] = []
    for size in sizes:
        values_SN = np.asarray(scores[size], dtype=float)
        seeds_RS = rng.integers(len(values_SN), size=(RESAMPLES, len(values_SN)))
        draws = [values_SN[seeds_RS[:, index]] for index in range(len(values_SN))]
        resampled_RN = np.stack(draws).mean(axis=0)
        means_R = np.take_along_axis(resampled_RN, item_indices_RN, axis=1).mean(axis=1)
        columns.append(1 - means_R)
    return np.stack(columns, axis=1)


def _fit_power_law(sizes_K: np.ndarray, errors_RK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Return (a, b, c) for each row of errors [R, 3]."""
    num_rows = len(errors_RK)
    best_R = np.full(num_rows, np.inf)
    fits_R3 = np.zeros((num_rows, 3))
    weights_K = weights_K / weights_K.sum()
    mean_R = errors_RK @ weights_K
    # b = 0 first: a falling curve must fit better than a flat one
    for b in sorted(EXPONENTS_G.tolist(), key=abs):
        x_K = sizes_K**-b
        center = float(x_K @ weights_K)
        spread = float(weights_K @ (x_K - center) ** 2)
        a_R = np.zeros(num_rows)
        if spread >= 1e-12:
            covariance_R = (errors_RK - mean_R[:, None]) @ (weights_K * (x_K - center))
            a_R = np.clip(covariance_R / spread, 0, None)
        c_R = mean_R - a_R * center
        # where c would be negative, fit through c = 0
        through_zero_R = errors_RK @ (weights_K * x_K) / float(weights_K @ x_K**2)
        a_R = np.where(c_R < 0, np.clip(through_zero_R, 0, None), a_R)
        c_R = np.where(c_R < 0, 0.0, c_R)
        residual_R = ((c_R[:, None] + a_R[:, None] * x_K - errors_RK) ** 2) @ weights_K
        is_better_R = residual_R < best_R - 1e-12
        best_R = np.where(is_better_R, residual_R, best_R)
        fits_R3[is_better_R] = np.stack([a_R, np.where(a_R > 0, b, 0.0), c_R], axis=1)[is_better_R]
    return fits_R3


def _add_needed_examples(curve: LearningCurve, fits_R3: np.ndarray) -> LearningCurve:
    """Add the examples to the target, or the reason against extrapolating."""
    max_examples = MAX_EXTRAPOLATION * curve.sizes[-1]
    if len(curve.sizes) < MIN_SIZES:
        refusal = f"{len(curve.sizes)} sizes were trained, a curve needs {MIN_SIZES}"
        return replace(curve, refusal=refusal)
    if curve.b_low <= 0:
        interval = f"[{curve.b_low:.2f}, {curve.b_high:.2f}]"
        return replace(curve, refusal=f"it may not fall: b is {curve.b:.2f} {interval}")
    if curve.target is None:
        return curve
    needed_examples = solve_examples(curve.target, curve.a, curve.b, curve.c)
    if needed_examples > max_examples:
        limit = f"the limit is {max_examples:,}"
        refusal = f"the target needs about {needed_examples:,.0f} examples; {limit}"
        if math.isinf(needed_examples):
            refusal = f"the curve never reaches the target; {limit}"
        return replace(curve, refusal=refusal)
    solutions = [solve_examples(curve.target, *fit) for fit in fits_R3]
    low, high = np.quantile(solutions, [0.025, 0.975], method="nearest")
    return replace(
        curve,
        needed_examples=math.ceil(needed_examples),
        needed_examples_low=math.ceil(low),
        needed_examples_high=math.ceil(high) if high <= max_examples else None,
    )


def solve_examples(target: float, a: float, b: float, c: float) -> float:
    """Return the examples to a target score; infinite if the curve never reaches it."""
    error = 1 - target
    if a <= 0 or b <= 0:
        return 1.0 if a + c <= error else math.inf
    return math.inf if error <= c else max(1.0, (a / (error - c)) ** (1 / b))
