"""The tables that people see: what is in them and what they may conclude."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

import fake_runs
from plan_configs import make_config, make_settings
from tunesmith.cli.views.tables import (
    format_duration,
    format_value,
    format_verdict,
    render_baselines,
    render_comparisons,
    render_data,
    render_diagnosis,
    render_method_estimates,
    render_plan,
    render_run_record,
    render_setting,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.types import (
    Comparison,
    DataReport,
    Finding,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    RunRecord,
)
from tunesmith.plan.method_comparison import estimate_method
from tunesmith.session.doctor import Diagnosis, MachineCheck, MemoryFit

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


def score(value: float) -> Score:
    return Score("test", "field_f1", value, value - 0.05, value + 0.05, 200, 0)


BETTER = Comparison(
    "test", "field_f1", score(0.2), score(0.8), 0.6, 0.5, 0.7, higher_is_better=True
)


def printed(view: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plan_shows_each_value_who_decided_and_why() -> None:
    text = printed(render_plan(PLAN))
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert lines["learning_rate"] == "learning_rate 0.0001 user set in the recipe"
    assert lines["lora_r"] == "lora_r 16 rule small data [see] (LoRA Without Regret)"
    assert lines["75"] == "75 steps over 1,200 rows, 90,000 tokens an epoch"
    assert lines["memory"] == "memory 1.9 GB of 8.6 GB free"
    assert lines["warning"] == "warning few rows"


def test_a_narrow_terminal_loses_no_word_of_the_plan() -> None:
    text = printed(render_plan(PLAN), width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    for word in ("learning_rate", "0.0001", "Without", "Regret)"):
        assert word in text


@pytest.mark.parametrize(
    ("difference", "low", "high", "higher_is_better", "text"),
    [
        (0.6, 0.5, 0.7, True, "better"),
        (-0.6, -0.7, -0.5, True, "worse"),
        (-0.6, -0.7, -0.5, False, "better"),
        (0.6, 0.5, 0.7, False, "worse"),
        (0.1, -0.1, 0.3, True, "no difference shown"),
        (0.0, 0.0, 0.0, True, "no difference shown"),
        (0.1, 0.0, 0.3, True, "no difference shown"),
    ],
)
def test_only_an_interval_without_zero_is_a_result(
    difference: float, low: float, high: float, higher_is_better: bool, text: str
) -> None:
    one = replace(
        BETTER, difference=difference, low=low, high=high, higher_is_better=higher_is_better
    )
    assert format_verdict(one).plain == text


def test_before_and_after_carry_their_intervals() -> None:
    line = " ".join(printed(render_comparisons([BETTER])).splitlines()[2].split())
    assert (
        line
        == "test field_f1 200 0.200 [0.150, 0.250] 0.800 [0.750, 0.850] 0.600 [0.500, 0.700] better"
    )


def test_baselines_stand_beside_the_trained_model() -> None:
    text = printed(
        render_baselines(
            {"base": [BETTER], "told": [replace(BETTER, difference=0.1, low=-0.1, high=0.3)]}
        )
    )
    lines = [" ".join(line.split()) for line in text.splitlines()[2:]]
    assert lines == [
        "test, field_f1 200 base 0.200 [0.150, 0.250] 0.600 [0.500, 0.700] better",
        "told 0.200 [0.150, 0.250] 0.100 [-0.100, 0.300] no difference shown",
        "trained 0.800 [0.750, 0.850]",
    ]


def test_a_record_shows_answers_side_by_side_and_the_adapter() -> None:
    before, after = (
        GenerationSample(0, "a:1", "Q", "I am an [AI]"),
        GenerationSample(75, "a:1", "Q", '{"a": 1}', expected='{"a": 1}'),
    )
    record = RunRecord(
        "0.1.0", PLAN, (), (BETTER,), 75, 9000, 10.0, 10**9, "runs/x/adapter", ((before, after),)
    )
    text = printed(render_run_record(record))
    assert "before    I am an [AI]" in text
    assert 'after     {"a": 1}' in text
    assert "75 steps, 900 tokens/s, peak 1.0 GB (1.9 predicted)" in text
    assert "shared" not in text
    assert "adapter: runs/x/adapter" in text
    shared = printed(render_run_record(replace(record, shared_tokens=1800)))
    assert "shared prefixes: 1,800 of 9,000 tokens were not computed again, 20.0%" in shared
    assert "--scale" not in shared
    curved = printed(render_run_record(replace(record, scales=fake_runs.make_scales(fake_runs.CHEAPER))))
    assert "what is offered, on test_data: tunesmith compare runs/x@0.25 runs/x" in curved
    assert "to have it: tunesmith export runs/x --to peft --scale 0.25" in curved


def test_a_record_without_measures_says_so_instead_of_an_empty_table() -> None:
    text = printed(
        render_run_record(
            RunRecord("0.1.0", PLAN, (), (), 6, 9000, 10.0, 10**9, "runs/x/adapter", ())
        )
    )
    assert text.startswith(
        "no before and after: the recipe names neither test_data nor retention_data"
    )
    assert "measure" not in text.splitlines()[1]


def test_data_shows_counts_and_findings() -> None:
    text = printed(render_data({"data": REPORT}))
    assert "1,200" in text
    assert "warn data empty_answer: answers are [empty] a.jsonl:7" in text


def test_a_diagnosis_shows_what_is_missing_and_what_fits() -> None:
    checks = (
        MachineCheck("compiler", False, "none [cc]", is_required=False, fix="install gcc"),
        MachineCheck("torch", True, "2.13"),
    )
    text = printed(
        render_diagnosis(
            Diagnosis(MACHINE, checks, Path("/c"), MODEL, (MemoryFit("full", 3 * 10**9, False),))
        )
    )
    assert "missing  compiler  none [cc]  install gcc" in text
    assert "135M parameters in /m" in text
    assert "full: about 3.0 GB, does not fit" in text


def test_values_read_as_in_a_recipe() -> None:
    values = [format_value(value) for value in (None, True, 1e-4, 16, ("q_proj", "v_proj"), ())]
    assert values == ["-", "true", "0.0001", "16", "q_proj, v_proj", "-"]


def test_all_that_stands_behind_a_value_is_shown() -> None:
    choice = PlanValue(1e-4, "rule", "because [so]", "a paper", "published", "1e-5: differs")
    plan = PLAN.with_settings(learning_rate=choice)
    text = printed(render_setting(plan, "learning-rate"))
    for part in (
        "learning_rate: 0.0001",
        "a rule",
        "because [so]",
        "a paper",
        "1e-5: differs",
        "published",
    ):
        assert part in text
    assert "not claimed" in printed(render_setting(PLAN, "dtype"))
    with pytest.raises(InputError, match="the plan decides no 'lora_z'") as refusal:
        render_setting(PLAN, "lora_z")
    assert "lora_r" in refusal.value.fix


def test_a_plan_that_does_not_fit_says_where_it_would() -> None:
    plan = dataclasses.replace(PLAN, phase_bytes={"step": 10**9}, fits_on="h100 (80.0 GB)")
    text = " ".join(printed(render_plan(plan)).split())
    assert "memory 1.9 GB of 8.6 GB free: step 1.0 GB" in text
    assert "x7.0 of the weights in 16 bits; as a rule of thumb lora takes x1.5" in text
    assert "does not fit: the smallest machine that would do is h100 (80.0 GB)" in text


def test_methods_stand_side_by_side() -> None:
    plan = dataclasses.replace(
        PLAN,
        config=make_config(method="full", learning_rate=1e-4, batch_size=16),
    )
    one = estimate_method(plan)
    table = printed(
        render_method_estimates(
            [one, dataclasses.replace(one, seconds=(59.4, 18_420.0), fits_on="b200", has_enough_memory=False)]
        )
    )
    assert "x7 (x4 to x12)" in table
    assert "the smallest that would do: b200" in " ".join(table.split())
    fast = dataclasses.replace(one, seconds=(59.4, 18_420.0))
    assert "59 s to 5:07 h" in printed(render_method_estimates([fast]))
    assert [format_duration(seconds) for seconds in (3, 200, 3599.6, 3600)] == [
        "3 s",
        "3:20 min",
        "60:00 min",
        "1:00 h",
    ]
