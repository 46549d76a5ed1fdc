"""What stands beside a plan: how sure a value is, the usual advice, the work, and other methods."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiment_modules import import_module
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan, PlanValue
from tunesmith.plan.build import build_plan
from tunesmith.plan.confidence import add_evidence
from tunesmith.plan.flops import (
    compute_token_flops,
    count_computed_tokens,
    estimate_run_flops,
    estimate_seconds,
)
from tunesmith.plan.gpu_time import estimate_gpu_time
from tunesmith.plan.hardware_presets import HARDWARE_PRESETS, assume_bitsandbytes, choose_machine
from tunesmith.plan.method_comparison import MethodEstimate, estimate_methods
from tunesmith.plan.rules import Measures, RuleContext, make_rule_value
from tunesmith.plan.rules_cpt import UNKNOWN_PEAK
from tunesmith.recipe.schema import Recipe

claims = import_module("experiments.claims")
definitions = import_module("experiments.definitions")
run = import_module("experiments.run")

DECIDED = {"holds", "does not hold", "rerun after a change of the product"}
LARGE = {"hidden_size": 4096, "parameters": 8 * 10**9}


@pytest.fixture
def plan(make_context: Callable[..., RuleContext]) -> Callable[..., Plan]:
    def make(saved: float = 0.0, target: str | None = None, **wishes: Any) -> Plan:
        facts = make_context()
        return build_plan(
            Recipe.model_validate({"model": "smollm2", "data": "train.jsonl", **wishes}),
            machine=assume_bitsandbytes(choose_machine(facts.machine, target, None)),
            model=facts.model,
            data={"data": facts.data, "test_data": facts.data},
            output_dir=Path("runs/run-1"),
            now="2026-01-01T00:00:00",
            measures=Measures(saved_share=lambda *_: saved),
        )

    return make


def test_every_value_of_a_plan_says_how_sure_it_is(plan: Callable[..., Plan]) -> None:
    choices = plan(saved=0.2, batch_size=8, rehearsal={"data": "general.jsonl"}).settings
    sure = {key: choice.confidence for key, choice in choices.items()}
    assert sure["learning_rate"] == "extrapolated"
    assert {sure[key] for key in ("method", "lora_r", "num_train_epochs", "rehearsal_ratio")} == {
        "published"
    }
    assert {
        sure[key] for key in ("max_length", "dtype", "share_prefixes", "gradient_checkpointing")
    } == {"measured here"}
    assert {sure[key] for key in ("batch_size", "seed", "eval_steps")} == {""}
    assert "followed" in choices["rehearsal_ratio"].common_advice
    assert {key for key, choice in choices.items() if choice.common_advice} >= {
        "method",
        "learning_rate",
        "lora_r",
    }


@pytest.mark.parametrize(
    ("key", "value", "decided", "model", "advice"),
    [
        ("learning_rate", 2e-5, {}, LARGE, "1e-5 to 5e-5: followed"),
        ("learning_rate", 3e-4, {}, LARGE, "costs .025 nats per token at 8B"),
        ("learning_rate", 1e-3, {"method": "full"}, {}, "With 2 rows per step, 135M ended .047"),
        ("lora_r", 128, {}, LARGE, "64 to 256 for complex reasoning: followed"),
        (
            "lora_r",
            16,
            {},
            {},
            "Rank 64 takes 234 MB more; whether 60,000 supervised tokens need it is undecided",
        ),
        ("lora_r", 16, {}, {"supervised_tokens": 3 * 10**7}, "these rows may be worth it"),
        ("pack_length", 8192, {}, {}, "followed"),
        ("pack_length", 12000, {}, {}, "a document is longer than that"),
        ("rehearsal_ratio", 0.01, {}, {}, "1% already prevents most"),
        ("rehearsal_ratio", 0.25, {}, {}, "at 10% the old loss rises"),
        ("method", "full", {}, {}, "full fine-tuning forgets more"),
    ],
)
def test_the_usual_advice_is_compared(
    key: str,
    value: Any,
    decided: Any,
    model: Any,
    advice: str,
    make_context: Callable[..., RuleContext],
) -> None:
    facts = make_context(**model, **decided)
    assert (
        advice
        in add_evidence({key: make_rule_value(value, "why", "source")}, facts)[key].common_advice
    )


def test_a_plan_cites_the_experiments_on_its_settings(plan: Callable[..., Plan]) -> None:
    """Each decided experiment, at each setting that it declares, in the source or beside the usual
    advice."""
    experiments = definitions.load_experiments()
    collected = run.collect_results(experiments, definitions.EXPERIMENTS)
    results = {name: run.group_runs(stored) for name, stored in collected.items()}
    verdicts = claims.judge_claims(experiments, results)
    num_cited = 0
    for experiment in experiments:
        if not {each.verdict for each in verdicts[experiment.name]} & DECIDED:
            continue
        for setting in experiment.settings:
            wishes: dict[str, Any] = {"stage": experiment.recipe.get("stage", "sft")}
            if setting == "rehearsal_ratio":
                wishes["rehearsal"] = {"data": "general.jsonl"}
            chosen = plan(**wishes).settings[setting]
            text = chosen.source + chosen.common_advice
            assert f"experiments/{experiment.name}" in text, (setting, text)
            num_cited += 1
    assert num_cited >= 9


def test_own_experiments_are_not_publications(make_context: Callable[..., RuleContext]) -> None:
    for source in ("ours", "ours; experiments/guard_collapse: 0.2", "experiments/rank: .013", ""):
        chosen = {"pack_length": make_rule_value(4096, "why", source)}
        assert add_evidence(chosen, make_context())["pack_length"].confidence == ""
    chosen = {"pack_length": make_rule_value(4096, "why", "Hu 2021; experiments/rank: .013")}
    assert add_evidence(chosen, make_context())["pack_length"].confidence == "published"


def test_rates_are_published_from_where_their_formula_was_fitted(
    make_context: Callable[..., RuleContext],
) -> None:
    chosen = {"learning_rate": make_rule_value(3e-4, "why", "source")}
    assert add_evidence(chosen, make_context(**LARGE))["learning_rate"].confidence == "published"
    assert add_evidence(chosen, make_context())["learning_rate"].confidence == "extrapolated"
    texts = dataclasses.replace(make_context(), stage="cpt")
    for why, sure in (
        (f"a tenth of the usual peak; {UNKNOWN_PEAK}", "extrapolated"),
        ("3e-3", "published"),
    ):
        rated = add_evidence({"learning_rate": make_rule_value(3e-4, why, "Ibrahim 2024")}, texts)[
            "learning_rate"
        ]
        assert (rated.confidence, "a tenth" in rated.common_advice) == (sure, True)
    assert (
        add_evidence({"seed": PlanValue(1, "user", "so")}, make_context())["seed"].confidence == ""
    )


def test_work_is_two_operations_a_weight_and_pass(plan: Callable[..., Plan]) -> None:
    made = plan()
    spec, blocks = made.model, made.model.block_parameters
    assert compute_token_flops(spec, "full", "none", 0) == 6 * blocks
    assert compute_token_flops(spec, "full", "full", 0) == 8 * blocks
    assert compute_token_flops(spec, "lora", "none", 16) == 4 * blocks + 6 * 16 * 305_280
    assert count_computed_tokens(made) == 3 * 300_000
    assert count_computed_tokens(plan(max_steps=10)) == pytest.approx(10 * 16 * 300)
    assert count_computed_tokens(plan(saved=0.5)) == count_computed_tokens(made) / 2
    assert count_computed_tokens(
        plan(rehearsal={"data": "general.jsonl", "ratio": 0.1})
    ) == pytest.approx(10**6)
    head = 4 * spec.head_parameters * 3 * 60_000
    assert estimate_run_flops(made) == pytest.approx(
        compute_token_flops(spec, "lora", "none", 16) * 900_000 + head
    )
    assert estimate_run_flops(plan(saved=0.5)) > estimate_run_flops(made) / 2, (
        "what is shared has no targets"
    )


def test_a_target_takes_the_published_share_of_its_rate(plan: Callable[..., Plan]) -> None:
    low, high = estimate_seconds(plan(), HARDWARE_PRESETS["h100"].flops)
    assert low < high
    assert estimate_run_flops(plan()) / high == pytest.approx(0.29 * 989e12)


@pytest.mark.parametrize("target", sorted(HARDWARE_PRESETS))
def test_the_time_on_a_gpu_is_never_nothing(plan: Callable[..., Plan], target: str) -> None:
    """The least time of a step is that of its launches, and a run starts, proves and measures."""
    preset = HARDWARE_PRESETS[target]
    made = plan(max_steps=10, retention_data="general.jsonl")
    timed = estimate_gpu_time(made, preset)
    launches = 64 * made.model.num_layers  # of a step, as tests/fakecuda counts them
    assert timed.seconds[0] > 10 * launches * 8e-6
    assert timed.total_seconds > timed.seconds[1] + 12
    assert timed.total_seconds > estimate_gpu_time(plan(max_steps=10), preset).total_seconds
    assert estimate_gpu_time(plan(), preset).seconds > timed.seconds, "more steps"


def test_methods_side_by_side(plan: Callable[..., Plan]) -> None:
    full, lora, qlora = estimate_methods(lambda method: plan(method=method))
    assert [estimate.method for estimate in (full, lora, qlora)] == ["full", "lora", "qlora"]
    assert full.peak_bytes > lora.peak_bytes > qlora.peak_bytes
    assert full.flops > lora.flops == qlora.flops
    assert (full.trained_parameters, lora.trained_parameters) == (134_515_008, 16 * 305_280)
    assert (full.result_bytes, lora.result_bytes) == (2 * 134_515_008, 4 * 16 * 305_280)
    assert (full.seconds, full.has_enough_memory, full.fits_on) == ((), True, "")
    assert lora.multiple == pytest.approx(lora.peak_bytes / 269_030_016)
    assert {estimate.usual_multiple for estimate in (lora, qlora)} == {"x1.5"}
    assert parse_as(MethodEstimate, to_jsonable(lora)) == lora


def test_modules_trained_in_full_count_as_trained(plan: Callable[..., Plan]) -> None:
    def make_plan(method: str) -> Plan:
        modules = {} if method == "full" else {"modules_to_save": ["embed_tokens"]}
        return plan(method=method, **modules)

    full, lora, _ = estimate_methods(make_plan, lambda modules: 1000 * len(modules))
    assert (full.trained_parameters, lora.trained_parameters) == (134_515_008, 16 * 305_280 + 1000)
