"""How much a run computes, and how long that takes on a machine of the table.

In: the model's shape and what a run reads. Out: floating-point operations, and a range of seconds.
A product of a token with a matrix counts two operations a weight. Left out: attention over the
keys, which is little below 4k tokens, and what is measured before and after. For this machine
`--calibrate` measures instead."""

from __future__ import annotations

from tunesmith.core.types import ModelSpec, Plan, require
from tunesmith.plan.memory import count_lora_parameters

# Of the rate of bf16 products: an 8B model's LoRA on an H100 with Unsloth, 7B full with FSDP on
# H100s (speed notes).
MFU_RANGE = (0.29, 0.46)


def count_computed_tokens(plan: Plan) -> float:
    """By all steps: what is shared counts once. Padding does not exist."""
    if plan.config.stage == "cpt":
        return float(plan.steps * require(plan.config.batch_tokens))
    epochs = plan.steps * require(plan.config.batch_size) / max(1, plan.rows_per_epoch)
    read_tokens = plan.tokens_per_epoch * min(epochs, plan.config.num_train_epochs)
    ratio = plan.config.rehearsal_ratio or 0
    return read_tokens * (1 - plan.prefix_savings) / (1 - ratio)


def estimate_run_flops(plan: Plan) -> float:
    """Of all steps."""
    data, tokens = plan.data["data"], count_computed_tokens(plan)
    supervised_tokens = (
        tokens * data.supervised_tokens / max(1, data.tokens * (1 - plan.prefix_savings))
    )
    config = plan.config
    token_flops = compute_token_flops(
        plan.model, config.method, config.gradient_checkpointing, config.lora_r or 0
    )
    target_flops = compute_target_flops(plan.model, config.method)
    return token_flops * tokens + target_flops * supervised_tokens


def compute_token_flops(spec: ModelSpec, method: str, gradient_checkpointing: str, rank: int) -> float:
    """Through the layers, forward and backward: frozen weights have no gradient of their own."""
    weights = spec.block_parameters
    recompute_flops = {
        "none": 0.0,
        "selective": 4.0 * spec.num_layers * spec.hidden_size * spec.intermediate_size,
        "full": 2.0 * weights,
    }[gradient_checkpointing]
    adapter = 0 if method == "full" else 6 * count_lora_parameters(spec, rank)
    return (6 if method == "full" else 4) * weights + adapter + recompute_flops


def compute_target_flops(spec: ModelSpec, method: str) -> float:
    """Through the head, for a supervised token."""
    return (6 if method == "full" else 4) * spec.head_parameters


def estimate_seconds(plan: Plan, flops_per_second: float) -> tuple[float, float]:
    """The published range on a device of so many operations a second."""
    run_flops = estimate_run_flops(plan)
    return run_flops / flops_per_second / MFU_RANGE[1], run_flops / flops_per_second / MFU_RANGE[0]
