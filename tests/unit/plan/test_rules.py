"""The rules' numbers, against the sources that they cite, and their bounds."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from tunesmith.core.model_spec import PartShape
from tunesmith.core.types import PlanValue
from tunesmith.data.sampler import StepSampler
from tunesmith.plan import rules
from tunesmith.plan.rules import RULES, Measures, RuleContext

Make = Callable[..., RuleContext]


@pytest.mark.parametrize(
    ("family", "hidden", "full"),
    [
        ("llama", 8192, 1.7e-5),
        ("llama", 4096, 2.9e-5),
        ("qwen3", 4096, 4.7e-5),
        ("llama", 2048, 4.9e-5),
        ("qwen2", 896, 5.3e-5),
        ("llama", 576, 1.3e-4),
        ("mistral", 4096, 3.8e-5),  # between the two fitted families
    ],
)
def test_learning_rates_are_those_of_the_published_formula(
    family: str, hidden: int, full: float, make_context: Make
) -> None:
    facts = {"model_type": family, "hidden_size": hidden, "batch_size": 128, "rows": 128 * 780}
    assert rules.learning_rate(make_context(**facts, method="full")).value == full
    assert rules.learning_rate(make_context(**facts)).value == pytest.approx(10 * full, rel=0.02)


def test_learning_rate_follows_the_square_root_of_the_batch_and_is_higher_for_short_runs(
    make_context: Make,
) -> None:
    facts = {"hidden_size": 4096, "parameters": 8 * 10**9}
    assert rules.learning_rate(make_context(**facts, batch_size=32, rows=3200)).value == 1.4e-4
    assert rules.learning_rate(make_context(**facts, batch_size=128, rows=12800)).value == 2.9e-4
    assert (
        rules.learning_rate(make_context(**facts, batch_size=128, rows=12799 - 128)).value == 4.3e-4
    )


def test_learning_rate_falls_no_further_below_16_rows(make_context: Make) -> None:
    """Of 2 rows, 1e-3 was better than 3e-4 for LoRA, and 5e-5 than 1e-5 in full fine-tuning."""
    facts = {"model_type": "llama", "hidden_size": 576, "parameters": 135 * 10**6, "rows": 80}
    for method, low, high in (("lora", 5e-4, 1.5e-3), ("full", 3e-5, 7e-5)):
        rates = [
            rules.learning_rate(make_context(**facts, batch_size=size, method=method)).value
            for size in (2, 4, 16, 32)
        ]
        assert low < rates[0] == rates[1] == rates[2] < high
        assert rates[3] > rates[2]
    small, usual = (
        rules.learning_rate(make_context(**facts, batch_size=size)).reason for size in (4, 16)
    )
    assert small.endswith("; a batch of 4 rows counts as one of 16")
    assert "counts as" not in usual


def test_learning_rate_is_bounded_and_says_when_it_is_extrapolated(make_context: Make) -> None:
    facts = {"hidden_size": 64, "batch_size": 128, "rows": 99}
    assert rules.learning_rate(make_context(**facts, parameters=10**8)).value == 3e-3
    assert rules.learning_rate(make_context(**facts, parameters=10**9)).value == 1e-3
    assert "extrapolated" in rules.learning_rate(make_context(hidden_size=1999)).reason
    assert "extrapolated" not in rules.learning_rate(make_context(hidden_size=2000)).reason


def test_epochs_follow_the_rows(make_context: Make) -> None:
    for rows, epochs in {1: 3, 1999: 3, 2000: 2, 49_999: 2, 50_000: 1}.items():
        assert rules.num_train_epochs(make_context(rows=rows)).value == epochs


@pytest.mark.parametrize(
    ("method", "rows", "size"),
    [
        ("lora", 1600, 16),
        ("lora", 1599, 8),
        ("lora", 500, 4),
        ("lora", 1, 4),
        ("full", 3200, 32),
        ("full", 1600, 16),
    ],
)
def test_batches_shrink_until_a_run_has_a_hundred_steps(
    method: str, rows: int, size: int, make_context: Make
) -> None:
    assert rules.batch_size(make_context(method=method, rows=rows)).value == size


def test_rank_holds_what_is_to_be_learned(make_context: Make) -> None:
    per_rank = 2 * 305_280
    ranks = {1: 16, 16 * per_rank: 16, 16 * per_rank + 1: 32, 100 * per_rank: 128, 10**12: 256}
    for tokens, rank in ranks.items():
        assert rules.lora_r(make_context(supervised_tokens=tokens)).value == rank


def test_rank_stabilising_starts_above_64(make_context: Make) -> None:
    for rank, is_stabilized in {16: False, 64: False, 128: True}.items():
        assert rules.use_rslora(make_context(lora_r=rank)).value is is_stabilized
        assert rules.lora_alpha(make_context(lora_r=rank)).value == 32


def test_warm_up_is_ten_steps_within_bounds(make_context: Make) -> None:
    ratios = {1: 0, 4: 0, 5: 0.1, 10: 0.1, 100: 0.1, 200: 0.05, 333: 0.03, 10_000: 0.03}
    for steps, ratio in ratios.items():
        assert rules.warmup_ratio(make_context(rows=steps, batch_size=1)).value == ratio


def test_documents_are_not_cut_unless_the_model_reads_less(make_context: Make) -> None:
    uncut = rules.max_length(make_context())
    assert (uncut.value, uncut.decided_by) == (700, "rule")
    cut = rules.max_length(make_context(context_length=512))
    assert (cut.value, cut.decided_by) == (512, "checkpoint")


@pytest.mark.parametrize(
    ("device", "longest", "pack"), [("cpu", 700, 4096), ("cpu", 5000, 5000), ("cuda", 700, 8192)]
)
def test_packs_hold_the_longest_document(
    device: str, longest: int, pack: int, make_context: Make
) -> None:
    assert rules.pack_length(make_context(device=device, max_length=longest)).value == pack


def test_precision_and_attention_are_what_the_machine_has(make_context: Make) -> None:
    assert rules.dtype(make_context(has_bf16_matmul=True)).value == "bf16"
    assert rules.dtype(make_context(has_bf16_matmul=False)).value == "fp32"
    assert rules.attention(make_context()).value == "cpu_kernel"
    assert rules.attention(make_context(compiler=None)).value == "sdpa"
    assert rules.attention(make_context(has_bf16_matmul=False)).value == "sdpa"
    assert rules.attention(make_context(dtype="fp32")).value == "sdpa"
    assert rules.attention(make_context(device="cuda")).value == "varlen"


def test_a_run_is_looked_at_four_times(make_context: Make) -> None:
    for rows in (1, 4, 5, 160, 1001):
        facts = make_context(rows=rows, batch_size=1)
        every = rules.eval_steps(facts).value
        assert every == rules.save_steps(facts).value >= 1
        assert facts.steps // every <= 4


def test_a_plan_and_its_schedule_count_the_same_steps(make_context: Make) -> None:
    """In each of 288 combinations, which take no time."""
    epochs = (0.01, 0.25, 0.5, 1, 1.5, 2.95)
    for rows, passes, size, limit in product((1, 7, 10, 33), epochs, (1, 2, 5, 64), (None, 1, 9)):
        facts = make_context(rows=rows, num_train_epochs=passes, batch_size=size, max_steps=limit)
        schedule = StepSampler(rows, size, passes, seed=0, max_steps=limit)
        assert facts.steps == schedule.total_steps, (rows, passes, size, limit)


def test_every_rule_gives_a_reason_that_fits_on_a_screen(make_context: Make) -> None:
    facts = make_context()
    for key, decide_by_rule in RULES.items():
        choice = decide_by_rule(facts)
        facts = facts.with_settings({key: choice})
        assert choice.decided_by in ("rule", "checkpoint")
        assert 10 < len(choice.reason) < 160, key


@pytest.mark.parametrize(
    ("facts", "layout"),
    [
        ({}, "blocked"),
        ({"dtype": "fp32"}, "plain"),
        ({"method": "full"}, "plain"),
        ({"device": "cuda"}, "plain"),
        ({"has_bf16_matmul": False}, "plain"),
        ({"available_bytes": 1_000_000_000}, "plain"),
    ],
)
def test_frozen_weights_are_blocked_where_there_is_room(
    facts: dict[str, object], layout: str, make_context: Make
) -> None:
    assert rules.weight_layout(make_context(**facts)).value == layout


def test_weights_that_leave_no_room_are_quantized_where_that_can_be_done(
    make_context: Make,
) -> None:
    large = {"parameters": 8 * 10**9, "available_bytes": 19 * 10**9}
    installed = {"versions": {"bitsandbytes": "0.50.2"}}
    assert rules.method(make_context(**large, **installed)).value == "qlora"
    assert rules.method(make_context(**large)).value == "lora"
    assert (
        rules.method(make_context(**large | {"available_bytes": 20 * 10**9}, **installed)).value
        == "lora"
    )


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"method": "lora"}, False),
        ({"max_grad_norm": 1.0}, False),
        ({"batch_size": 6}, False),  # of 700 tokens: two packs
        ({"batch_size": 6, "pack_length": 8192}, True),
    ],
)
def test_a_step_is_taken_in_the_backward_where_nothing_needs_all_gradients(
    changed: dict[str, object], taken: bool, make_context: Make
) -> None:
    decided = {
        "method": "full",
        "max_grad_norm": 0.0,
        "pack_length": 4096,
        "batch_size": 4,
    } | changed
    assert rules.step_in_backward(make_context(**decided)).value is taken


def test_prefixes_are_shared_where_that_saves_enough_and_nothing_is_drawn(
    make_context: Make,
) -> None:
    decided = {"pack_length": 4096, "lora_dropout": 0.0, "batch_size": 8}

    def choice(saved: float, **changed: object) -> PlanValue:
        facts = replace(
            make_context(**decided | changed),
            measures=Measures(saved_share=lambda batch, pack: saved * (batch, pack).count(8)),
        )
        return rules.share_prefixes(facts)

    assert [choice(saved).value for saved in (0.0, 0.049, 0.05, 0.6)] == [False, False, True, True]
    assert choice(0.273).reason.startswith("saves 27.3% of the tokens")
    assert not choice(0.6, batch_size=16).value, "what a step of this size saves"
    assert not choice(0.6, lora_dropout=0.1).value
    assert "lora_dropout" in choice(0.6, lora_dropout=0.1).reason
    assert choice(0.6, lora_dropout=0.1, method="full").value, "no adapter, no dropout"


FOUR = dict.fromkeys(range(4), 12)
DENSE = {"attention": PartShape({1: 8, 3: 8}, 8, 8, 4, 4), "mlp": PartShape(FOUR, 8, 8, 8, 4)}
RECURRENT = {"recurrent": PartShape({0: 8, 2: 8}, 8, 8, 4, 4)}
EXPERTS = {"experts": PartShape(FOUR, 80, 80, 8, 4)}


@pytest.mark.parametrize(
    ("parts", "mixers", "num_experts", "targets", "source"),
    [
        (DENSE, ("attention",) * 4, 0, "all-linear", "Schulman 2025"),
        (DENSE | RECURRENT, ("delta", "attention") * 2, 0, ("attention", "mlp"), "2604.22127"),
        (DENSE | RECURRENT, ("attention+mamba2",) * 4, 0, "all-linear", "Schulman 2025"),
        (DENSE | RECURRENT | EXPERTS, ("conv", "attention"), 8, ("attention", "mlp"), "2604.22127"),
        (DENSE | EXPERTS, ("attention",) * 4, 8, ("attention", "mlp"), "ours"),
        ({"attention": DENSE["attention"]} | EXPERTS, ("attention",), 8, ("attention",), "ours"),
    ],
)
def test_recurrent_layers_and_experts_have_no_adapter_by_default(
    parts: dict[str, PartShape],
    mixers: tuple[str, ...],
    num_experts: int,
    targets: str | tuple[str, ...],
    source: str,
    make_context: Make,
) -> None:
    context = make_context(parts=parts, layer_mixers=mixers, num_experts=num_experts)
    decided = rules.lora_target_modules(context)
    assert decided.value == targets
    assert source in decided.source
    assert decided.reason


def test_the_rank_holds_the_tokens_in_the_adapted_layers_alone(make_context: Make) -> None:
    ranks = [
        rules.lora_r(make_context(lora_target_modules=targets, supervised_tokens=10_000_000)).value
        for targets in ("all-linear", ("attention", "mlp"), "attention")
    ]
    assert ranks[0] == ranks[1] < ranks[2]
