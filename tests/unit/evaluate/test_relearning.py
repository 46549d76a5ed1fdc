"""experiments/relearning: the same targets alone and after other texts, where only the context
differs."""

from pathlib import Path

import numpy as np
import pytest

from experiment_modules import load_experiment
from tiny_runs import make_tiny_recipe, save_model_folder, train, write_eval_files
from tunesmith.api import read_record
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.types import Comparison, Document
from tunesmith.evaluate.general_text import GeneralText, measure_bits_per_byte
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.causal_lm import PackedCausalLM

relearning = load_experiment("relearning")

TEXTS = [
    GeneralText(f"g:{n}", text, "a")
    for n, text in enumerate(["one two", "three four five", "six", "seven 8"])
]


def spelt(text: str) -> list[int]:
    return list(text.encode())


def bits(model: PackedCausalLM, shots: int, window: int = 200) -> tuple[float, ...]:
    return relearning.measure_after_shots(
        model, TEXTS, spelt, shots=shots, window=window, task="t"
    ).values


def test_without_shots_it_is_what_is_always_measured(model: PackedCausalLM) -> None:
    assert bits(model, 0) == pytest.approx(
        measure_bits_per_byte(model, TEXTS, spelt, window=200).values, rel=1e-6
    )


def test_with_shots_a_text_is_measured_after_the_next_ones(model: PackedCausalLM) -> None:
    tokens = np.array(list(b"six" + b"seven 8" + b"three four five"), np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(b"six" + b"seven 8") + 1 :] = 1
    ((_, nats, count),) = compute_nll(model, [Document("g:1", tokens, weights)], 200)
    assert count == len(TEXTS[1].text) - 1
    assert bits(model, 2)[1] == pytest.approx(nats / np.log(2) / len(TEXTS[1].text), rel=1e-6)
    assert bits(model, 2) != pytest.approx(bits(model, 0), rel=1e-3)


def test_what_does_not_fit_leaves_the_beginning_of_the_shots_out(model: PackedCausalLM) -> None:
    assert bits(model, 2, window=8)[2] != pytest.approx(bits(model, 2)[2], rel=1e-4)
    longest = max(len(text.text) for text in TEXTS)
    assert bits(model, 2, window=longest)[1] == pytest.approx(bits(model, 0)[1], rel=1e-6), (
        "no room for shots"
    )


def change(task: str, difference: float) -> Comparison:
    before = Score(task, "bits_per_byte", 1.0, 0.95, 1.05, 20, 9)
    after = Score(task, "bits_per_byte", 1 + difference, 0.95, 1.05, 20, 9)
    low, high = difference - 0.004, difference + 0.004
    return Comparison(task, "bits_per_byte", before, after, difference, low, high, False)


def test_the_recovered_share_is_of_what_was_lost() -> None:
    code = [change("general text: code", 0.05), change("...", 0.01)]
    fiction = [change("general text: fiction", 0.001), change("...", 0.002)]
    assert relearning.format_relearning([*code, *fiction]) == [
        "general text: code: +0.050 alone, +0.010 after others: 80% of the loss recovered"
    ]
    assert relearning.format_relearning([code[0], change("...", 0.06)]) == [
        "general text: code: +0.050 alone, +0.060 after others: 0% of the loss recovered"
    ]
    assert "nothing to recover" in relearning.format_relearning(fiction)[0]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("relearning") / "model")


@pytest.mark.promise
def test_each_domain_is_compared_alone_and_after_others(base_model: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    train(make_tiny_recipe(base_model, tmp_path, **files, num_train_epochs=4, learning_rate=0.1))
    comparisons = relearning.compare_relearning(tmp_path / "run")
    assert [comparison.task for comparison in comparisons] == [
        f"{GENERAL_TASK}: a",
        f"{GENERAL_TASK}: a, after 2 other texts",
        f"{GENERAL_TASK}: b",
        f"{GENERAL_TASK}: b, after 2 other texts",
    ]
    record = read_record(tmp_path / "run")
    (total,) = [item for item in record.comparisons if item.task == GENERAL_TASK]
    mean_change = (comparisons[0].difference + comparisons[2].difference) / 2
    assert mean_change == pytest.approx(total.difference, rel=1e-4)
    assert comparisons[1].difference != pytest.approx(comparisons[0].difference, rel=1e-3)
    assert "recover" in relearning.format_relearning(comparisons)[0]


def test_without_general_text_there_is_nothing_to_recover(base_model: Path, tmp_path: Path) -> None:
    train(make_tiny_recipe(base_model, tmp_path))
    with pytest.raises(InputError, match="relearning needs general text"):
        relearning.compare_relearning(tmp_path / "run")
