"""Write run folders with chosen contents in the layout of real runs, without training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan_configs import DEFAULTS
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.core.run_dir import (
    FINGERPRINT_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    STAGES_DIR,
    STAGES_FILE,
    RunFolder,
)
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
    WeightedText,
    split_settings,
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
    block_parameters=73_728,
    active_parameters=73_728,
    layer_mixers=("attention", "attention"),
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
    length_counts={"16": 0, "32": 5, "64": 10},
    first_row=(WeightedText("a question", 0.0), WeightedText("yes", 1.0)),
)
DEFAULT_SETTINGS = {key: PlanValue(value, "rule", "") for key, value in DEFAULTS.items()}
CONFIG, REASONS = split_settings(
    DEFAULT_SETTINGS
    | {
        "stage": PlanValue("sft", "rule", "sft trains on answers"),
        "method": PlanValue(
            "lora", "rule", "the base stays as it is", "Hu 2021", "published", "the same"
        ),
        "learning_rate": PlanValue(1e-4, "user", "set in the recipe"),
        "metrics": PlanValue(("exact_match",), "user", "set in the recipe"),
        "seed": PlanValue(0, "rule", "order of rows"),
        "now": PlanValue("2026-11-26T00:00:00", "rule", "dates are frozen"),
    }
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
FINGERPRINT = {
    "tunesmith": "0.1.0",
    "base_sha256": {"model.safetensors": "ab" * 32},
    "tokenizer": "cd" * 32,
}


def make_comparison(
    metric: str,
    before: float,
    after: float,
    half_width: float,
    *,
    task: str = "test",
    higher_is_better: bool = True,
    **changes: Any,
) -> Comparison:
    """Return a difference with an interval of `half_width` to both sides."""
    score_before, score_after = (
        Score(task, metric, value, value - 0.1, value + 0.1, 80, 0) for value in (before, after)
    )
    difference = after - before
    low = difference - half_width
    high = difference + half_width
    return Comparison(
        task, metric, score_before, score_after, difference, low, high, higher_is_better, **changes
    )


BETTER = make_comparison("exact_match", 0.1, 0.8, 0.1)
SAME = make_comparison("exact_match", 0.1, 0.11, 0.1)
FORGOT = make_comparison(
    "bits_per_byte", 0.9, 1.0, 0.02, task="general text", higher_is_better=False
)
PASSED = CheckResult("logits match transformers", "ok", "relative difference at most 0.00%")


def make_step(number: int, loss: float = 1.0) -> TrainStep:
    return TrainStep(number, loss, 3000, 900, 2.0, 1e-4, 1.0, 1_800_000_000)


def make_events(steps: int = 30) -> list[Event]:
    """Return the events of a run with evaluations, checkpoints and a warning."""
    events: list[Event] = [PASSED]
    for number in range(1, steps + 1):
        events.append(make_step(number, 2.0 / number))
        if number % 10 == 0:
            events.append(Score("eval", "loss", 1 / number, 0.9 / number, 1.1 / number, 40, number))
            events.append(CheckpointSaved(number, f"checkpoints/step-{number}"))
    warning = CheckResult("repetition", "warn", "seq-rep-4 0.31, base 0.02", min(17, steps))
    return [*events, warning]


def make_pair(
    number: int, before: str, after: str, expected: str = ""
) -> tuple[GenerationSample, GenerationSample]:
    row = f"test.jsonl:{number}"
    prompt = f"question {number}"
    return (
        GenerationSample(0, row, prompt, before, expected),
        GenerationSample(30, row, prompt, after, expected),
    )


SAMPLES = (
    make_pair(1, "the sum is five", "the sum is 5", "the sum is 5"),
    make_pair(2, "yes", "yes", "yes"),
    make_pair(3, "right", "wrong now", "right"),
)


def make_scales(losses: Sequence[float] = (2, 1.75, 1.5, 1.25, 1)) -> tuple[ScalePoint, ...]:
    """Return points for scales 0 to 1: held-out loss falls, bits per byte of general text rise."""
    points: list[ScalePoint] = []
    for scale, loss in zip((0, 0.25, 0.5, 0.75, 1), losses, strict=True):
        eval_loss = Score("eval", "loss", loss, loss - 0.1, loss + 0.1, 40, 30)
        general = Score("general text", "bits_per_byte", 0.9 + scale / 10, 0.8, 1.1, 40, 30)
        lost = Score(
            "general text",
            "bits_per_byte_lost",
            scale / 10,
            0.9 * scale / 10,
            1.1 * scale / 10,
            40,
            30,
        )
        points.append(ScalePoint(scale, eval_loss, general, lost))
    return tuple(points)


CHEAPER = (2, 1.04, 1.02, 1.01, 1)  # a quarter of the adapter is nearly as good


def make_record(plan: Plan = PLAN, **changes: Any) -> RunRecord:
    record = RunRecord(
        version="0.1.0",
        plan=plan,
        preflight=(PASSED,),
        comparisons=(BETTER, FORGOT),
        steps=30,
        tokens=90_000,
        train_seconds=60.0,
        peak_bytes=1_800_000_000,
        adapter="adapter",
        samples=SAMPLES,
    )
    return replace(record, **changes)


def write_run(
    path: Path,
    *,
    plan: Plan = PLAN,
    record: RunRecord | None = None,
    events: Sequence[Event] | None = None,
    files: dict[str, Json] | None = None,
) -> Path:
    """Write a run folder; without `record` the run is unfinished."""
    with RunFolder.create(path) as folder:
        folder.write_json(FINGERPRINT_FILE, FINGERPRINT)
        folder.write_json(PLAN_FILE, plan)
        folder.write_text(RECIPE_FILE, "model: tiny\n")
        for event in make_events() if events is None else events:
            folder.append_event(event)
        if record is not None:
            folder.write_json(RECORD_FILE, record)
        for name, content in (files or {}).items():
            folder.write_json(name, content)
    return path


def write_stages(path: Path, **changes: Any) -> Path:
    """Write a finished run of two stages."""
    stage_dirs = [path / STAGES_DIR / name for name in ("1-cpt", "2-sft")]
    plans: list[Plan] = []
    for stage_dir in stage_dirs:
        plans.append(PLAN.with_settings(output_dir=PlanValue(str(stage_dir), "rule", "")))
    with RunFolder.create(path) as folder:
        folder.write_json(STAGES_FILE, StagedPlan(str(path), tuple(plans)))
        folder.write_json(RECORD_FILE, make_record(plans[-1], **changes))
    for stage_dir, plan in zip(stage_dirs, plans, strict=True):
        write_run(stage_dir, plan=plan, record=make_record(plan))
    return path
