"""The plan: who decided what, what cannot be, and what the user is told before starting."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Finding, Plan
from tunesmith.plan.build import (
    ADAPTER_KEYS,
    KTO_KEYS,
    PREFERENCE_KEYS,
    build_plan,
    refuse_if_too_large,
)
from tunesmith.plan.flops import estimate_run_flops
from tunesmith.plan.memory import EVALUATION_BYTES
from tunesmith.plan.rules import RULES, Measures, RuleContext
from tunesmith.recipe.schema import Recipe

Planner = Callable[..., Plan]


@pytest.fixture
def plan(make_context: Callable[..., RuleContext]) -> Planner:
    """plan({recipe key: value}, field=...) as for `known`; `roles`: reports beside the training
    data's, `saved`: by sharing prefixes."""

    def make(
        wishes: dict[str, Any] | None = None,
        roles: dict[str, Any] | None = None,
        saved: float = 0,
        **changed: Any,
    ) -> Plan:
        facts = make_context(**changed)
        return build_plan(
            Recipe.model_validate({"model": "smollm2", "data": "train.jsonl", **(wishes or {})}),
            machine=facts.machine,
            model=facts.model,
            data={
                "data": facts.data,
                **{r: dataclasses.replace(facts.data, **v) for r, v in (roles or {}).items()},
            },
            output_dir=Path("runs/run-1"),
            now="2026-01-01T00:00:00",
            measures=Measures(saved_share=lambda *_: saved),
        )

    return make


def test_what_is_left_open_is_decided_by_rules(plan: Planner) -> None:
    made = plan()
    assert made.reasons.keys() >= RULES.keys() - set(PREFERENCE_KEYS)
    assert {choice.decided_by for choice in made.reasons.values()} == {"rule"}
    assert all(choice.reason for choice in made.reasons.values())
    assert (made.config.batch_size, made.config.num_train_epochs, made.steps) == (16, 3, 188)
    assert (made.config.now, made.config.output_dir) == ("2026-01-01T00:00:00", "runs/run-1")


def test_what_is_wished_for_is_obeyed_and_others_follow(plan: Planner) -> None:
    made = plan({"batch_size": 4, "lora_r": 128, "seed": 3, "learning_rate": 0.5})
    assert [
        made.reasons[key].decided_by for key in ("batch_size", "lora_r", "seed", "learning_rate")
    ] == ["user"] * 4
    assert (
        made.config.batch_size,
        made.config.lora_r,
        made.config.seed,
        made.config.learning_rate,
    ) == (
        4,
        128,
        3,
        0.5,
    )
    assert made.config.use_rslora is True, "decided from the rank that was wished for"
    assert made.steps == 750


def test_activations_are_kept_as_far_as_they_fit(plan: Planner) -> None:
    wide = plan()
    peaks = {
        policy: plan({"gradient_checkpointing": policy}).memory_bytes["peak"]
        for policy in ("none", "selective", "full")
    }
    assert (wide.config.gradient_checkpointing, wide.memory_bytes["peak"]) == (
        "none",
        peaks["none"],
    )
    for policy, fitting in (("selective", peaks["selective"]), ("full", peaks["full"])):
        made = plan(available_bytes=int(1.151 * fitting), weight_layout="plain")
        assert made.config.gradient_checkpointing == policy
        assert made.memory_bytes["peak"] <= fitting
        refuse_if_too_large(made)
    little = plan(available_bytes=int(peaks["full"] / 2))
    assert little.config.gradient_checkpointing == "full"
    with pytest.raises(MachineError, match="the run needs about"):
        refuse_if_too_large(little)
    assert (
        plan({"gradient_checkpointing": "none"}, available_bytes=int(peaks["full"]))
        .reasons["gradient_checkpointing"]
        .decided_by
        == "user"
    )


