"""Run folders with contents of our choice, as a run leaves them: no model is trained for a page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan_configs import make_settings
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.core.run_dir import STAGES_DIR, STAGES_FILE, RunFolder
from tunesmith.core.types import (
    Comparison,
    DataReport,
    Finding,
    Json,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    RunRecord,
    ScalePoint,
)
from tunesmith.plan.stages import StagedPlan

MACHINE = Machine(
    "cpu",
    "a cpu",
    2,
    2**34,
    2**33,
    2**36,
    has_bf16_matmul=True,
    compiler=None,
    versions={"torch": "2.9"},
)
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
)
FINDING = Finding("empty_answer", "warn", "answers are empty", 1, ("a.jsonl:7",), "fill them")
REPORT = DataReport(
    "data/a.jsonl",
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
    stage=PlanValue("sft", "rule", "sft trains on answers"),
    method=PlanValue("lora", "rule", "the base stays as it is", "Hu 2021", "published", "the same"),
    learning_rate=PlanValue(1e-4, "user", "set in the recipe"),
    metrics=PlanValue(("exact_match",), "user", "set in the recipe"),
    seed=PlanValue(0, "rule", "order of rows"),
    now=PlanValue("2026-11-26T00:00:00", "rule", "dates are frozen"),
)
PLAN = Plan(
    recipe={"model": "tiny"},
    config=CONFIG,
    reasons=REASONS,
    machine=MACHINE,
    model=MODEL,
    data={"data": REPORT, "test_data": REPORT},
    steps=30,
    tokens_per_epoch=90_000,
    memory_bytes={"weights": 10**9, "peak": 2 * 10**9},
    warnings=("few rows",),
    seconds=(60.0, 80.0),
    seconds_source="measured on this machine",
)
IDENTITY = {
    "tunesmith": "0.1.0",
    "base_sha256": {"model.safetensors": "ab" * 32},
    "tokenizer": "cd" * 32,
}


def compared(
    metric: str,
    before: float,
    after: float,
    half: float,
    *,
    task: str = "test",
    higher: bool = True,
    **more: Any,
) -> Comparison:
    """A difference with an interval of `half` to both sides."""
    first, second = (
        Score(task, metric, value, value - 0.1, value + 0.1, 80, 0) for value in (before, after)
    )
    change = after - before
    return Comparison(
        task, metric, first, second, change, change - half, change + half, higher, **more
    )


BETTER = compared("exact_match", 0.1, 0.8, 0.1)
SAME = compared("exact_match", 0.1, 0.11, 0.1)
FORGOT = compared("bits_per_byte", 0.9, 1.0, 0.02, task="general text", higher=False)


def step(number: int, loss: float = 1.0) -> TrainStep:
    return TrainStep(number, loss, 3000, 900, 2.0, 1e-4, 1.0, 1_800_000_000)


def events(steps: int = 30) -> list[Event]:
    """A run with looks at held-out rows, checkpoints and a warning."""
    found: list[Event] = [CheckResult("logits match transformers", "ok", "relative difference at most 0.00%")]
    for number in range(1, steps + 1):
        found.append(step(number, 2.0 / number))
        if number % 10 == 0:
            found.append(Score("eval", "loss", 1 / number, 0.9 / number, 1.1 / number, 40, number))
            found.append(CheckpointSaved(number, f"checkpoints/step-{number}"))
    return [*found, CheckResult("repetition", "warn", "seq-rep-4 0.31, base 0.02", min(17, steps))]


def pair(
    number: int, before: str, after: str, expected: str = ""
) -> tuple[GenerationSample, GenerationSample]:
    row, prompt = f"test.jsonl:{number}", f"question {number}"
    return GenerationSample(0, row, prompt, before, expected), GenerationSample(
        30, row, prompt, after, expected
    )


SAMPLES = (
    pair(1, "the sum is five", "the sum is 5", "the sum is 5"),
    pair(2, "yes", "yes", "yes"),
    pair(3, "right", "wrong now", "right"),
)


def scales(losses: Sequence[float] = (2, 1.75, 1.5, 1.25, 1)) -> tuple[ScalePoint, ...]:
    """The trained adapter by how much of it: the loss falls, general text suffers."""
    return tuple(
        ScalePoint(
            scale,
            Score("eval", "loss", loss, loss - 0.1, loss + 0.1, 40, 30),
            Score("general text", "bits_per_byte", 0.9 + scale / 10, 0.8, 1.1, 40, 30),
        )
        for scale, loss in zip((0, 0.25, 0.5, 0.75, 1), losses, strict=True)
    )


CHEAPER = (2, 1.04, 1.02, 1.01, 1)  # a quarter of it does


def record_of(plan: Plan = PLAN, **changed: Any) -> RunRecord:
    made = RunRecord(
        version="0.1.0",
        plan=plan,
        preflight=(CheckResult("logits match transformers", "ok", "relative difference at most 0.00%"),),
        comparisons=(BETTER, FORGOT),
        steps=30,
        tokens=90_000,
        train_seconds=60.0,
        peak_bytes=1_800_000_000,
        adapter="adapter",
        samples=SAMPLES,
    )
    return replace(made, **changed)


def write_run(
    path: Path,
    *,
    plan: Plan = PLAN,
    record: RunRecord | None = None,
    happened: Sequence[Event] | None = None,
    files: dict[str, Json] | None = None,
) -> Path:
    """`record`: None for a run that is not finished."""
    with RunFolder.create(path) as folder:
        folder.write_json("identity.json", IDENTITY)
        folder.write_json("plan.json", plan)
        folder.write_text("recipe.yaml", "model: tiny\n")
        for event in events() if happened is None else happened:
            folder.append_event(event)
        if record is not None:
            folder.write_json("record.json", record)
        for name, content in (files or {}).items():
            folder.write_json(name, content)
    return path


def write_stages(path: Path, **changed: Any) -> Path:
    """Two stages, both finished."""
    places = [str(path / STAGES_DIR / name) for name in ("1-cpt", "2-sft")]
    plans = [
        PLAN.with_settings(output_dir=PlanValue(place, "rule", ""))
        for place in places
    ]
    with RunFolder.create(path) as folder:
        folder.write_json(STAGES_FILE, StagedPlan(str(path), tuple(plans)))
        folder.write_json("record.json", record_of(plans[-1], **changed))
    for place, plan in zip(places, plans, strict=True):
        write_run(Path(place), plan=plan, record=record_of(plan))
    return path
