"""How long a run takes on a GPU that is not there, from start to end.

In: a plan for a preset, and the preset's data sheet. Out: a range for the steps, and the time with
start, preflight and evaluation. Products take the published share of the bf16 rate; below that, a
step takes the time to launch its kernels, and a token of an answer the time to read the weights.
The constants are assumptions, not measured on a GPU. Left out: what this machine measures
(train/time_estimate.py)."""

from __future__ import annotations

import dataclasses
import math

from tunesmith.core.types import DataReport, ModelSpec, Plan
from tunesmith.plan.flops import MFU_RANGE, compute_token_flops, estimate_seconds
from tunesmith.plan.hardware_presets import HardwarePreset
from tunesmith.plan.memory import GENERAL_TEXT_TOKENS
from tunesmith.plan.memory_budget import MAX_BATCH_ROWS

IMPORT_SECONDS = 12.0  # Python, torch, transformers and the CUDA context
READ_BYTES_PER_SECOND = 1e9  # of the weight files
LAUNCH_SECONDS = 8e-6  # per kernel
# kernels per layer; a backward pass takes less than twice as many (tests/fakecuda counts 64 in all)
FORWARD_LAUNCHES = 25
PREFLIGHT_TOKENS = 6000  # as in train/time_estimate.py
PREFLIGHT_FORWARDS = 12


def estimate_gpu_time(plan: Plan, preset: HardwarePreset) -> Plan:
    """Return the plan with the time of its steps, as a range, and that of the run at most."""
    if plan.mesh is not None and plan.mesh.mesh.num_gpus > 1:
        seconds = tuple(plan.steps * value for value in plan.mesh.step.seconds)
    else:
        floor = 3 * compute_launch_seconds(plan.model) * plan.steps
        seconds = tuple(value + floor for value in estimate_seconds(plan, preset.flops))
    low, high = (f"{100 * share:.0f}%" for share in MFU_RANGE)
    return dataclasses.replace(
        plan,
        seconds=seconds,
        seconds_source=f"at {low} to {high} of its bf16 rate, published for well-tuned runs",
        total_seconds=seconds[-1] + _estimate_other_seconds(plan, preset),
    )


def compute_launch_seconds(model: ModelSpec) -> float:
    """Return the least time of a forward pass, however few its tokens are."""
    return model.num_layers * FORWARD_LAUNCHES * LAUNCH_SECONDS


def _estimate_other_seconds(plan: Plan, preset: HardwarePreset) -> float:
    """Return the time of start, preflight and evaluation."""
    start = IMPORT_SECONDS + 2 * plan.model.parameters / READ_BYTES_PER_SECOND
    forward_flops = compute_token_flops(plan.model, "lora", "none", 0) / 2
    token_seconds = forward_flops / preset.flops / MFU_RANGE[0]
    tokens = PREFLIGHT_TOKENS
    forwards = PREFLIGHT_FORWARDS
    if plan.recipe.get("retention_data"):
        tokens += 3 * GENERAL_TEXT_TOKENS  # before, after, and once more for the divergence
    decode_seconds = 0.0
    if test := plan.data.get("test_data"):
        tokens += 3 * test.tokens
        decode_seconds = 2 * _estimate_decode_seconds(plan, preset, test)
    if held_out := plan.data.get("eval_data"):
        evaluations = math.ceil(plan.steps / plan.config.eval_steps)
        tokens += evaluations * held_out.tokens
        forwards += evaluations
    forwards += math.ceil(tokens / plan.config.pack_length)
    launch = forwards * compute_launch_seconds(plan.model)
    return start + tokens * token_seconds + launch + decode_seconds


def _estimate_decode_seconds(plan: Plan, preset: HardwarePreset, test: DataReport) -> float:
    """Return the time to answer the test prompts once: a batch ends with its longest answer."""
    if plan.config.stage == "cpt" or not test.rows:
        return 0.0
    answer_share = test.supervised_tokens / max(1, test.tokens)
    longest = 1 + answer_share * test.length_percentiles.get("max", test.tokens / test.rows)
    steps = 1.5 * longest * math.ceil(test.rows / MAX_BATCH_ROWS["cuda"])
    read_seconds = 2 * plan.model.parameters / preset.bandwidth
    return steps * max(read_seconds, compute_launch_seconds(plan.model))
