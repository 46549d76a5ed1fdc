"""The rules of continued pretraining: their numbers, against the sources that they cite, and their
bounds."""

import dataclasses
from collections.abc import Callable

import pytest

from tunesmith.data.pretraining import SEPARATOR_TOKENS
from tunesmith.plan import rules_cpt
from tunesmith.plan.rules import RULES, RuleContext
from tunesmith.plan.rules_cpt import CPT_RULES, PEAK_LEARNING_RATES, UNKNOWN_PEAK

Make = Callable[..., RuleContext]
M = 10**6


@pytest.fixture
def texts(make_context: Make) -> Make:
    def make(**changed: object) -> RuleContext:
        return dataclasses.replace(make_context(**{"max_length": 2048} | changed), stage="cpt")

    return make


def test_the_learning_rate_is_a_tenth_of_the_peak_with_its_source(texts: Make) -> None:
    decided = rules_cpt.learning_rate(texts(tokens=20 * M))
    assert (decided.value, decided.source[:19]) == (3e-4, "SmolLM2 paper, 135M")
    assert "a tenth of 0.003, the peak of its pretraining" in decided.reason
    assert "a 30th to a 60th" not in decided.reason
    assert "a 30th to a 60th" in rules_cpt.learning_rate(texts(tokens=M)).reason
    assert (
        rules_cpt.learning_rate(texts(hidden_size=8192, num_layers=80, vocab_size=32000)).value
        == 1.5e-5
    )
    assert all(1e-4 <= peak <= 3e-3 and source for peak, source in PEAK_LEARNING_RATES.values())


def test_much_text_is_re_warmed_to_the_peak_and_re_decayed(texts: Make) -> None:
    assert rules_cpt.learning_rate(texts(tokens=10**10 - 1)).value == 3e-4
    decided = rules_cpt.learning_rate(texts(tokens=10**10))
    assert (decided.value, decided.reason[:45]) == (
        3e-3,
        "10,000,000,000 tokens: re-warmed to the peak ",
    )
    wanted = texts(tokens=M, batch_tokens=4096, num_train_epochs=1)
    schedule, warm = (CPT_RULES[key](wanted) for key in ("lr_scheduler_type", "warmup_ratio"))
    assert (schedule.value, schedule.source, warm.source) == (
        "linear",
        "Ibrahim 2024",
        "Ibrahim 2024",
    )


@pytest.mark.parametrize(
    ("parameters", "rate"), [(10**8, 3e-4), (5 * 10**8, 1e-4), (5 * 10**9, 2e-5)]
)
def test_an_unknown_peak_is_said(parameters: int, rate: float, texts: Make) -> None:
    decided = rules_cpt.learning_rate(texts(hidden_size=999, parameters=parameters))
    assert decided.value == rate
    assert UNKNOWN_PEAK in decided.reason


@pytest.mark.parametrize(("tokens", "epochs"), [(M - 1, 3), (M, 2), (10 * M - 1, 2), (10 * M, 1)])
def test_passes_follow_the_tokens(tokens: int, epochs: int, texts: Make) -> None:
    assert rules_cpt.num_train_epochs(texts(tokens=tokens)).value == epochs


@pytest.mark.parametrize(
    ("tokens", "window", "size"),
    [
        (4 * M, 2048, 32768),
        (3 * M, 2048, 16384),
        (10_000, 2048, 4096),
        (10_000, 512, 1024),
        (M, 60_000, 60_000),
    ],
)
def test_steps_shrink_until_there_are_a_hundred(
    tokens: int, window: int, size: int, texts: Make
) -> None:
    assert rules_cpt.batch_tokens(texts(tokens=tokens, max_length=window)).value == size


def test_packs_are_of_8k_where_memory_allows(texts: Make) -> None:
    lengths = {
        rules_cpt.pack_length(texts(device=device, available_bytes=free)).value: (device, free)
        for device, free in (("cpu", 10**12), ("cuda", 10**9), ("cuda", 10**11))
    }
    assert lengths == {4096: ("cuda", 10**9), 8192: ("cuda", 10**11)}
    assert rules_cpt.pack_length(texts(max_length=9000)).value == 9000
    assert rules_cpt.max_length(texts(context_length=512)).value == 512


def test_all_weights_are_trained_on_much_text_where_they_fit(texts: Make) -> None:
    assert rules_cpt.method(texts(tokens=10 * M)).value == "full"
    assert rules_cpt.method(texts(tokens=10 * M - 1)).value == "lora"
    assert rules_cpt.method(texts(tokens=10 * M, available_bytes=3 * 10**9)).value == "lora"


def test_steps_are_counted_in_tokens(texts: Make) -> None:
    make_context = texts(tokens=1001, num_train_epochs=2, batch_tokens=500)
    assert make_context.steps == 5
    assert dataclasses.replace(make_context, max_steps=3).steps == 3


def test_other_rules_are_those_of_fine_tuning() -> None:
    assert [key for key in CPT_RULES if key != "batch_tokens"] == [
        key for key in RULES if key != "batch_size"
    ]
    assert list(CPT_RULES).index("batch_tokens") == list(RULES).index("batch_size")
    assert CPT_RULES["lora_r"] is RULES["lora_r"]
    assert len(set(SEPARATOR_TOKENS)) == len(SEPARATOR_TOKENS)
