"""Full fine-tuning, LoRA and QLoRA side by side: what each takes, risks and leaves behind.

In: a plan a method, made for the same rows and machine. Out: an `Outlook` a method, with what the
usual advice says beside each number. Left out: which is best, which `plan` decides with its reason
and a run shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.types import Plan
from tunesmith.plan.build import has_enough_memory
from tunesmith.plan.flops import estimate_run_flops
from tunesmith.plan.memory import count_trained_parameters
from tunesmith.plan.memory_budget import USUAL_MULTIPLES, compute_multiple

METHODS: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora", "qlora")


@dataclass(frozen=True)
class MethodEstimate:
    """One method. Seconds are a range, empty where nothing is known of this machine's speed."""

    method: str
    learning_rate: float
    trained_parameters: int
    peak_bytes: int
    free_bytes: int
    has_enough_memory: bool
    fits_on: str  # the smallest machine of the table that has room, if this one has not
    multiple: float  # of the weights in 16 bits
    usual_multiple: str
    flops: float
    seconds: tuple[float, ...]
    speed: str
    usual_speed: str
    disk_bytes: int
    result_bytes: int  # what training leaves: an adapter, or a model
    risk: str
    usual_risk: str
    deployment: str
    usual_deployment: str


def estimate_methods(make_plan: Callable[[str], Plan]) -> tuple[MethodEstimate, ...]:
    """`plan_with`: the plan by method."""
    return tuple(estimate_method(make_plan(method)) for method in METHODS)


def estimate_method(plan: Plan) -> MethodEstimate:
    method, spec, peak = plan.config.method, plan.model, plan.memory_bytes["peak"]
    rank = plan.config.lora_r or 0
    use_dora = plan.config.use_dora or False
    num_trained = count_trained_parameters(
        spec, method=method, dtype=plan.config.dtype, rank=rank, dora=use_dora
    )
    is_bf16 = method == "full" and plan.config.dtype == "bf16"
    return MethodEstimate(
        method=method,
        learning_rate=plan.config.learning_rate,
        trained_parameters=num_trained,
        peak_bytes=peak,
        free_bytes=plan.machine.available_bytes,
        has_enough_memory=has_enough_memory(plan),
        fits_on=plan.fits_on,
        multiple=compute_multiple(spec, peak),
        usual_multiple=USUAL_MULTIPLES[method],
        flops=estimate_run_flops(plan),
        seconds=plan.seconds,
        disk_bytes=plan.disk_bytes,
        result_bytes=num_trained * (2 if is_bf16 else 4),
        **METHOD_NOTES[method],
    )


# What is known of each, and what is usually said. Sources: Biderman 2024 (forgetting, one of its
# throughputs), torchtune README and Hu 2021 (throughputs), a 2024 study of safety after benign
# rows, Dettmers 2023.
_ADAPTER_NOTES = {
    "usual_speed": "2-3x of full",
    "usual_risk": "low",
    "usual_deployment": "one base, many adapters",
}
METHOD_NOTES = {
    "full": {
        "speed": "1, by definition",
        "usual_speed": "1",
        "risk": "forgets most on code (.446 against .631 at equal skill), hardly more on maths (.559, .567)",
        "usual_risk": "high",
        "deployment": "a whole model a task",
        "usual_deployment": "one model a task",
    },
    "lora": _ADAPTER_NOTES
    | {
        "speed": "1.0-1.5x of full expected, .85-2.2x published",
        "risk": "forgets less on code, the base stays as it was; learns less from much text",
        "deployment": "an adapter beside one base, many at once, or merged",
    },
    "qlora": _ADAPTER_NOTES
    | {
        "speed": "as LoRA or down to .6x of it: weights are widened for every product",
        "risk": "as LoRA, and the base is rounded to 4 bits",
        "deployment": "an adapter for the base in 4 bits; merged into 16 it is another model, slightly",
    },
}
