"""What a run does about what it sees of itself, and when it looks.

In: the `guard` of the recipe and what is decided already. Out: a Choice a key. Pure. Left out: what
a collapse is (train/guard.py), how it is seen (probes.py)."""

from __future__ import annotations

import math
from typing import Any

from tunesmith.core.types import DataReport, Plan, PlanValue
from tunesmith.plan.rules import RuleContext, rule_value
from tunesmith.recipe.fields import GuardConfig

OFF = "off"
# bits per byte: 0.05 nats a token of 3.6 bytes, the usual bound of what may be forgotten
FORGETTING_MARGIN = 0.02
MAX_PROBE_SHARE = 0.05  # of the time of the steps, that probes may take
MIN_PROMPTS, MAX_PROMPTS = 8, 64
PROBE_NEW_TOKENS = 32  # of an answer, one forward each
FORWARDS_PER_STEP = 3  # a step's forward and backward, in forwards
# Tokens that would be computed in the time of one forward for the next ones, and passes over a
# prompt (to answer it, to judge the answer, to read what was expected, which is longer). Fitted to
# benchmarks/train/guard_probe.py on two cores of a CPU: 8 prompts took 4.8 steps of the demo, 16
# took 6.6, 32 took 10.4. Of a GPU it is a guess.
DECODE_COST_TOKENS = {"cpu": 250, "cuda": 512}
PROMPT_PASSES = 4


def has_guard(plan: Plan) -> bool:
    """Is anything done or said about what is seen?"""
    return {plan.config.guard_collapse, plan.config.guard_forgetting} != {OFF}


def decide_guard(guard: GuardConfig, context: RuleContext) -> dict[str, PlanValue]:
    def choose(value: Any, by_rule: PlanValue) -> PlanValue:
        return by_rule if value == "auto" else PlanValue(value, "user", "the recipe says so")

    margin_reason = (
        "bits per byte of general text: 0.05 nats a token, the usual bound of what may be forgotten"
    )
    rollback_reason = "go back to the last good checkpoint and on with half the learning rate, or without the rows at fault"
    warn_reason = "said, not stopped: how much may be forgotten for what is learnt is yours to say"
    patience_reason = "looks at eval_data without a better one, then the run ends"
    by_rule = decide_probe_steps(context)
    steps = choose(guard.probe_steps, by_rule)
    return {
        "guard_collapse": choose(guard.collapse, rule_value("rollback", rollback_reason, "ours")),
        "guard_forgetting": choose(guard.forgetting, rule_value("warn", warn_reason, "ours")),
        "forgetting_margin": choose(
            guard.margin, rule_value(FORGETTING_MARGIN, margin_reason, "ours")
        ),
        "patience": choose(guard.patience, rule_value(3, patience_reason, "ours")),
        "probe_steps": steps,
        "probe_prompts": rule_value(
            count_prompts(context, steps.value),
            f"the least are {MIN_PROMPTS}; more where they cost nothing",
        ),
    }


def decide_probe_steps(context: RuleContext) -> PlanValue:
    """So rarely that probes take at most 5% of the time. Of a shorter run than that there is none,
    but at its end there are the measures."""
    steps_per_probe = (
        estimate_probe_cost(context, MIN_PROMPTS)
        / estimate_step_tokens(context)
        / FORWARDS_PER_STEP
    )
    steps = math.ceil(steps_per_probe / MAX_PROBE_SHARE)
    reason = f"{MIN_PROMPTS} prompts and {PROBE_NEW_TOKENS} tokens each take {steps_per_probe:.2g} steps, and may take 5% of the time"
    if steps > context.steps:
        return rule_value(
            0,
            f"{reason}: none in {context.steps} steps; guard: {{probe_steps: N}} takes some all the same",
        )
    return rule_value(steps, reason, "ours")


def count_prompts(context: RuleContext, steps: int) -> int:
    """As many as 5% of the time between two probes pays for."""
    budget_tokens = MAX_PROBE_SHARE * steps * estimate_step_tokens(context) * FORWARDS_PER_STEP
    affordable = [
        count
        for count in range(MIN_PROMPTS, MAX_PROMPTS + 1, MIN_PROMPTS)
        if estimate_probe_cost(context, count) <= budget_tokens
    ]
    return max(affordable, default=MIN_PROMPTS)


def estimate_probe_cost(context: RuleContext, count: int) -> float:
    """In tokens of a forward."""
    return count_probe_tokens(context.machine.device, context.data, context["max_length"], count)


def count_probe_tokens(device: str, data: DataReport, max_length: int, count: int) -> float:
    prompt_tokens = min(data.length_percentiles.get("p50", 1), max_length)
    return PROMPT_PASSES * count * prompt_tokens + PROBE_NEW_TOKENS * max(
        DECODE_COST_TOKENS[device], count
    )


def estimate_step_tokens(context: RuleContext) -> float:
    if context.stage == "cpt":
        return context["batch_tokens"]
    return max(1.0, context.data.tokens / max(1, context.data.rows) * context["batch_size"])
