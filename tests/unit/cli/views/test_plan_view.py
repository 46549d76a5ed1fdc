"""Views of `plan` and `doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from plan_configs import make_config, make_settings
from tunesmith.cli.views.plan import (
    render_diagnosis,
    render_method_estimates,
    render_plan,
    render_setting,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import PlanValue
from tunesmith.plan.method_comparison import estimate_method
from tunesmith.session.doctor import Diagnosis, MachineCheck
from view_samples import MACHINE, PLAN, render_text


def test_a_plan_shows_each_value_who_decided_and_why() -> None:
    text = render_text(render_plan(PLAN, show_all=True))
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert lines["learning_rate"] == "learning_rate 0.0001 user set in the recipe"
    assert lines["lora_r"] == "lora_r 16 rule small data [see] (LoRA Without Regret)"
    assert lines["75"] == "75 steps over 1,200 rows, 90,000 tokens per epoch"
    assert lines["peak"] == "peak memory 1.9 GB of 8.6 GB free"
    assert lines["warning"] == "warning few rows"


def test_a_narrow_terminal_loses_no_word_of_the_plan() -> None:
    text = render_text(render_plan(PLAN, show_all=True), width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    for word in ("learning_rate", "0.0001", "Without", "Regret)"):
        assert word in text


def test_a_plan_is_short_unless_all_of_it_is_asked_for() -> None:
    values = {
        "method": PlanValue("lora", "rule", "memory allows it"),
        "dtype": PlanValue("bf16", "rule", "a long reason " * 20),
        "weight_decay": PlanValue(0.1, "user", "set in the recipe"),
        "max_length": PlanValue(512, "rule", "the longest document of the data: nothing is cut"),
    }
    config, reasons = make_settings(**values)
    plan = dataclasses.replace(PLAN, config=config, reasons=reasons)
    text = render_text(render_plan(plan), width=60)
    shown = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert shown[:4] == ["setting", "method", "max_length", "weight_decay"]
    assert all(len(line.rstrip()) <= 60 for line in text.splitlines())
    assert "…" in text
    assert "1 more settings: --all" in text
    assert "dtype" in render_text(render_plan(plan, show_all=True), width=60)


def test_a_plan_without_warnings_has_twelve_lines_of_eighty_columns() -> None:
    long = PlanValue("a long value " * 9, "user", "a long reason " * 20)
    config, reasons = make_settings()
    plan = dataclasses.replace(PLAN, config=config, reasons=reasons)
    names = {field.name for field in dataclasses.fields(config)} - {"method"}
    method = PlanValue("lora", "user", "")
    plan = plan.with_settings(method=method, **dict.fromkeys(sorted(names), long))
    plan = dataclasses.replace(
        plan,
        warnings=(),
        disk_bytes=10**9,
        seconds=(93.0,),
        seconds_source="at 15 to 40% of its bf16 rate (published for well-tuned runs)",
        phase_bytes={"step": 10**9, "longest row": 10**8, "generation": 2 * 10**9},
    )
    lines = render_text(render_plan(plan), width=80).splitlines()
    assert len(lines) == 12
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert lines[0].split() == ["setting", "value", "reason"]
    assert lines[-3].rstrip() == "about 1 min 33 s of training, at 15 to 40% of its bf16 rate"
    assert lines[-2].rstrip() == "peak memory 1.9 GB of 8.6 GB free (in the generation)"
    hidden = len(plan.settings) - 7
    # of which output_dir, seed and stage are set by every recipe
    assert lines[-1].startswith(f"{hidden} more settings, {hidden - 3} set by you: --all")
    whole = " ".join(render_text(render_plan(plan, show_all=True), width=200).split())
    assert "at 15 to 40% of its bf16 rate (published for well-tuned runs)" in whole
    assert "step 1.0 GB, longest row 100.0 MB, generation 2.0 GB" in whole


def test_a_setting_is_explained_in_full() -> None:
    value = PlanValue(1e-4, "rule", "because [so]", "a paper", "published", "1e-5: differs")
    config, reasons = make_settings(learning_rate=value)
    plan = dataclasses.replace(PLAN, config=config, reasons=reasons)
    text = render_text(render_setting(plan, "learning-rate"))
    for part in (
        "learning_rate: 0.0001",
        "rule",
        "because [so]",
        "a paper",
        "1e-5: differs",
        "published",
    ):
        assert part in text
    assert "n/a: set by you" in render_text(render_setting(PLAN, "dtype"))
    with pytest.raises(InputError, match="the plan has no setting 'lora_z'") as refusal:
        render_setting(PLAN, "lora_z")
    assert refusal.value.fix == "did you mean lora_r?"
    with pytest.raises(InputError) as refusal:
        render_setting(PLAN, "xyzzy")
    assert "tunesmith plan --all" in refusal.value.fix
    assert "learning_rate: 0.0001" in render_text(render_setting(plan, "lr"))


def test_a_plan_that_does_not_fit_says_where_it_would() -> None:
    plan = dataclasses.replace(PLAN, phase_bytes={"step": 10**9}, fits_on="h100 (80.0 GB)")
    text = " ".join(render_text(render_plan(plan, show_all=True)).split())
    assert "memory 1.9 GB of 8.6 GB free: step 1.0 GB" in text
    assert "7.0x the 16-bit weights (rule of thumb for lora: x1.5, without activations)" in text
    for show_all in (False, True):
        text = " ".join(render_text(render_plan(plan, show_all=show_all)).split())
        assert "does not fit: the smallest GPU that fits is h100 (80.0 GB)" in text


def test_methods_are_shown_side_by_side() -> None:
    plan = dataclasses.replace(
        PLAN,
        config=make_config(method="full", learning_rate=1e-4, batch_size=16),
    )
    estimate = estimate_method(plan)
    slow = dataclasses.replace(
        estimate, seconds=(59.4, 18_420.0), fits_on="b200", has_enough_memory=False
    )
    table = render_text(render_method_estimates([estimate, slow]))
    assert "x7 (x4 to x12)" in table
    assert "the smallest GPU that fits: b200" in " ".join(table.split())
    fast = dataclasses.replace(estimate, seconds=(59.4, 18_420.0))
    assert "59 s to 5 h 7 min" in render_text(render_method_estimates([fast]))
    forecast = dataclasses.replace(fast, seconds=(59.0,))
    assert "59 s" in render_text(render_method_estimates([forecast])), "one value if measured"


def test_a_diagnosis_shows_what_is_missing() -> None:
    checks = (
        MachineCheck("compiler", False, "none [cc]", is_required=False, fix="install gcc"),
        MachineCheck("torch", True, "2.13"),
    )
    text = render_text(render_diagnosis(Diagnosis(MACHINE, checks, Path("/c"))))
    assert "missing  compiler  none [cc]" in text
    assert "install gcc" in text


def test_a_fix_of_doctor_stands_below_what_it_mends() -> None:
    """In a column of its own, both were broken into pillars at 80 columns."""
    fix = "pip install '.[fla]' for gated delta layers on an NVIDIA GPU"
    check = MachineCheck("extra fla", False, "fla-core not installed", is_required=False, fix=fix)
    diagnosis = Diagnosis(MACHINE, (check,), Path("/cache"))
    lines = render_text(render_diagnosis(diagnosis), width=100).splitlines()
    start = lines[1].index("fla-core")
    assert lines[1].rstrip().endswith("extra fla  fla-core not installed")
    assert lines[2].rstrip() == " " * start + fix
