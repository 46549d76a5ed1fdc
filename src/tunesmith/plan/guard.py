"""What a run does when its guard finds a problem, and how often generations are probed.

In: `guard` of the recipe and the settings decided so far. Out: a PlanValue per setting. Left out:
the detectors (train/guard/detectors.py) and the probes (train/guard/probes.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tunesmith.core.types import DataReport, Plan, PlanValue
from tunesmith.plan.rules import RuleContext, make_rule_value, make_user_value
from tunesmith.recipe.fields import GuardConfig

OFF = "off"
# bits per byte: 0.05 nats per token of 3.6 bytes, the usual limit of forgetting
FORGETTING_MARGIN = 0.02
PATIENCE = 3  # evaluations
MAX_PROBE_SHARE = 0.05  # of the training time
MAX_ANSWER_SHARE = 0.15  # of it, for the answers that choose the checkpoint
MIN_PROMPTS = 8
MAX_PROMPTS = 64
PROBE_NEW_TOKENS = 32  # per answer
FORWARDS_PER_STEP = 3  # forward and backward of a training step, in forwards
# Decoding one token of each answer takes as long as a forward over so many tokens. Fitted to
# benchmarks/train/guard_probe.py on two CPU cores: 8 prompts took 4.8 steps of the demo, 16 took
# 6.6, 32 took 10.4. The number for a GPU is a guess.
DECODE_COST_TOKENS = {"cpu": 250, "cuda": 512}
# forwards over a prompt: answering, judging the answer, and scoring the expected answer, which is
# longer
PROMPT_PASSES = 4


def has_guard(plan: Plan) -> bool:
    """Return whether any detector does or reports anything."""
    return {plan.config.guard_collapse, plan.config.guard_forgetting} != {OFF}


def decide_guard(guard: GuardConfig, context: RuleContext) -> dict[str, PlanValue]:
    def choose(value: Any, by_rule: PlanValue) -> PlanValue:
        return by_rule if value == "auto" else make_user_value(value)

    collapse = "roll back to the last good checkpoint, then halve the rate or skip the bad rows"
    forgetting = "reported only: how much forgetting is acceptable is the user's decision"
    collapse_source = "ours; experiments/guard_collapse: a loss of .23 instead of 4.82 (rerun)"
    margin = "bits per byte of general text: 0.05 nats per token, the usual limit of forgetting"
    patience = "evaluations on eval_data without improvement before the run stops"
    probe_steps = choose(guard.probe_steps, decide_probe_steps(context))
    num_prompts = count_prompts(context, probe_steps.value)
    return {
        "guard_collapse": choose(
            guard.collapse, make_rule_value("rollback", collapse, collapse_source)
        ),
        "guard_forgetting": choose(guard.forgetting, make_rule_value("warn", forgetting, "ours")),
        "forgetting_margin": choose(
            guard.margin, make_rule_value(FORGETTING_MARGIN, margin, "ours")
        ),
        "patience": choose(guard.patience, make_rule_value(PATIENCE, patience, "ours")),
        "probe_steps": probe_steps,
        "probe_prompts": make_rule_value(
            num_prompts, f"at least {MIN_PROMPTS}; more if the time between probes allows"
        ),
    }


def decide_probe_steps(context: RuleContext) -> PlanValue:
    """Return the steps between two probes so that they take at most 5% of the time.

    0 for a run that is shorter than that: it is evaluated at its end anyway."""
    probe_tokens = estimate_probe_cost(context, MIN_PROMPTS)
    probe_cost = probe_tokens / estimate_step_tokens(context) / FORWARDS_PER_STEP  # in steps
    steps = math.ceil(probe_cost / MAX_PROBE_SHARE)
    cost = f"{probe_cost:.2g} steps"
    reason = (
        f"{MIN_PROMPTS} prompts of {PROBE_NEW_TOKENS} tokens take {cost}; at most 5% of the time"
    )
    if steps <= context.steps:
        return make_rule_value(steps, reason, "ours")
    unit = "step" if context.steps == 1 else "steps"
    reason = (
        f"{reason} allows none in {context.steps} {unit}; set guard: {{probe_steps: N}} to probe"
    )
    return make_rule_value(0, reason)


def count_prompts(context: RuleContext, steps: int) -> int:
    """Return how many prompts a probe can have in 5% of the time between two probes."""
    budget_tokens = MAX_PROBE_SHARE * steps * estimate_step_tokens(context) * FORWARDS_PER_STEP
    affordable = MIN_PROMPTS
    for count in range(MIN_PROMPTS, MAX_PROMPTS + 1, MIN_PROMPTS):
        if estimate_probe_cost(context, count) <= budget_tokens:
            affordable = count
    return affordable


def estimate_probe_cost(context: RuleContext, num_prompts: int) -> float:
    """Return the cost of a probe, in tokens of a forward."""
    return count_probe_tokens(
        context.machine.device, context.data, context["max_length"], num_prompts
    )


def count_probe_tokens(device: str, data: DataReport, max_length: int, num_prompts: int) -> float:
    """Return the cost of a probe, in tokens of a forward."""
    prompt_tokens = min(data.length_percentiles.get("p50", 1), max_length)
    decode_tokens = PROBE_NEW_TOKENS * max(DECODE_COST_TOKENS[device], num_prompts)
    return PROMPT_PASSES * num_prompts * prompt_tokens + decode_tokens


def count_affordable_answers(plan: Plan, lengths: Sequence[tuple[int, int]], fewest: int) -> int:
    """Return how many rows of eval_data, each (tokens of the prompt, of the answer), an evaluation
    answers in MAX_ANSWER_SHARE of the time since the one before; at least `fewest`."""
    report = plan.data["data"]
    num_rows = min(plan.config.eval_steps, plan.steps) * (plan.config.batch_size or 1)
    budget = MAX_ANSWER_SHARE * FORWARDS_PER_STEP * num_rows * report.tokens / max(1, report.rows)
    decode_tokens = DECODE_COST_TOKENS[plan.machine.device] / fewest  # of answers in one batch
    tokens = 0.0
    for count, (prompt_tokens, answer_tokens) in enumerate(lengths):
        tokens += prompt_tokens + answer_tokens * (1 + decode_tokens)
        if tokens > budget and count >= fewest:
            return count
    return len(lengths)


def estimate_step_tokens(context: RuleContext) -> float:
    if context.stage == "cpt":
        return context["batch_tokens"]
    return max(1.0, context.data.tokens / max(1, context.data.rows) * context["batch_size"])
