"""How long a run takes on a GPU that is not there, from start to end.

In: a plan for a preset, and the preset's data sheet. Out: a range for the steps, and the time with
start, preflight and evaluation. Products take the published share of the bf16 rate; below that, a
step takes the time to launch its kernels, and a token of an answer the time to read the weights.
Several GPUs divide the rows of a step, and then wait for what they send. The constants are
assumptions, not measured on a GPU. Left out: what this machine measures (train/time_estimate.py),
overlap of computing and sending, and the exchanges of GPUs that share a document."""

from __future__ import annotations

import dataclasses
import math

from tunesmith.core.mesh import SINGLE_GPU, Mesh
from tunesmith.core.types import DataReport, ModelSpec, Plan
from tunesmith.plan.activations import ALL_LINEAR
from tunesmith.plan.flops import (
    MFU_RANGE,
    compute_token_flops,
    count_computed_tokens,
    estimate_seconds,
)
from tunesmith.plan.hardware_presets import HardwarePreset
from tunesmith.plan.memory import (
    BUILT_IN_TOKENS,
    GENERAL_TEXT_TOKENS,
    GRADIENT_BYTES,
    MASTER_BYTES,
    MAX_BATCH_ROWS,
    compute_frozen_bytes,
    count_lora_parameters,
    get_dtype_bytes,
)
from tunesmith.recipe.fields import BUILT_IN, NO_DATA

IMPORT_SECONDS = 12.0  # Python, torch, transformers and the CUDA context
READ_BYTES_PER_SECOND = 1e9  # of the weight files
LAUNCH_SECONDS = 8e-6  # per kernel
# kernels per layer; a backward pass takes less than twice as many (tests/fakecuda counts 64 in all)
FORWARD_LAUNCHES = 25
PREFLIGHT_TOKENS = 6000  # as in train/time_estimate.py
PREFLIGHT_FORWARDS = 12
GATHERS = 2  # of sharded weights in a pack: forward and backward


def estimate_gpu_time(plan: Plan, preset: HardwarePreset) -> Plan:
    """Return the plan with the time of its steps, as a range, and that of the run at most."""
    mesh = SINGLE_GPU if plan.mesh is None else plan.mesh.mesh
    share = _compute_largest_share(plan, mesh)
    floor = plan.steps * (
        3 * compute_launch_seconds(plan.model) + _estimate_sending(plan, preset, mesh, share)
    )
    seconds = tuple(share * value + floor for value in estimate_seconds(plan, preset.flops))
    low, high = (f"{100 * share:.0f}%" for share in MFU_RANGE)
    return dataclasses.replace(
        plan,
        seconds=seconds,
        seconds_source=f"at {low} to {high} of its bf16 rate, published for well-tuned runs",
        total_seconds=seconds[-1] + _estimate_other_seconds(plan, preset),
    )


def _compute_largest_share(plan: Plan, mesh: Mesh) -> float:
    """Return the share of a step that the busiest GPU computes: a row is not divided."""
    if mesh.document_groups == 1:
        return 1 / mesh.context
    row_tokens = plan.data["data"].length_percentiles.get("p90", 1)
    if plan.config.stage == "cpt":
        row_tokens = plan.config.max_length
    elif plan.config.stage == "preference":
        row_tokens *= 2
    step_tokens = max(1.0, count_computed_tokens(plan) / plan.steps)
    return min(1.0, max(1 / mesh.document_groups, row_tokens / step_tokens)) / mesh.context


def _estimate_sending(plan: Plan, preset: HardwarePreset, mesh: Mesh, share: float) -> float:
    """Return the seconds of a step in which GPUs sum gradients and gather sharded weights."""
    if mesh.num_gpus == 1:
        return 0.0
    model = plan.model
    config = plan.config
    if config.method == "full":
        num_trained = model.parameters
        weight_bytes = float(MASTER_BYTES * model.block_parameters)
    else:
        targets = config.lora_target_modules or ALL_LINEAR
        num_trained = count_lora_parameters(model, config.lora_r or 0, targets)
        dtype_bytes = get_dtype_bytes(config.dtype)
        rest_bytes = (model.parameters - model.block_parameters) * dtype_bytes
        weight_bytes = compute_frozen_bytes(model, config.method, dtype_bytes) - rest_bytes
    moved_bytes = 2 * GRADIENT_BYTES * num_trained  # an all-reduce sends and receives
    tokens = share * mesh.context * count_computed_tokens(plan) / plan.steps
    packs = math.ceil(tokens / config.pack_length)
    moved_bytes += GATHERS * packs * weight_bytes * (mesh.shard - 1) / mesh.shard
    return moved_bytes / (preset.network if mesh.num_nodes > 1 else preset.link)


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
    if (source := plan.recipe.get("retention_data")) not in (None, NO_DATA):
        general_tokens = BUILT_IN_TOKENS if source == BUILT_IN else GENERAL_TEXT_TOKENS
        tokens += 3 * general_tokens  # before, after, and once more for the divergence
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
