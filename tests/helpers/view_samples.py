"""Sample objects for tests of the terminal views, and a function that renders a view to text."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console, RenderableType

from plan_configs import make_settings
from tunesmith.core.events import Score
from tunesmith.core.types import (
    Comparison,
    DataReport,
    Finding,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
)

MACHINE = Machine("cpu", "a cpu", 2, 2**34, 2**33, 2**36, has_bf16_matmul=True, compiler=None)
MODEL = ModelSpec(
    "tiny",
    Path("/m"),
    "LlamaForCausalLM",
    "llama",
    2,
    64,
    4,
    2,
    16,
    128,
    512,
    2048,
    True,
    135 * 10**6,
    "bf16",
    block_parameters=73_728,
    active_parameters=73_728,
    layer_mixers=("attention", "attention"),
)
FINDING = Finding("empty_answer", "warn", "answers are [empty]", 1, ("a.jsonl:7",))
REPORT = DataReport(
    "a.jsonl",
    "messages",
    "has messages",
    1200,
    1300,
    90_000,
    30_000,
    {"overlong": 4},
    findings=(FINDING,),
)
CONFIG, REASONS = make_settings(
    learning_rate=PlanValue(1e-4, "user", "set in the recipe"),
    lora_r=PlanValue(16, "rule", "small data [see]", "LoRA Without Regret"),
    dtype=PlanValue("bf16", "checkpoint", "the weights are"),
)
PLAN = Plan(
    recipe={},
    config=CONFIG,
    reasons=REASONS,
    machine=MACHINE,
    model=MODEL,
    data={"data": REPORT},
    steps=75,
    tokens_per_epoch=90_000,
    memory_bytes={"weights": 10**9, "peak": 1_900_000_000},
    warnings=("few rows",),
)


def make_score(value: float) -> Score:
    return Score("test", "field_f1", value, value - 0.05, value + 0.05, 200, 0)


BETTER = Comparison(
    "test", "field_f1", make_score(0.2), make_score(0.8), 0.6, 0.5, 0.7, higher_is_better=True
)


def render_text(view: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
