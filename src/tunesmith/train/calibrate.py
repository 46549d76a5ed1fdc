"""Measure how long a plan's steps take on this machine: `plan --benchmark`.

In: a plan and its inputs. Out: the plan with its training time and how that was measured.

Real steps of the plan run on a model with one layer and with a few layers, with random weights. The
difference is the cost of a layer; the rest is the cost of embeddings, head and update. So the
weights need be neither present nor fit in memory. Left out: the rest of a run
(time_estimate.py)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document, Plan
from tunesmith.model.causal_lm import DTYPES
from tunesmith.plan.flops import compute_token_flops, count_computed_tokens, estimate_run_flops
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import open_truncated_session
from tunesmith.train.loop import TrainingLoop

SECONDS_PER_DEPTH = 2.5  # of steps, for each of the two depths
MAX_STEPS = 8
MAX_LAYERS = 6
MAX_STEP_FLOPS = 2e12  # larger steps are cut to fewer rows
GEMM_TOKENS = 2048
MIN_SECONDS = 0.4


@dataclass(frozen=True)
class Calibration:
    """Measured speeds; seconds are per computed token."""

    layer_seconds: float
    other_seconds: float  # embeddings, head and update
    depths: tuple[int, int]  # layers of the two measured models
    steps: int
    gemm_flops: float  # FLOP/s of a matrix product as wide as the model's MLP

    def compute_token_seconds(self, layers: int) -> float:
        return self.other_seconds + layers * self.layer_seconds


def calibrate_plan(plan: Plan, inputs: RunInputs) -> Plan:
    """Return the plan with a measured training time.

    Raise MachineError if two layers do not fit, InputError if the plan is for another machine."""
    calibration = measure_calibration(plan, inputs)
    layers = plan.model.num_layers
    seconds = count_computed_tokens(plan) * calibration.compute_token_seconds(layers)
    utilization = estimate_run_flops(plan) / seconds / calibration.gemm_flops
    shallow, deep = calibration.depths
    source = (
        f"measured: {calibration.steps} steps of {shallow} and {deep} of {layers} layers, "
        f"{utilization:.0%} of the {calibration.gemm_flops / 1e9:,.0f} GFLOP/s of matrix products"
    )
    return dataclasses.replace(plan, seconds=(seconds,), seconds_source=source)


def measure_calibration(plan: Plan, inputs: RunInputs) -> Calibration:
    """Measure steps at two depths; raise as calibrate_plan."""
    if plan.machine.device != "cpu":
        raise InputError(
            "only the CPU of this machine can be benchmarked",
            where="--benchmark",
            fix="omit --target",
        )
    shallow = 1
    deep = choose_depth(
        plan.model.layer_mixers,
        max(2, min(MAX_LAYERS, plan.model.num_layers, _count_fitting_layers(plan))),
    )
    truncate = _make_truncator(plan, deep)
    shallow_seconds, shallow_steps = _measure_token_seconds(plan, inputs, shallow, truncate)
    deep_seconds, deep_steps = _measure_token_seconds(plan, inputs, deep, truncate)
    layer_seconds = max((deep_seconds - shallow_seconds) / (deep - shallow), 0.0)
    return Calibration(
        layer_seconds=layer_seconds,
        other_seconds=max(shallow_seconds - shallow * layer_seconds, 0.0),
        depths=(shallow, deep),
        steps=shallow_steps + deep_steps,
        gemm_flops=_measure_gemm_flops(plan),
    )


def choose_depth(layer_mixers: Sequence[str], max_layers: int) -> int:
    """Return how many layers the deeper model has: after the first, entire repetitions of the
    pattern of mixers, so that the difference is that of an average layer; `max_layers` if the
    pattern does not repeat within them."""
    for period in range(1, max_layers):
        repeated = zip(layer_mixers, layer_mixers[period:], strict=False)
        if all(mixer == later for mixer, later in repeated):
            return 1 + (max_layers - 1) // period * period
    return max_layers


def _count_fitting_layers(plan: Plan) -> int:
    """Return how many layers fit in half of the free memory; raise MachineError for fewer than
    2."""
    spec = plan.model
    bytes_per_parameter = 20 if plan.config.method == "full" else 4
    embedding_bytes = bytes_per_parameter * (spec.parameters - spec.block_parameters)
    layer_bytes = bytes_per_parameter * spec.block_parameters / spec.num_layers
    layers = int((plan.machine.available_bytes / 2 - embedding_bytes) / layer_bytes)
    if layers < 2:
        raise MachineError(
            f"two layers and the embeddings of {spec.name} need more than half of the free memory",
            where="--benchmark",
            fix="free memory, or omit --benchmark",
        )
    return layers


def _make_truncator(plan: Plan, layers: int) -> Callable[[Sequence[Document]], Sequence[Document]]:
    """Return a function that cuts a step to about a second of documents; pairs stay together."""
    config = plan.config
    token_flops = compute_token_flops(plan.model, config.method, config.gradient_checkpointing, 0)
    max_tokens = max(256, int(MAX_STEP_FLOPS / (token_flops * layers / plan.model.num_layers)))

    def truncate_documents(documents: Sequence[Document]) -> Sequence[Document]:
        tokens = 0
        for end, document in enumerate(documents):
            if tokens >= max_tokens and document.side != "rejected":
                return documents[:end]
            tokens += len(document)
        return documents

    return truncate_documents


def _measure_token_seconds(
    plan: Plan,
    inputs: RunInputs,
    layers: int,
    truncate: Callable[[Sequence[Document]], Sequence[Document]],
) -> tuple[float, int]:
    """Return the seconds per computed token, and the number of measured steps.

    The first step allocates what later ones reuse, and is not counted."""
    session = open_truncated_session(plan, inputs, layers)
    training = TrainingLoop(
        session.model,
        lambda step: truncate(session.load_documents(step)),
        plan.config,
        steps=plan.steps,
    )
    steps: list[TrainStep] = []
    for event in training:
        if isinstance(event, TrainStep):
            steps.append(event)
            seconds = sum(step.seconds for step in steps[1:])
            if len(steps) > MAX_STEPS or seconds > SECONDS_PER_DEPTH:
                training.stop()
    counted = steps[1:] or steps
    seconds = sum(step.seconds for step in counted)
    tokens = sum(step.tokens - step.shared_tokens for step in counted)
    return seconds / max(1, tokens), len(counted)


def _measure_gemm_flops(plan: Plan) -> float:
    """Return the FLOP/s of a frozen layer's matrix product."""
    dtype = DTYPES[plan.config.dtype]
    activations = torch.ones(GEMM_TOKENS, plan.model.hidden_size, dtype=dtype)
    weight = torch.ones(plan.model.intermediate_size, plan.model.hidden_size, dtype=dtype)
    torch.nn.functional.linear(activations, weight)  # the first product is not counted
    count = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MIN_SECONDS:
        torch.nn.functional.linear(activations, weight)
        count += 1
    return 2 * GEMM_TOKENS * weight.numel() * count / elapsed
