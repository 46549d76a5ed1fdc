"""Machines, models and data reports as the plan sees them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layer_shapes import describe_layers
from tunesmith.core.types import DataReport, Machine, ModelSpec, Plan, PlanValue
from tunesmith.plan.build import build_plan
from tunesmith.plan.hardware_presets import choose_machine
from tunesmith.plan.rules import Measures, RuleContext
from tunesmith.recipe.schema import Recipe

GB = 10**9
CPU = Machine(
    "cpu",
    "a processor",
    2,
    16 * GB,
    12 * GB,
    100 * GB,
    has_bf16_matmul=True,
    compiler="/usr/bin/cc",
)
SMOLLM2 = ModelSpec(
    name="smollm2",
    path=Path("smollm2"),
    architecture="LlamaForCausalLM",
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    context_length=8192,
    tie_word_embeddings=True,
    parameters=134_515_008,
    dtype="bfloat16",
)
LAYER_FIELDS = {"num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"}
LAYER_FIELDS |= {"intermediate_size"}
REPORT = DataReport(
    path="train.jsonl",
    format="messages",
    format_reason="detected",
    rows=1000,
    documents=1000,
    tokens=300_000,
    supervised_tokens=60_000,
    length_percentiles={"p50": 280, "p90": 400, "p99": 500, "max": 700},
)


@pytest.fixture
def make_context() -> Callable[..., RuleContext]:
    """known(hidden_size=..., rows=..., compiler=..., batch_size=...): facts by the name of their
    field, the rest is what has been decided."""

    def make(*, max_steps: int | None = None, **changed: Any) -> RuleContext:
        facts = []
        sizes = {name: changed.pop(name) for name in LAYER_FIELDS & changed.keys()}
        model = describe_layers(dataclasses.replace(SMOLLM2, **sizes))
        for default in (CPU, model, REPORT):
            names = {field.name for field in dataclasses.fields(default)} & (
                changed.keys() - {"dtype"}
            )
            facts.append(
                dataclasses.replace(default, **{name: changed.pop(name) for name in names})
            )
        decided = {
            "method": "lora",
            "optim": "adamw",
            "num_train_epochs": 1,
            "batch_size": 16,
            "dtype": "bf16",
            "lr_scheduler_type": "linear",
            "lora_target_modules": "all-linear",
        } | changed
        settings = {key: PlanValue(value, "rule", "") for key, value in decided.items()}
        return RuleContext(*facts, settings, max_steps)

    return make


@pytest.fixture
def make_spec(make_context: Callable[..., RuleContext]) -> Callable[[dict[str, Any]], ModelSpec]:
    return lambda sizes: describe_layers(dataclasses.replace(make_context().model, **sizes))


@pytest.fixture
def plan(
    make_context: Callable[..., RuleContext], make_spec: Callable[..., ModelSpec]
) -> Callable[..., Plan]:
    def make(
        model: dict[str, Any],
        target: str,
        *,
        longest: int = 700,
        memory: str | None = None,
        saved_share: Callable[[int, int], float] = lambda *_: 0.0,
        **wishes: Any,
    ) -> Plan:
        context = make_context()
        lengths = context.data.length_percentiles | {"max": longest}
        data: DataReport = dataclasses.replace(context.data, length_percentiles=lengths)
        return build_plan(
            Recipe.model_validate({"model": "llama", "data": "train.jsonl", **wishes}),
            machine=choose_machine(context.machine, target, memory),
            model=make_spec(model),
            data={"data": data},
            output_dir=Path("runs/run-1"),
            now="2026-01-01T00:00:00",
            measures=Measures(saved_share=saved_share),
        )

    return make
