"""Recommend an adapter scale from its gain and its forgetting.

In: the ScalePoints of a run. Out: the recommended one, in words and as commands.
It is selected on `eval_data`, so its scores there are no result: verify it on `test_data`.
Left out: measuring the points (adapter_scaling.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

from tunesmith.core.document import TextTable
from tunesmith.core.types import ScalePoint

# Least share of the best gain in loss, and of the right answers, that a recommended scale keeps.
# Loss alone misleads: 92% of its gain was kept with 43 right answers in place of 70.
MIN_GAIN_SHARE = 0.9
MAX_FORGETTING_SHARE = 0.5  # largest share of the forgetting for a recommendation in the summary
MAX_SCALE = 2.0  # largest scale of an adapter; beyond 1, a run measures nothing


def compute_gain_share(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Return the share of the loss reduction at scale 1; None if the loss does not decrease."""
    base_loss = points[0].eval_loss.value
    trained_loss = points[-1].eval_loss.value
    if trained_loss >= base_loss:
        return None
    return (base_loss - point.eval_loss.value) / (base_loss - trained_loss)


def compute_forgetting_share(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Return the share of the increase in bits per byte at scale 1; None without an increase."""
    base = points[0].general_text
    trained = points[-1].general_text
    if base is None or trained is None or point.general_text is None or trained.value <= base.value:
        return None
    return (point.general_text.value - base.value) / (trained.value - base.value)


def count_right(point: ScalePoint) -> int:
    return 0 if point.right is None else round(point.right.value * point.right.n)


def recommend_scale(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """Return the scale that forgets least among those that keep most of the best gain.

    Candidates keep MIN_GAIN_SHARE of the best gain and of the right answers, and their loss lies
    within the interval of the lowest one. Without forgetting, the scale with the lowest loss. None
    if nothing is gained.
    """
    if not points:
        return None
    num_right = max(map(count_right, points)) * MIN_GAIN_SHARE
    answering = [point for point in points if count_right(point) >= num_right]
    best = min(answering, key=lambda point: point.eval_loss.value)
    best_share = compute_gain_share(points, best)
    if not best_share:
        return None
    candidates: list[ScalePoint] = []
    forgetting_shares: dict[float, float] = {}
    for point in answering:
        gain_share = compute_gain_share(points, point) or 0.0
        is_near = point.eval_loss.value <= best.eval_loss.high
        if is_near and gain_share >= MIN_GAIN_SHARE * best_share:
            candidates.append(point)
            forgetting_share = compute_forgetting_share(points, point)
            if forgetting_share is not None:
                forgetting_shares[point.scale] = forgetting_share
    if len(forgetting_shares) < len(candidates):
        return min(candidates, key=lambda point: point.eval_loss.value)
    return min(candidates, key=lambda point: (forgetting_shares[point.scale], -point.scale))


def describe_recommendation(points: Sequence[ScalePoint]) -> str:
    """Return the recommended scale in words; empty without points."""
    if not points:
        return ""
    best = recommend_scale(points)
    if best is None:
        return "no scale of the adapter lowers the held-out loss"
    if best.scale != 1:
        return f"scale {best.scale:g} {describe_tradeoff(points, best)}"
    if best.general_text is None:
        return "scale 1 is best"
    reason = "a smaller scale keeps too little of the gain or of the right answers"
    if compute_forgetting_share(points, best) is None:
        reason = "nothing was forgotten"
    return f"scale 1, the adapter as trained, is best: {reason}"


def tabulate_scales(points: Sequence[ScalePoint]) -> TextTable:
    """Return gain and forgetting by adapter scale, as shares of those at scale 1."""
    loss_name = f"{points[0].eval_loss.task} {points[0].eval_loss.metric}"
    columns = ("scale", loss_name, "gain", "right", "general bits/byte", "forgetting", "advice")
    recommended = recommend_scale(points)
    rows: list[tuple[str, ...]] = []
    for point in points:
        general = point.general_text
        forgetting = compute_forgetting_share(points, point)
        # a share says nothing where almost nothing is forgotten at scale 1
        is_gain = forgetting is not None and forgetting < -1
        rows.append(
            (
                f"{point.scale:g}",
                f"{point.eval_loss.value:.4f}",
                _format_share(compute_gain_share(points, point)),
                "-" if point.right is None else f"{count_right(point)} of {point.right.n}",
                "-" if general is None else f"{general.value:.4f}",
                "none" if is_gain else _format_share(forgetting),
                "recommended" if point is recommended else "",
            )
        )
    return TextTable("Adapter-scale trade-off", columns, tuple(rows))


def _format_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def build_commands(points: Sequence[ScalePoint], run: str) -> tuple[str, ...]:
    """Return the commands that verify the recommended scale on `test_data` and export it; none for
    the adapter as trained."""
    best = recommend_scale(points)
    if best is None or best.scale == 1:
        return ()
    compare_command = f"tunesmith compare {quote(f'{run}@{best.scale:g}')} {quote(run)}"
    return compare_command, f"tunesmith export {quote(run)} --to peft --scale {best.scale:g}"


def describe_bargain(points: Sequence[ScalePoint]) -> str:
    """Return the recommendation if it forgets much less than the adapter as trained, else empty."""
    best = recommend_scale(points)
    if best is None:
        return ""
    forgetting_share = compute_forgetting_share(points, best)
    if forgetting_share is None or forgetting_share > MAX_FORGETTING_SHARE:
        return ""
    return describe_recommendation(points)


def describe_tradeoff(points: Sequence[ScalePoint], point: ScalePoint) -> str:
    """Return the shares of gain and forgetting in words; empty if nothing is gained."""
    gain_share = compute_gain_share(points, point)
    if gain_share is None:
        return ""
    gain = f"keeps {gain_share:.0%} of the gain in {point.eval_loss.metric.replace('_', ' ')}"
    forgetting_share = compute_forgetting_share(points, point)
    if forgetting_share is not None and forgetting_share > 0:
        gain += f" at {forgetting_share:.0%} of the forgetting"
    elif forgetting_share is not None:
        gain += " and forgets nothing"
    if point.right is None or not count_right(points[-1]):
        return gain
    right = f"{count_right(point)} of {point.right.n} answers right"
    return f"{gain}, with {right} ({count_right(points[-1])} at scale {points[-1].scale:g})"
