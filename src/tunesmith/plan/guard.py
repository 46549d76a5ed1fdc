"""What a run does about what it sees of itself, and when it looks.

In: the `guard` of the recipe and what is decided already. Out: a Choice a key. Pure. Left out: what a collapse is
(train/guard.py), how it is seen (probes.py).
"""

from __future__ import annotations

import math
from typing import Any

from tunesmith.core.types import Choice, DataReport, Plan
from tunesmith.plan.rules import Known, rule
from tunesmith.recipe.mappings import Guard

OFF = "off"
MARGIN = 0.02  # bits per byte: 0.05 nats a token of 3.6 bytes, the usual bound of what may be forgotten
SHARE = 0.05  # of the time of the steps, that probes may take
PROMPTS, MOST_PROMPTS = 8, 64
NEW_TOKENS = 32  # of an answer, one forward each
STEP_FORWARDS = 3  # a step's forward and backward, in forwards
# Tokens that would be computed in the time of one forward for the next ones, and passes over a prompt (to answer it, to
# judge the answer, to read what was expected, which is longer). Fitted to benchmarks/probe.py on two cores of a CPU: 8
# prompts took 4.8 steps of the demo, 16 took 6.6, 32 took 10.4. Of a GPU it is a guess.
DECODE_TOKENS = {"cpu": 250, "cuda": 512}
PASSES = 4


def guards(plan: Plan) -> bool:
    """Is anything done or said about what is seen?"""
    return {plan["guard_collapse"], plan["guard_forgetting"]} != {OFF}


def guard_choices(wish: Guard, known: Known) -> dict[str, Choice]:
    def chosen(value: Any, by_rule: Choice) -> Choice:
        return by_rule if value == "auto" else Choice(value, "you", "the recipe says so")

    margin = "bits per byte of general text: 0.05 nats a token, the usual bound of what may be forgotten"
    back = "go back to the last good checkpoint and on with half the learning rate, or without the rows at fault"
    warn = "said, not stopped: how much may be forgotten for what is learnt is yours to say"
    looks = "looks at eval_data without a better one, then the run ends"
    by_rule = probe_steps(known)
    steps = chosen(wish.probe_steps, by_rule)
    return {
        "guard_collapse": chosen(wish.collapse, rule("rollback", back, "ours")),
        "guard_forgetting": chosen(wish.forgetting, rule("warn", warn, "ours")),
        "forgetting_margin": chosen(wish.margin, rule(MARGIN, margin, "ours")),
        "patience": chosen(wish.patience, rule(3, looks, "ours")),
        "probe_steps": steps,
        "probe_prompts": rule(prompts(known, steps.value), f"the least are {PROMPTS}; more where they cost nothing"),
    }


def probe_steps(known: Known) -> Choice:
    """So rarely that probes take at most 5% of the time. Of a shorter run than that there is none, but at its end there
    are the measures."""
    each = probe_cost(known, PROMPTS) / step_tokens(known) / STEP_FORWARDS
    steps = math.ceil(each / SHARE)
    told = f"{PROMPTS} prompts and {NEW_TOKENS} tokens each take {each:.2g} steps, and may take 5% of the time"
    if steps > known.steps:
        return rule(0, f"{told}: none in {known.steps} steps; guard: {{probe_steps: N}} takes some all the same")
    return rule(steps, told, "ours")


def prompts(known: Known, steps: int) -> int:
    """As many as 5% of the time between two probes pays for."""
    allowed = SHARE * steps * step_tokens(known) * STEP_FORWARDS
    most = [n for n in range(PROMPTS, MOST_PROMPTS + 1, PROMPTS) if probe_cost(known, n) <= allowed]
    return max(most, default=PROMPTS)


def probe_cost(known: Known, count: int) -> float:
    """In tokens of a forward."""
    return probe_tokens(known.machine.device, known.data, known["max_length"], count)


def probe_tokens(device: str, data: DataReport, max_length: int, count: int) -> float:
    prompt = min(data.length_percentiles.get("p50", 1), max_length)
    return PASSES * count * prompt + NEW_TOKENS * max(DECODE_TOKENS[device], count)


def step_tokens(known: Known) -> float:
    if known.stage == "cpt":
        return known["batch_tokens"]
    return max(1.0, known.data.tokens / max(1, known.data.rows) * known["batch_size"])