def test_pairs_have_their_own_values_and_rates(plan: Planner) -> None:
    made = plan({"stage": "preference"})
    assert made.reasons.keys() >= RULES.keys() - set(KTO_KEYS)
    assert (
        made.config.loss,
        made.config.gamma,
        made.config.nll_coefficient,
        made.config.num_train_epochs,
    ) == (
        "dpo",
        0,
        0.2,
        2,
    )
    others = {loss: plan({"stage": "preference", "loss": loss}) for loss in ("orpo", "simpo")}
    assert (others["orpo"].config.beta, others["orpo"].config.nll_coefficient) == (0.1, 1.0)
    assert (others["simpo"].config.beta, others["simpo"].config.gamma) == (2.0, 1.0)
    assert others["orpo"].config.learning_rate == pytest.approx(
        8 * made.config.learning_rate, rel=0.02
    )
    assert made.config.learning_rate < plan().config.learning_rate / 10
    full = plan({"stage": "preference", "method": "full"})
    assert made.config.learning_rate == pytest.approx(10 * full.config.learning_rate, rel=0.02)
    assert (
        made.memory_bytes["activations"]
        >= plan({"num_train_epochs": 2}).memory_bytes["activations"]
    )


def test_the_model_decides_what_its_context_forces(plan: Planner) -> None:
    assert plan(context_length=512).reasons["max_length"].decided_by == "checkpoint"


def test_full_fine_tuning_has_no_adapter_in_its_plan(plan: Planner) -> None:
    made = plan({"method": "full"})
    assert not set(ADAPTER_KEYS) & made.reasons.keys()
    assert made.config.learning_rate < plan().config.learning_rate / 5


@pytest.mark.parametrize("wish", [{"max_steps": 7}, {"num_train_epochs": 0.112}])
def test_steps_are_what_will_run(wish: dict[str, Any], plan: Planner) -> None:
    assert plan(wish | {"batch_size": 16}).steps == 7


def test_the_plan_says_whether_epochs_or_max_steps_decide(plan: Planner) -> None:
    for wish in ({}, {"num_train_epochs": 3}):
        made = plan(wish | {"max_steps": 94, "batch_size": 16})
        assert (made.steps, made.config.num_train_epochs) == (94, 3)
        reason = made.reasons["num_train_epochs"].reason
        assert reason == "max_steps decides: 94 steps are 1.5 epochs"
    made = plan({"max_steps": 188, "batch_size": 16})
    assert "max_steps" not in made.reasons["num_train_epochs"].reason, "all epochs end there too"


