"""How long a run will take, measured in seconds on this machine: `plan --calibrate`.

In: a plan and its facts. Out: the plan with its time, and what that comes from. Real steps of the
plan are taken with one and with a few layers of made-up weights; the difference is what a layer
costs, and the rest what the embeddings, the head and the update do. So the weights need not be
there, nor fit. Left out: what a run does beside its steps (finish.py)."""

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

SECONDS_PER_DEPTH = 2.5  # of steps for each of the two depths
MAX_STEPS, MAX_LAYERS = 8, 6
MAX_STEP_FLOPS = 2e12  # of a measured step: larger ones are cut to fewer rows
GEMM_TOKENS, COPY_BYTES, MIN_SECONDS = 2048, 2**28, 0.4


@dataclass(frozen=True)
class Calibration:
    """What was measured; seconds are a computed token's."""

    layer_seconds: float
    other_seconds: float
    depths: tuple[int, int]
    steps: int
    gemm_flops: float  # operations a second of a product as wide as the model's MLP
    bandwidth: float  # bytes a second that a copy reads and writes

    def compute_token_seconds(self, layers: int) -> float:
        return self.other_seconds + layers * self.layer_seconds


def calibrate_plan(plan: Plan, inputs: RunInputs) -> Plan:
    """Raises MachineError for a model whose few layers do not fit, InputError when the plan is for
    another machine."""
    calibration, layers = measure_calibration(plan, inputs), plan.model.num_layers
    seconds = count_computed_tokens(plan) * calibration.compute_token_seconds(layers)
    utilization = estimate_run_flops(plan) / seconds / calibration.gemm_flops
    source = (
        f"measured: {calibration.steps} steps of {calibration.depths[0]} and {calibration.depths[1]} of {layers} layers. Products run at "
        f"{calibration.gemm_flops / 1e9:,.0f} GFLOP/s, the run at {utilization:.0%} of that; copies at "
        f"{calibration.bandwidth / 1e9:.0f} GB/s"
    )
    return dataclasses.replace(plan, seconds=(seconds,), seconds_source=source)


def measure_calibration(plan: Plan, inputs: RunInputs) -> Calibration:
    if plan.machine.device != "cpu":
        raise InputError(
            "only a processor at hand can be measured",
            where="--calibrate",
            fix="leave --target out",
        )
    shallow, deep = 1, max(2, min(MAX_LAYERS, plan.model.num_layers, _count_fitting_layers(plan)))
    truncate = _make_truncator(plan, deep)
    shallow_seconds, shallow_steps = _measure_token_seconds(plan, inputs, shallow, truncate)
    deep_seconds, deep_steps = _measure_token_seconds(plan, inputs, deep, truncate)
    layer_seconds = max((deep_seconds - shallow_seconds) / (deep - shallow), 0.0)
    return Calibration(
        layer_seconds=layer_seconds,
        other_seconds=max(shallow_seconds - shallow * layer_seconds, 0.0),
        depths=(shallow, deep),
        steps=shallow_steps + deep_steps,
        gemm_flops=measure_gemm_flops(plan),
        bandwidth=measure_copy_bandwidth(),
    )


def _count_fitting_layers(plan: Plan) -> int:
    """In half of the free memory, all weights trained at the most."""
    spec, cost = plan.model, 20 if plan.config.method == "full" else 4
    embedding_bytes = cost * (spec.parameters - spec.block_parameters)
    layers = int(
        (plan.machine.available_bytes / 2 - embedding_bytes)
        / (cost * spec.block_parameters / spec.num_layers)
    )
    if layers < 2:
        message = (
            f"two layers and the embeddings of {spec.name} take more than half of the free memory"
        )
        raise MachineError(
            message, where="--calibrate", fix="free memory, or leave --calibrate out"
        )
    return layers


def _make_truncator(plan: Plan, layers: int) -> Callable[[Sequence[Document]], Sequence[Document]]:
    """The first documents of a step, as many as are computed in a second or so. Pairs stay
    together."""
    cost = (
        compute_token_flops(plan.model, plan.config.method, plan.config.gradient_checkpointing, 0)
        * layers
        / plan.model.num_layers
    )
    max_tokens = max(256, int(MAX_STEP_FLOPS / cost))

    def truncate_documents(documents: Sequence[Document]) -> Sequence[Document]:
        tokens, end = 0, 0
        while end < len(documents) and (tokens < max_tokens or documents[end].side == "rejected"):
            tokens += len(documents[end])
            end += 1
        return documents[:end]

    return truncate_documents


def _measure_token_seconds(
    plan: Plan,
    inputs: RunInputs,
    layers: int,
    truncate: Callable[[Sequence[Document]], Sequence[Document]],
) -> tuple[float, int]:
    """Of a computed token, and from how many steps; the first step, which makes what stays, is not
    counted."""
    session = open_truncated_session(plan, inputs, layers)
    training = TrainingLoop(
        session.model,
        lambda step: truncate(session.load_documents(step)),
        plan.config,
        steps=plan.steps,
    )
    results: list[TrainStep] = []
    for event in training:
        if isinstance(event, TrainStep):
            results.append(event)
            counted_results = results[1:]
            if (
                len(counted_results) >= MAX_STEPS
                or sum(result.seconds for result in counted_results) > SECONDS_PER_DEPTH
            ):
                training.stop()
    counted_results = results[1:] or results
    seconds = sum(result.seconds for result in counted_results)
    return seconds / max(
        1, sum(result.tokens - result.shared_tokens for result in counted_results)
    ), len(counted_results)


def measure_gemm_flops(plan: Plan) -> float:
    """Operations a second of a frozen layer's product."""
    dtype = DTYPES[plan.config.dtype]
    activations = torch.ones(GEMM_TOKENS, plan.model.hidden_size, dtype=dtype)
    weight = torch.ones(plan.model.intermediate_size, plan.model.hidden_size, dtype=dtype)
    return (
        2
        * GEMM_TOKENS
        * weight.numel()
        / _time_repeated(lambda: torch.nn.functional.linear(activations, weight))
    )


def measure_copy_bandwidth() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _time_repeated(lambda: target.copy_(source))


def _time_repeated(work: Callable[[], object]) -> float:
    """Seconds of one time, the first one left out."""
    work()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MIN_SECONDS:
        work()
        count += 1
    return elapsed / count
