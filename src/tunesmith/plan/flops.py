"""How much a run computes, and how long that takes on a machine of the table.

In: the model's shape and what a run reads. Out: floating-point operations, and a range of seconds. A product of a token
with a matrix counts two operations a weight. Left out: attention over the keys, which is little below 4k tokens, and
what is measured before and after. For this machine `--calibrate` measures instead.
"""

from __future__ import annotations

from tunesmith.core.types import ModelSpec, Plan
from tunesmith.plan.memory import lora_parameters

# Of the rate of bf16 products: an 8B model's LoRA on an H100 with Unsloth, 7B full with FSDP on H100s (speed notes).
SHARES = (0.29, 0.46)


def tokens_computed(plan: Plan) -> float:
    """By all steps: what is shared counts once. Padding does not exist."""
    if plan["stage"] == "cpt":
        return float(plan.steps * plan["batch_tokens"])
    rows = plan.rows_per_epoch
    seen = plan.tokens_per_epoch * min(plan.steps * plan["batch_size"] / max(1, rows), plan["num_train_epochs"])
    ratio = plan.choices["rehearsal_ratio"].value if "rehearsal_ratio" in plan.choices else 0
    return seen * (1 - plan.saved_share) / (1 - ratio)


def run_flops(plan: Plan) -> float:
    """Of all steps."""
    data, tokens = plan.data["data"], tokens_computed(plan)
    supervised = tokens * data.supervised_tokens / max(1, data.tokens * (1 - plan.saved_share))
    rank = plan.choices["lora_r"].value if "lora_r" in plan.choices else 0
    return token_flops(plan.model, plan["method"], plan["activations"], rank) * tokens + (
        target_flops(plan.model, plan["method"]) * supervised
    )


def token_flops(spec: ModelSpec, method: str, activations: str, rank: int) -> float:
    """Through the layers, forward and backward: frozen weights have no gradient of their own."""
    weights = spec.block_parameters
    again = {
        "keep": 0.0,
        "selective": 4.0 * spec.num_layers * spec.hidden_size * spec.intermediate_size,
        "recompute": 2.0 * weights,
    }[activations]
    adapter = 0 if method == "full" else 6 * lora_parameters(spec, rank)
    return (6 if method == "full" else 4) * weights + adapter + again


def target_flops(spec: ModelSpec, method: str) -> float:
    """Through the head, for a supervised token."""
    return (6 if method == "full" else 4) * spec.head_parameters


def seconds_on(plan: Plan, flops: float) -> tuple[float, float]:
    """The published range on a device of so many operations a second."""
    work = run_flops(plan)
    return work / flops / SHARES[1], work / flops / SHARES[0]