@pytest.mark.parametrize(
    ("wishes", "key", "message"),
    [
        (
            {"max_length": 9000, "pack_length": 9000},
            "max_length",
            "exceeds the model's context of 8,192",
        ),
        ({"pack_length": 600}, "pack_length", "below max_length 700"),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    wishes: dict[str, Any], key: str, message: str, plan: Planner
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        plan(wishes)
    assert refusal.value.where == key
    assert refusal.value.fix


def test_memory_follows_what_a_step_holds(plan: Planner) -> None:
    alike, apart = (
        plan({"share_prefixes": wish, "batch_size": 8}, saved=0.5) for wish in (True, False)
    )
    assert alike.memory_bytes["activations"] < 0.6 * apart.memory_bytes["activations"]
    small, large = plan({"batch_size": 1}), plan({"batch_size": 64})
    assert small.memory_bytes["activations"] < large.memory_bytes["activations"]
    assert large.memory_bytes == plan({"batch_size": 640}).memory_bytes, (
        "a pack is never longer than pack_length"
    )


def test_what_measuring_leaves_behind_counts_where_something_is_measured(plan: Planner) -> None:
    bare = plan({"retention_data": "none"}).memory_bytes
    assert "evaluation" not in bare
    for roles, wishes in (
        ({"test_data": {}}, {}),
        ({"eval_data": {}}, {}),
        ({}, {"retention_data": "general.jsonl"}),
    ):
        held = plan({"retention_data": "none"} | wishes, roles=roles).memory_bytes
        assert held["peak"] - bare["peak"] == held["evaluation"] == EVALUATION_BYTES > 0


def test_a_machine_without_memory_or_disk_is_refused(plan: Planner) -> None:
    refuse_if_too_large(plan())
    wish = {"gradient_checkpointing": "none"}
    peak = plan(wish).memory_bytes["peak"]
    refuse_if_too_large(plan(wish, available_bytes=int(1.16 * peak)))
    with pytest.raises(MachineError, match=r"of memory with a margin of 15%, but .* GB are free"):
        refuse_if_too_large(plan(wish, available_bytes=int(1.14 * peak)))
    with pytest.raises(MachineError, match="1,000 are free"):
        refuse_if_too_large(plan(disk_free_bytes=1000))


def test_the_user_is_warned_of_what_weakens_the_result(plan: Planner) -> None:
    few = "\n".join(plan(rows=90).warnings)
    assert "only 68 steps" in few
    assert "no held-out rows" in few
    assert "extrapolated" in few
    warnings = plan(
        roles={
            "test_data": {"rows": 12, "dropped": {}},
            "eval_data": {"findings": (Finding("f", "warn", "odd"), Finding("g", "info", "quiet"))},
        },
        dropped={"longer than max_length": 1},
    ).warnings
    text = "\n".join(warnings)
    assert "12 test rows" in text
    assert "eval_data: odd" in text
    assert "quiet" not in text
    assert "data: 1 of 1,000 rows lose all their documents" in text
    assert len(set(warnings)) == len(warnings)


def test_a_large_model_with_enough_rows_needs_no_warning(plan: Planner) -> None:
    assert plan(roles={"test_data": {"rows": 200}}, parameters=8 * 10**9).warnings == ()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_that_the_hardware_lacks_is_told(device: str, plan: Planner) -> None:
    wish = {"dtype": "bf16"}
    lacking = plan(wish, device=device, has_bf16_matmul=False).warnings
    assert any("has no bf16: torch emulates it, slower than fp32" in text for text in lacking)
    assert not any("emulates" in text for text in plan(wish, device=device).warnings)
    unset = plan(device=device, has_bf16_matmul=False).warnings
    assert not any("emulates" in text for text in unset)


def test_a_cpu_is_said_to_meet_all_experts(plan: Planner) -> None:
    sparse = {
        "num_experts": 128,
        "num_experts_per_token": 8,
        "active_parameters": 3 * 10**9,
        "block_parameters": 30 * 10**9,
        "parameters": 31 * 10**9,
        "available_bytes": 200 * 10**9,
    }
    (warning,) = (text for text in plan(**sparse).warnings if "experts" in text)
    assert "each token uses 8 of 128 experts (10% of the layers' parameters)" in warning
    assert "slow on a CPU" in warning
    assert not any("experts" in text for text in plan(**sparse, device="cuda").warnings)


def test_experts_cost_what_a_token_meets(plan: Planner) -> None:
    sizes = {"block_parameters": 30 * 10**9, "parameters": 31 * 10**9}
    dense = plan(**sizes, active_parameters=30 * 10**9)
    sparse = plan(**sizes, active_parameters=3 * 10**9, num_experts=128, num_experts_per_token=8)
    assert estimate_run_flops(sparse) < 0.2 * estimate_run_flops(dense)
    assert sparse.memory_bytes["weights"] <= dense.memory_bytes["weights"]


@pytest.mark.parametrize(
    ("wishes", "warning"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.5: 10 times the rule or more"),
        ({"lora_r": 2000}, "lora_r 2000: above the hidden size of 576"),
        ({"num_train_epochs": 80}, "num_train_epochs 80: each row is repeated"),
        ({"warmup_ratio": 0.9}, "warmup_ratio 0.9: most of the run"),
        ({"weight_decay": 0.9}, "weight_decay 0.9: usual are 0 to 0.1; the rule gives 0"),
        ({"lora_dropout": 0.9}, "lora_dropout 0.9: usual are"),
    ],
)
def test_absurd_values_are_warned_of(plan: Planner, wishes: dict[str, Any], warning: str) -> None:
    assert any(each.startswith(warning) for each in plan(wishes).warnings)
    usual = plan({"learning_rate": 1e-3, "lora_r": 64, "num_train_epochs": 3}).warnings
    assert not any("the rule gives" in each for each in usual)
