"""What is said of retention, in words."""

import pytest
from rich.console import Console
from rich.text import Text

from tunesmith.cli.views.forgetting import format_kl_scores, format_relearning, render_scales
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, ScalePoint


def score(value: float, task: str = "general text", metric: str = "bits_per_byte") -> Score:
    return Score(task, metric, value, value - 0.05, value + 0.05, 20, 9)


def change(task: str, difference: float) -> Comparison:
    low, high = difference - 0.004, difference + 0.004
    return Comparison(
        task, "bits_per_byte", score(1.0), score(1 + difference), difference, low, high, False
    )


def test_what_is_back_after_other_texts_is_a_share_of_what_was_lost() -> None:
    changes = [
        change("general text: code", 0.05),
        change("...", 0.01),
        change("general text: fiction", 0.001),
    ]
    assert format_relearning([*changes, change("...", 0.002)]) == [
        "general text: code: +0.050 by itself, +0.010 after others: 80% of the loss is back"
    ]
    gone = format_relearning([change("general text: code", 0.05), change("...", 0.06)])
    assert gone == [
        "general text: code: +0.050 by itself, +0.060 after others: none of the loss is back"
    ]
    assert "nothing to recover" in format_relearning(changes[2:] + changes[1:2])[0]


def test_a_distance_says_what_it_is_of() -> None:
    (line,) = format_kl_scores([score(0.021, metric="kl")])
    assert Text.from_markup(line).plain == (
        "general text: KL to the model before, nats a token 0.021 [-0.029, 0.071]"
    )


@pytest.mark.parametrize("general", [True, False])
def test_a_row_a_scale_and_what_is_offered(general: bool) -> None:
    losses, bits = (2.0, 1.5, 1.2, 1.04, 1.0), (0.8, 0.81, 0.82, 0.84, 0.9)
    points = [
        ScalePoint(n / 4, score(losses[n], "eval", "loss"), score(bits[n]) if general else None)
        for n in range(5)
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_scales(points))
    lines = captured.get().splitlines()
    row = next(line.split() for line in lines if line.startswith(" 0.75"))
    assert row[:3] == ["0.75", "1.0400", "96%"]
    assert row[3:] == (["0.8400", "40%", "offered"] if general else ["-", "-"])
    offer = (
        "scale 0.75 keeps 96% of the gain in loss at 40% of the forgetting"
        if general
        else "scale 1 is best"
    )
    assert lines[-1] == offer
