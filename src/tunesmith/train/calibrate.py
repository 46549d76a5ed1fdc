"""How long a run will take, measured in seconds on this machine: `plan --calibrate`.

In: a plan and its facts. Out: the plan with its time, and what that comes from. Real steps of the plan
are taken with one and with a few layers of made-up weights; the difference is what a layer costs, and the rest what the
embeddings, the head and the update do. So the weights need not be there, nor fit. Left out: what a run does beside its
steps (finish.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import StepResult
from tunesmith.core.types import Document, Plan
from tunesmith.model.causal_lm import DTYPES
from tunesmith.plan.flops import run_flops, token_flops, tokens_computed
from tunesmith.session.inputs import Facts
from tunesmith.session.session import set_up_part
from tunesmith.train.loop import Settings, Training

SECONDS = 2.5  # of steps for each of the two depths
MOST_STEPS, DEEP = 8, 6
MOST_FLOPS = 2e12  # of a measured step: larger ones are cut to fewer rows
PRODUCT_TOKENS, COPIED_BYTES, LEAST_SECONDS = 2048, 2**28, 0.4


@dataclass(frozen=True)
class Calibration:
    """What was measured; seconds are a computed token's."""

    layer_seconds: float
    other_seconds: float
    depths: tuple[int, int]
    steps: int
    gemm_flops: float  # operations a second of a product as wide as the model's MLP
    bandwidth: float  # bytes a second that a copy reads and writes

    def step_seconds(self, layers: int) -> float:
        return self.other_seconds + layers * self.layer_seconds


def calibrated(plan: Plan, facts: Facts) -> Plan:
    """Raises MachineError for a model whose few layers do not fit, InputError when the plan is for another machine."""
    found, layers = calibrate(plan, facts), plan.model.num_layers
    seconds = tokens_computed(plan) * found.step_seconds(layers)
    share = run_flops(plan) / seconds / found.gemm_flops
    told = (
        f"measured: {found.steps} steps of {found.depths[0]} and {found.depths[1]} of {layers} layers. Products run at "
        f"{found.gemm_flops / 1e9:,.0f} GFLOP/s, the run at {share:.0%} of that; copies at "
        f"{found.bandwidth / 1e9:.0f} GB/s"
    )
    return dataclasses.replace(plan, seconds=(seconds,), seconds_from=told)


def calibrate(plan: Plan, facts: Facts) -> Calibration:
    if plan.machine.device != "cpu":
        raise InputError("only a processor at hand can be measured", where="--calibrate", fix="leave --target out")
    shallow, deep = 1, max(2, min(DEEP, plan.model.num_layers, _layers_that_fit(plan)))
    few = _few(plan, deep)
    first, steps = _token_seconds(plan, facts, shallow, few)
    second, more = _token_seconds(plan, facts, deep, few)
    layer = max((second - first) / (deep - shallow), 0.0)
    return Calibration(
        layer_seconds=layer,
        other_seconds=max(first - shallow * layer, 0.0),
        depths=(shallow, deep),
        steps=steps + more,
        gemm_flops=product_flops(plan),
        bandwidth=copy_bandwidth(),
    )


def _layers_that_fit(plan: Plan) -> int:
    """In half of the free memory, all weights trained at the most."""
    spec, cost = plan.model, 20 if plan["method"] == "full" else 4
    ends = cost * (spec.parameters - spec.block_parameters)
    layers = int((plan.machine.available_bytes / 2 - ends) / (cost * spec.block_parameters / spec.num_layers))
    if layers < 2:
        what = f"two layers and the embeddings of {spec.name} take more than half of the free memory"
        raise MachineError(what, where="--calibrate", fix="free memory, or leave --calibrate out")
    return layers


def _few(plan: Plan, layers: int) -> Callable[[Sequence[Document]], Sequence[Document]]:
    """The first documents of a step, as many as are computed in a second or so. Pairs stay together."""
    cost = token_flops(plan.model, plan["method"], plan["activations"], 0) * layers / plan.model.num_layers
    most = max(256, int(MOST_FLOPS / cost))

    def cut(documents: Sequence[Document]) -> Sequence[Document]:
        tokens, end = 0, 0
        while end < len(documents) and (tokens < most or documents[end].side == "rejected"):
            tokens += len(documents[end])
            end += 1
        return documents[:end]

    return cut


def _token_seconds(
    plan: Plan, facts: Facts, layers: int, few: Callable[[Sequence[Document]], Sequence[Document]]
) -> tuple[float, int]:
    """Of a computed token, and from how many steps; the first step, which makes what stays, is not counted."""
    bench = set_up_part(plan, facts, layers)
    training = Training(bench.model, lambda step: few(bench.documents_of(step)), Settings.of(plan))
    results: list[StepResult] = []
    for event in training:
        if isinstance(event, StepResult):
            results.append(event)
            counted = results[1:]
            if len(counted) >= MOST_STEPS or sum(one.seconds for one in counted) > SECONDS:
                training.stop()
    counted = results[1:] or results
    seconds = sum(one.seconds for one in counted)
    return seconds / max(1, sum(one.tokens - one.shared_tokens for one in counted)), len(counted)


def product_flops(plan: Plan) -> float:
    """Operations a second of a frozen layer's product."""
    dtype = DTYPES[plan["dtype"]]
    left = torch.ones(PRODUCT_TOKENS, plan.model.hidden_size, dtype=dtype)
    right = torch.ones(plan.model.intermediate_size, plan.model.hidden_size, dtype=dtype)
    return 2 * PRODUCT_TOKENS * right.numel() / _repeated(lambda: torch.nn.functional.linear(left, right))


def copy_bandwidth() -> float:
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _repeated(lambda: target.copy_(source))


def _repeated(work: Callable[[], object]) -> float:
    """Seconds of one time, the first one left out."""
    work()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < LEAST_SECONDS:
        work()
        count += 1
    return passed / count
