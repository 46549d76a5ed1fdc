"""The rehearsal ratio by rule, and how long a piece of a text is."""

from collections.abc import Callable

import pytest

from tunesmith.plan.rehearsal import decide_rehearsal
from tunesmith.plan.rules import RuleContext
from tunesmith.recipe.fields import RehearsalConfig

LENGTHS = {"max_length": 700, "pack_length": 4096}


@pytest.mark.parametrize(
    ("parameters", "shift", "ratio"),
    [
        (4 * 10**8, "domain", 0.1),
        (10**9, "domain", 0.05),
        (4 * 10**8, "style", 0.01),
        (10**9, "language", 0.25),
        (4 * 10**8, "language", 0.25),
    ],
)
def test_the_ratio_follows_the_shift_and_the_size(
    make_context: Callable[..., RuleContext], parameters: int, shift: str, ratio: float
) -> None:
    wish = RehearsalConfig.model_validate({"data": "general.jsonl", "shift": shift})
    choice = decide_rehearsal(wish, make_context(parameters=parameters, **LENGTHS), None)[
        "rehearsal_ratio"
    ]
    assert (choice.value, choice.decided_by) == (ratio, "rule")
    assert "Ibrahim" in choice.source


def test_the_reason_says_how_much_that_is(make_context: Callable[..., RuleContext]) -> None:
    wish = RehearsalConfig.model_validate({"data": "general.jsonl", "ratio": 0.2})
    general = make_context(tokens=25_000).data
    choice = decide_rehearsal(wish, make_context(rows=1600, tokens=160_000, **LENGTHS), general)[
        "rehearsal_ratio"
    ]
    assert choice.decided_by == "user"
    assert choice.reason.endswith(
        "about 40,000 tokens added to 160,000 of the data, 1.6 passes over its rows"
    )


@pytest.mark.parametrize(
    ("longest", "pack", "piece"), [(700, 4096, 1024), (2000, 4096, 2000), (100, 512, 512)]
)
def test_a_piece_is_as_long_as_a_document_and_fits_a_pack(
    make_context: Callable[..., RuleContext], longest: int, pack: int, piece: int
) -> None:
    wish = RehearsalConfig.model_validate({"data": "general.jsonl"})
    settings = decide_rehearsal(wish, make_context(max_length=longest, pack_length=pack), None)
    assert settings["rehearsal_length"].value == piece


def test_without_rehearsal_there_is_nothing_to_choose(
    make_context: Callable[..., RuleContext],
) -> None:
    assert decide_rehearsal(None, make_context(), None) == {}
