"""Checks of the base model as it was loaded: the oracle, and what its packed weights lose.

In: PreflightSamples. Out: CheckResults. The other checks take transformers' forward without a cache
for the truth. Should that be wrong (one version ignored the layers of Gemma 4 that share keys when
no cache was asked for), ours would agree with it and nothing would be noticed. So transformers is
compared with itself: its forward with a cache, and its last token from the cache alone. Left out:
our forward (preflight.py)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.session.preflight_probe import OracleLogits, PreflightSamples
from tunesmith.train.preflight_tokens import REPORT_FIX

# Largest relative RMS difference of centered logits between two forwards of the stock model. Other
# shapes of products round otherwise, which a router that changes its mind amplifies; a forward that
# leaves something out differs by about 100%.
ORACLE_TOLERANCE = {
    torch.bfloat16: 0.2,
    torch.float16: 0.05,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
KIND = "transformers with its cache = without"


def check_oracle(samples: PreflightSamples, dtype: torch.dtype) -> CheckResult:
    """Check that the stock model gives the same logits without and with its cache."""
    oracle = samples.oracle
    if isinstance(oracle, str):
        return CheckResult.from_items(KIND, 0, "", if_none=oracle)
    where = f"preflight: {oracle.document_id}"
    if not oracle.plain_PV.isfinite().all():
        raise GateError(
            "the base model computes NaN or infinite values, in transformers, too",
            where=where,
            fix="download the model again: a number of its config.json or its weights are wrong",
        )
    error = compare_logits(oracle.cached_PV, oracle.plain_PV)
    if not error <= ORACLE_TOLERANCE[dtype]:  # also refuses NaN
        raise GateError(
            f"transformers' logits with and without its KV cache differ by {error:.1%} of their "
            "norm, so it cannot serve as the reference",
            where=where,
            fix=f"install another version of transformers; {REPORT_FIX}",
        )
    num_positions = len(oracle.plain_PV)
    evidence = (
        f"relative difference {error:.2%} at {num_positions} positions, the last one from the "
        f"cache; document of {oracle.num_tokens} tokens"
    )
    return CheckResult.from_items(KIND, num_positions, evidence, if_none="there is no document")


def compare_logits(logits_PV: Tensor, expected_PV: Tensor) -> float:
    """Return the difference of centered logits relative to the norm of the expected ones."""
    centered_PV = expected_PV - expected_PV.mean(-1, keepdim=True)
    difference_PV = logits_PV - logits_PV.mean(-1, keepdim=True) - centered_PV
    return float(difference_PV.norm() / centered_PV.norm())


def break_oracle(samples: PreflightSamples) -> PreflightSamples:
    """Return samples whose cache has lost the last token: it repeats the logits before."""
    if isinstance(samples.oracle, str):
        return samples
    broken_PV = samples.oracle.cached_PV.clone()
    broken_PV[-1] = broken_PV[0]
    oracle = dataclasses.replace(samples.oracle, cached_PV=broken_PV)
    return dataclasses.replace(samples, oracle=oracle)


def explain_unbreakable(oracle: OracleLogits | str, dtype: torch.dtype) -> str:
    """Return why the fault of `break_oracle` cannot be noticed, empty if it can."""
    if isinstance(oracle, str):
        return oracle
    changed = torch.cat((oracle.plain_PV[:-1], oracle.plain_PV[:1]))
    change = compare_logits(changed, oracle.plain_PV)
    # the fault repeats logits that differ by the rounding already
    rounding = 2 * compare_logits(oracle.cached_PV, oracle.plain_PV)
    is_noticed = change > ORACLE_TOLERANCE[dtype] + rounding
    return "" if is_noticed else "the last two tokens have similar logits"


def describe_rounding(samples: PreflightSamples) -> CheckResult:
    """Say what the weights of an FP8 checkpoint lose in the dtype of the model."""
    rounding = samples.rounding
    assert rounding is not None, "the checkpoint has no FP8 weights"
    evidence = (
        f"rounded to {rounding.dtype_name}, mean relative error "
        f"{rounding.mean_relative_error:.2%}; measured on {rounding.num_measured} of "
        f"{rounding.num_matrices} matrices"
    )
    return CheckResult.from_items(
        "FP8 weights", rounding.num_measured, evidence, if_none="there is no FP8 matrix"
    )
