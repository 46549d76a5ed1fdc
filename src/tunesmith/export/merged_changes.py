"""Check that every matrix of an export has its part of what training changed.

    sample_changes(base network, changes, dtype) -> SampledChange, ... before the export is loaded
    check_changes(samples, exported network) -> ChangeCheck

A mean KL is of all matrices together: one that lost its adapter may move the answers less than
rounding does. So a few rows of each matrix are compared with the base's. The slope of their
difference over the trained change is 1 if the change is there, 0 without it, 0.5 at half the scale,
and near 0 if another layer's adapter was merged. Rounding to 4 or 8 bits adds noise, which the
standard error counts. Where weights are rounded to 16 bits, so is the expected change: one of less
than half a unit is lost in a correct export, too. Where rounding hides a lost change, the parameter
is counted as unchecked. A change of 0, of an expert that no token chose, cannot be lost.
The change is computed from the adapter's tensors here, not by the code that merges.
Legend: K sampled rows, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tunesmith.model.expert_adapters import ExpertLoraTensors, has_transposed_stacks
from tunesmith.model.merge import WeightDeltas
from tunesmith.model.save import (
    LoraTensors,
    ModuleTensor,
    TokenRowTensors,
    get_merge_target,
)

MAX_ROWS = 16  # of a matrix
MAX_EXPERTS = 4  # of a stack
MAX_SHARE_ERROR = 0.05
MAX_STANDARD_ERRORS = 6.0  # of a few hundred matrices, none is beyond by chance


@dataclass(frozen=True, eq=False)
class SampledChange:
    """Rows of a parameter in the base, and what training adds to them."""

    key: str  # as in `WeightDeltas`
    rows_K: Tensor
    base_KI: Tensor
    change_KI: Tensor
    expert: int | None = None  # of a stack
    dtype: torch.dtype | None = None  # what the export rounds to, if it does


@dataclass(frozen=True)
class LostChange:
    """A parameter of an export that has another share of its change than 1."""

    key: str
    share: float


@dataclass(frozen=True)
class ChangeCheck:
    """The parameters that lack a part of their change, each once; how many training changed, and in
    how many of them a lost change could not be told from rounding."""

    lost: tuple[LostChange, ...]
    changed: int
    unchecked: int


def sample_changes(
    network: nn.Module, changes: WeightDeltas, dtype: torch.dtype | None
) -> tuple[SampledChange, ...]:
    """Return rows of every parameter of the base that training changed by what fp32 can show.

    dtype: what the weights of the export are rounded to; None if they are not. Some may not be."""
    samples: list[SampledChange] = []
    for key, delta in changes.items():
        parameter = get_merge_target(network, key).detach()
        if not isinstance(delta, ExpertLoraTensors):
            samples.append(_sample_matrix(key, delta, _to_rows(parameter)))
            continue
        for expert in _choose_rows(len(parameter), MAX_EXPERTS).tolist():
            lora = LoraTensors(delta.a_ERI[expert], delta.b_EOR[expert], delta.scale)
            matrix_OI = _get_rows(network, key, expert)
            samples.append(replace(_sample_matrix(key, lora, matrix_OI), expert=expert))
    return tuple(replace(sample, dtype=dtype) for sample in samples if sample.change_KI.any())


def check_changes(samples: Sequence[SampledChange], network: nn.Module) -> ChangeCheck:
    """Compare the parameters of an export with the base and with what training added."""
    lost: dict[str, LostChange] = {}
    checked: set[str] = set()
    for sample in samples:
        exported_KI = _get_rows(network, sample.key, sample.expert)[sample.rows_K].float().cpu()
        slopes = [_measure_slope(sample, exported_KI, None)]
        if sample.dtype is not None:
            slopes.append(_measure_slope(sample, exported_KI, sample.dtype))
        if not any(abs(share - 1) <= tolerance for share, tolerance in slopes):
            lost.setdefault(sample.key, LostChange(sample.key, slopes[0][0]))
        if all(tolerance < 1 for _, tolerance in slopes):
            checked.add(sample.key)
    changed = {sample.key for sample in samples}
    return ChangeCheck(tuple(lost.values()), len(changed), len(changed - checked))


def _get_rows(network: nn.Module, key: str, expert: int | None) -> Tensor:
    """Return the parameter that a delta changes as a matrix [O, I], of one expert of a stack."""
    parameter = get_merge_target(network, key).detach()
    if expert is None:
        return _to_rows(parameter)
    return parameter[expert].t() if has_transposed_stacks(network, key) else parameter[expert]


def _to_rows(parameter: Tensor) -> Tensor:
    """Return a parameter as a matrix [O, I], a vector as one column."""
    return parameter.reshape(len(parameter), -1)


def _choose_rows(count: int, limit: int) -> Tensor:
    """Return at most `limit` of `count` indices, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


def _sample_matrix(
    key: str, delta: LoraTensors | TokenRowTensors | ModuleTensor, matrix_OI: Tensor
) -> SampledChange:
    if isinstance(delta, TokenRowTensors):
        rows_K = delta.first_id + _choose_rows(len(delta.rows_KH), MAX_ROWS)
    else:
        rows_K = _choose_rows(len(matrix_OI), MAX_ROWS)
    base_KI = matrix_OI[rows_K].float().cpu()
    if isinstance(delta, LoraTensors):
        trained_KI = _adapt_rows(delta, rows_K, base_KI)
    elif isinstance(delta, TokenRowTensors):
        trained_KI = delta.rows_KH[rows_K - delta.first_id]
    else:
        trained_KI = _to_rows(delta.tensor)[rows_K]
    return SampledChange(key, rows_K, base_KI, trained_KI.float().cpu() - base_KI)


def _adapt_rows(lora: LoraTensors, rows_K: Tensor, base_KI: Tensor) -> Tensor:
    """Return rows of W + scale * B A, with DoRA at their trained lengths."""
    adapted_KI = base_KI + lora.scale * torch.einsum("kr,ri->ki", lora.b_OR[rows_K], lora.a_RI)
    if lora.magnitude_O is None:
        return adapted_KI
    return torch.nn.functional.normalize(adapted_KI, dim=1) * lora.magnitude_O[rows_K, None]


def _measure_slope(
    sample: SampledChange, exported_KI: Tensor, dtype: torch.dtype | None
) -> tuple[float, float]:
    """Return the slope of what an export has more than the base over the trained change, and how
    far from 1 it may be. A change that rounding leaves nothing of has the slope 1 if the export has
    nothing of it either."""
    base_KI = sample.base_KI
    trained_KI = base_KI + sample.change_KI
    if dtype is not None:
        base_KI = base_KI.to(dtype)
        trained_KI = trained_KI.to(dtype)
    change = (trained_KI.double() - base_KI.double()).flatten()
    difference = (exported_KI.double() - base_KI.double()).flatten()
    energy = float(change @ change)
    if not energy:
        return (0.0, MAX_SHARE_ERROR) if difference.any() else (1.0, math.inf)
    slope = float(difference @ change) / energy
    residual = difference - slope * change
    standard_error = float((residual @ residual / len(residual) / energy).sqrt())
    return slope, MAX_SHARE_ERROR + MAX_STANDARD_ERRORS * standard_error
