"""How much a run computes, and how long that takes on a preset machine.

In: a Plan. Out: floating-point operations, and a range of seconds. A matmul counts two operations
per weight and token. Left out: attention scores, which are few below 4k tokens, and evaluation. For
this machine `--benchmark` measures instead (train/calibrate.py).
"""

from __future__ import annotations

from tunesmith.core.types import ModelSpec, Plan, require
from tunesmith.plan.activations import ALL_LINEAR, EXPERTS, Targets, count_recomputed_values
from tunesmith.plan.memory import count_lora_parameters

# model FLOPs utilization: LoRA of an 8B model on an H100 with Unsloth, full 7B with FSDP on H100s
# (speed notes)
MFU_RANGE = (0.29, 0.46)


def count_computed_tokens(plan: Plan) -> float:
    """Return the tokens computed in all steps: shared prefixes count once, and there is no
    padding."""
    if plan.config.stage == "cpt":
        return float(plan.steps * require(plan.config.batch_tokens))
    epochs = plan.steps * require(plan.config.batch_size) / max(1, plan.rows_per_epoch)
    read_tokens = plan.tokens_per_epoch * min(epochs, plan.config.num_train_epochs)
    ratio = plan.config.rehearsal_ratio or 0
    return read_tokens * (1 - plan.prefix_savings) / (1 - ratio)


def estimate_run_flops(plan: Plan) -> float:
    """Return the floating-point operations of all steps."""
    data = plan.data["data"]
    tokens = count_computed_tokens(plan)
    data_tokens = max(1, data.tokens * (1 - plan.prefix_savings))
    supervised_tokens = tokens * data.supervised_tokens / data_tokens
    config = plan.config
    token_flops = compute_token_flops(
        plan.model,
        config.method,
        config.gradient_checkpointing,
        config.lora_r or 0,
        config.lora_target_modules or ALL_LINEAR,
    )
    target_flops = compute_target_flops(plan.model, config.method)
    return token_flops * tokens + target_flops * supervised_tokens


def compute_token_flops(
    spec: ModelSpec,
    method: str,
    gradient_checkpointing: str,
    rank: int,
    targets: Targets = ALL_LINEAR,
) -> float:
    """Return the operations per token in the layers, forward and backward. Frozen weights have no
    gradients, and experts that a token does not meet no work."""
    weights = spec.active_parameters
    recompute_flops = {
        "none": 0.0,
        "selective": 2.0 * spec.hidden_size * count_recomputed_values(spec),
        "full": 2.0 * weights,
    }[gradient_checkpointing]
    adapter = 0 if method == "full" else 6 * count_active_lora_parameters(spec, rank, targets)
    return (6 if method == "full" else 4) * weights + adapter + recompute_flops


def count_active_lora_parameters(spec: ModelSpec, rank: int, targets: Targets) -> float:
    """Return the parameters of an adapter that a token meets: those of few experts."""
    total = count_lora_parameters(spec, rank, targets)
    if EXPERTS not in targets or not spec.num_experts:
        return total
    of_experts = count_lora_parameters(spec, rank, EXPERTS)
    return total - of_experts * (1 - spec.num_experts_per_token / spec.num_experts)


def compute_target_flops(spec: ModelSpec, method: str) -> float:
    """Return the operations of the head per supervised token."""
    return (6 if method == "full" else 4) * spec.head_parameters


def estimate_seconds(plan: Plan, flops_per_second: float) -> tuple[float, float]:
    """Return the published range of training times on a device with this bf16 speed."""
    run_flops = estimate_run_flops(plan)
    return run_flops / flops_per_second / MFU_RANGE[1], run_flops / flops_per_second / MFU_RANGE[0]
