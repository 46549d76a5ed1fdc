"""Full fine-tuning, LoRA and QLoRA compared: memory, time, disk, risk and deployment.

In: a plan per method, for the same rows and machine. Out: a MethodEstimate per method, with common
advice next to each number. Left out: the choice, which `plan` makes and a run confirms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.core.types import Plan
from tunesmith.plan.activations import ALL_LINEAR
from tunesmith.plan.flops import estimate_run_flops
from tunesmith.plan.memory import (
    USUAL_MULTIPLES,
    Footprint,
    compute_multiple,
    count_trained_parameters,
    get_dtype_bytes,
)
from tunesmith.plan.rules import CountFn, count_nothing
from tunesmith.plan.step_memory import has_enough_memory


@dataclass(frozen=True)
class MethodEstimate:
    """The cost and result of a method on a machine, with common advice."""

    method: str
    learning_rate: float
    trained_parameters: int
    peak_bytes: int
    free_bytes: int
    has_enough_memory: bool
    fits_on: str  # the smallest preset with enough memory, if this machine has too little
    multiple: float  # peak relative to the 16-bit weights
    usual_multiple: str
    flops: float
    seconds: tuple[float, ...]  # a range; empty when the speed of the machine is unknown
    total_seconds: float  # with start, preflight and evaluation; 0 when unknown
    speed: str
    usual_speed: str
    disk_bytes: int
    result_bytes: int  # the trained adapter or model
    risk: str
    usual_risk: str
    deployment: str
    usual_deployment: str


def estimate_methods(
    make_plan: Callable[[str], Plan], count_parameters: CountFn = count_nothing
) -> tuple[MethodEstimate, ...]:
    """Estimate each method that the model can be trained with: experts have adapters only.

    `make_plan` returns the plan for one, `count_parameters` counts the parameters of modules that
    are trained in full."""
    plans = [make_plan("lora"), make_plan("qlora")]
    if not plans[0].model.num_experts:
        plans.insert(0, make_plan("full"))
    return tuple(estimate_method(plan, count_parameters) for plan in plans)


def estimate_method(plan: Plan, count_parameters: CountFn = count_nothing) -> MethodEstimate:
    config = plan.config
    peak = plan.memory_bytes["peak"]
    run = Footprint(
        config.method,
        config.dtype,
        rank=config.lora_r or 0,
        targets=config.lora_target_modules or ALL_LINEAR,
        use_dora=config.use_dora or False,
        module_parameters=count_parameters(config.modules_to_save or ()),
    )
    num_trained = count_trained_parameters(plan.model, run)
    result_dtype = config.dtype if config.method == "full" else "fp32"
    return MethodEstimate(
        method=config.method,
        learning_rate=config.learning_rate,
        trained_parameters=num_trained,
        peak_bytes=peak,
        free_bytes=plan.machine.available_bytes,
        has_enough_memory=has_enough_memory(plan),
        fits_on=plan.fits_on,
        multiple=compute_multiple(plan.model, peak),
        usual_multiple=USUAL_MULTIPLES[config.method],
        flops=estimate_run_flops(plan),
        seconds=plan.seconds,
        total_seconds=plan.total_seconds,
        disk_bytes=plan.disk_bytes,
        result_bytes=num_trained * get_dtype_bytes(result_dtype),
        **METHOD_NOTES[config.method],
    )


# Sources: Biderman 2024 (forgetting, one throughput), torchtune README and Hu 2021 (throughputs), a
# 2024 study of safety after benign rows, Dettmers 2023.
_ADAPTER_NOTES = {
    "usual_speed": "2-3x of full",
    "usual_risk": "low",
    "usual_deployment": "one base, many adapters",
}
METHOD_NOTES = {
    "full": {
        "speed": "1, by definition",
        "usual_speed": "1",
        "risk": "forgets most on code (.446 vs .631 at equal skill), hardly on math (.559, .567)",
        "usual_risk": "high",
        "deployment": "a full model per task",
        "usual_deployment": "one model per task",
    },
    "lora": _ADAPTER_NOTES
    | {
        "speed": "1.0-1.5x of full expected, .85-2.2x published",
        "risk": "forgets less on code, and the base is unchanged; learns less from large corpora",
        "deployment": "adapters on one shared base, many at once, or merged",
    },
    "qlora": _ADAPTER_NOTES
    | {
        "speed": "as LoRA, or down to .6x of it: weights are dequantized for every matmul",
        "risk": "as LoRA, and the base is rounded to 4 bits",
        "deployment": "an adapter on the 4-bit base; merged into 16 bits, answers change slightly",
    },
}
