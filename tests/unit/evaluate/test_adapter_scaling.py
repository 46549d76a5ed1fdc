"""The trained adapter at several scales, what is offered, and what a run's record says of how far
it moved."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import (
    make_tiny_recipe,
    run_until_saved,
    save_model_folder,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.types import RunRecord, ScalePoint
from tunesmith.evaluate import adapter_scaling, shared_items
from tunesmith.evaluate.adapter_scaling import ADAPTER_SCALES
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_general_text
from tunesmith.evaluate.results import compute_score
from tunesmith.evaluate.scale_choice import (
    build_commands,
    compute_forgetting_share,
    compute_gain_share,
    describe_bargain,
    describe_recommendation,
    recommend_scale,
)
from tunesmith.model.adapters import scaled_adapter
from tunesmith.session import inputs, planner
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run

pytestmark = pytest.mark.promise


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("scales") / "model")


def record_of(model: Path, folder: Path, **changed: Any) -> RunRecord:
    train(make_tiny_recipe(model, folder, **write_eval_files(folder), **changed))
    return tunesmith.read_record(folder / "run")


def values(record: RunRecord) -> dict[tuple[str, str], float]:
    return {(item.task, item.metric): item.value for item in record.kl_scores}


def test_a_record_has_the_curve_from_the_base_to_the_whole_adapter(
    writer: Path, tmp_path: Path
) -> None:
    record = record_of(writer, tmp_path, num_train_epochs=4)
    assert [point.scale for point in record.scales] == list(ADAPTER_SCALES)
    losses = [point.eval_loss.value for point in record.scales]
    assert losses[0] > losses[-1], "it learnt something"
    assert len(set(losses)) == 5
    general = [point.general_text.value for point in record.scales if point.general_text]
    (compared,) = [item for item in record.comparisons if item.task == GENERAL_TASK]
    assert general[0] == pytest.approx(compared.before.value, rel=1e-6)
    assert general[-1] == pytest.approx(compared.after.value, rel=1e-5)
    lost = [point.general_lost for point in record.scales if point.general_lost]
    assert (lost[0].value, lost[0].low, lost[0].high) == (0, 0, 0)
    for score, value in zip(lost, general, strict=True):
        assert score.value == pytest.approx(value - general[0], abs=1e-9)
    unpaired = record.scales[-1].general_text
    assert unpaired is not None
    assert lost[-1].high - lost[-1].low < unpaired.high - unpaired.low, "texts differ more"
    assert {point.eval_loss.task for point in record.scales} == {"eval"}
    assert [point.right.n for point in record.scales if point.right] == [
        point.eval_loss.n for point in record.scales
    ]
    moved = values(record)
    assert moved["test", "kl"] > 0
    assert 0 < moved["test", "top1_agreement"] < 1


def test_the_ends_of_the_curve_are_those_of_a_measure(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands there of general text was measured before and after, of more texts than the curve
    has."""
    monkeypatch.setattr(adapter_scaling, "MAX_TOKENS", 60)
    files = write_eval_files(tmp_path)
    texts = [{"text": f"another text, {n}", "domain": "ab"[n % 2]} for n in range(8)]
    texts.append({"text": "x", "domain": "a"})  # one token: there is nothing to predict
    files["retention_data"] = str(write_rows(tmp_path / "more.jsonl", texts))
    train(make_tiny_recipe(writer, tmp_path, **files, num_train_epochs=4))
    curve = tunesmith.read_record(tmp_path / "run").scales
    bench = load_trained_session(tmp_path / "run")
    items = adapter_scaling.select_curve_items(bench, build_eval_items(bench.plan, bench.inputs))
    assert (
        1 < len(items.general_texts) < len(build_eval_items(bench.plan, bench.inputs).general_texts)
    )
    for point in (curve[0], curve[-1]):
        with scaled_adapter(bench.model.network, point.scale):
            measured = compute_score(measure_general_text(bench, items.general_texts), step=0)
        assert point.general_text
        assert (point.general_text.value, point.general_text.n) == (
            pytest.approx(measured.value, rel=1e-5),
            measured.n,
        )


def test_without_eval_data_there_is_no_curve(writer: Path, tmp_path: Path) -> None:
    files = {
        key: file for key, file in write_eval_files(tmp_path).items() if key == "retention_data"
    }
    train(make_tiny_recipe(writer, tmp_path, **files))
    record = tunesmith.read_record(tmp_path / "run")
    assert record.scales == ()
    assert {item.task for item in record.kl_scores} == {GENERAL_TASK}


def test_of_all_weights_there_is_no_curve_but_a_distance(writer: Path, tmp_path: Path) -> None:
    record = record_of(writer, tmp_path, method="full", lora_r="auto", learning_rate=0.001)
    assert record.scales == ()
    assert values(record)[GENERAL_TASK, "kl"] > 0
    assert not (tmp_path / "run" / "base_states").exists(), "it is needed until the end only"


def test_an_adapter_that_goes_on_has_moved_from_what_it_was(writer: Path, tmp_path: Path) -> None:
    """A second run that hardly learns is near its start, not near the base without an adapter."""
    first = record_of(writer, tmp_path / "first", num_train_epochs=4)
    again = {
        "adapter_from": str(tmp_path / "first" / "run"),
        "learning_rate": 1e-6,
        "lora_r": "auto",
    }
    second = record_of(writer, tmp_path / "second", **again)
    assert values(second)["test", "kl"] < values(first)["test", "kl"] / 100
    ends = [record.scales[0].general_text for record in (first, second)]
    assert ends[0]
    assert ends[1]
    assert ends[1].value == pytest.approx(ends[0].value, rel=1e-5), "at 0 both are the base"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_measures_what_a_straight_one_measures(
    method: str, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a checkpoint: what was kept of the base is read again, and no answer before is
    generated twice."""
    changed: dict[str, Any] = {
        "method": method,
        "lora_r": "auto",
        "save_steps": 2,
        "metrics": ["exact_match"],
    }
    prompts: list[list[tuple[int, ...]]] = []
    generate = shared_items.generate_shared
    monkeypatch.setattr(
        shared_items,
        "generate_shared",
        lambda model, requests, **rest: (
            prompts.append([item.tokens for item in requests]) or generate(model, requests, **rest)
        ),
    )
    straight = record_of(writer, tmp_path / "straight", **changed)
    tested = prompts[0]  # other questions, of eval_data, are asked on the way
    assert prompts.count(tested) == 2, "before and after"
    wish = make_tiny_recipe(
        writer, tmp_path / "killed", **write_eval_files(tmp_path / "killed"), **changed
    )
    run_inputs = inputs.load_inputs(wish)
    run_until_saved(iter(run.train(planner.make_plan(run_inputs), run_inputs)), 2)
    prompts.clear()
    list(run.resume(tmp_path / "killed" / "run"))
    assert prompts.count(tested) == 1, "after only"
    resumed = tunesmith.read_record(tmp_path / "killed" / "run")
    assert (resumed.kl_scores, resumed.scales) == (straight.kl_scores, straight.scales)


# ---------------------------------------------------------------- what is offered


def points(
    losses: list[float], bits: list[float] | None = None, half: float = 0.3
) -> tuple[ScalePoint, ...]:
    """`half`: of the intervals of the losses."""

    def score(task: str, value: float) -> Score:
        return Score(task, "loss", value, value - half, value + half, 9, 1)

    general = [None] * 5 if bits is None else [score(GENERAL_TASK, value) for value in bits]
    return tuple(
        ScalePoint(scale, score("eval", loss), run_inputs)
        for scale, loss, run_inputs in zip(ADAPTER_SCALES, losses, general, strict=True)
    )


def test_the_scale_that_keeps_most_of_the_gain_and_forgets_least_is_offered() -> None:
    curve = points([2.0, 1.5, 1.2, 1.04, 1.0], [0.80, 0.81, 0.82, 0.84, 0.90])
    best = recommend_scale(curve)
    assert best is not None
    assert best.scale == 0.75
    assert compute_gain_share(curve, best) == pytest.approx(0.96)
    assert compute_forgetting_share(curve, best) == pytest.approx(0.4)
    assert (
        describe_recommendation(curve)
        == describe_bargain(curve)
        == "scale 0.75 keeps 96% of the gain in loss at 40% of the forgetting"
    )
    look, have = build_commands(curve, "my runs/a")
    assert look == "tunesmith compare 'my runs/a@0.75' 'my runs/a'"
    assert have == "tunesmith export 'my runs/a' --to peft --scale 0.75"


def test_without_forgetting_the_best_gain_is_offered() -> None:
    sinking = points([2.0, 1.5, 1.2, 1.04, 1.0], [0.8, 0.8, 0.79, 0.79, 0.79])
    unknown = points([2.0, 1.5, 1.0, 1.04, 1.1])
    assert (
        describe_recommendation(sinking)
        == "scale 1, the adapter as trained, is best: nothing was forgotten"
    )
    assert describe_recommendation(unknown) == "scale 0.5 keeps 111% of the gain in loss"
    assert build_commands(sinking, "run") == ()
    assert build_commands(unknown, "run")[1] == "tunesmith export run --to peft --scale 0.5"
    assert describe_bargain(sinking) == describe_bargain(unknown) == ""
    for curve, scale in ((sinking, 1.0), (unknown, 0.5)):
        best = recommend_scale(curve)
        assert best is not None
        assert (best.scale, compute_forgetting_share(curve, best)) == (scale, None)


def test_a_scale_that_forgets_nothing_is_said_so() -> None:
    curve = points([2.0, 1.05, 1.02, 1.01, 1.0], [0.80, 0.79, 0.82, 0.84, 0.90])
    assert (
        describe_recommendation(curve)
        == describe_bargain(curve)
        == "scale 0.25 keeps 95% of the gain in loss and forgets nothing"
    )


def test_a_loss_beyond_the_interval_of_the_best_is_not_offered() -> None:
    """98% of the gain, and twice the loss: answers that are right as a whole are fewer then."""
    losses, bits = [1.0832, 0.14, 0.0438, 0.0247, 0.0205], [1.1803, 1.1782, 1.1861, 1.2012, 1.225]
    assert (
        describe_recommendation(points(losses, bits, 0.008))
        == "scale 0.75 keeps 100% of the gain in loss at 47% of the forgetting"
    )
    assert (
        describe_recommendation(points(losses, bits, 0.1))
        == "scale 0.5 keeps 98% of the gain in loss at 13% of the forgetting"
    )


def test_a_scale_that_loses_right_answers_is_not_offered() -> None:
    """The likelihoods, and the answers, of a run on 8 labels: at 0.25 43 of 100 test rows were
    right, at 1 70."""
    losses, bits = [2.4, 0.6, 0.45, 0.42, 0.44], [1.1744, 1.1778, 1.21, 1.23, 1.259]
    curve = points(losses, bits, 0.2)
    assert describe_bargain(curve).startswith("scale 0.25 keeps 92% of the gain in loss at 4%")
    shares = (0.0, 14 / 34, 24 / 34, 26 / 34, 27 / 34)
    answered = [
        dataclasses.replace(point, right=Score("eval", "greedy_match", share, 0, 1, 34, 9))
        for point, share in zip(curve, shares, strict=True)
    ]
    assert (
        describe_recommendation(answered)
        == "scale 0.75 keeps 101% of the gain in loss at 66% of the forgetting, with 26 of 34 "
        "answers right (27 at scale 1)"
    )
    assert describe_bargain(answered) == ""


def test_only_much_less_forgetting_is_a_bargain() -> None:
    curve = points([2.0, 1.5, 1.2, 1.04, 1.0], [0.80, 0.81, 0.82, 0.86, 0.90])
    assert (
        describe_recommendation(curve)
        == "scale 0.75 keeps 96% of the gain in loss at 60% of the forgetting"
    )
    assert build_commands(curve, "run")
    assert describe_bargain(curve) == ""


def test_where_nothing_was_gained_nothing_is_offered() -> None:
    worse = points([1.0, 1.1, 1.2, 1.3, 1.4], [0.8, 0.81, 0.82, 0.83, 0.84])
    assert recommend_scale(worse) is None
    assert compute_gain_share(worse, worse[1]) is None
    assert recommend_scale(()) is None
    assert build_commands((), "run") == build_commands(worse, "run") == ()
    assert describe_bargain(()) == describe_bargain(worse) == ""
    assert describe_recommendation(worse) == "no scale of the adapter lowers the held-out loss"


def test_a_scale_that_gains_more_than_the_whole_adapter_counts_as_more() -> None:
    curve = points([2.0, 1.4, 0.9, 0.95, 1.0], [0.80, 0.81, 0.82, 0.86, 0.90])
    best = recommend_scale(curve)
    assert best is not None
    assert best.scale == 0.5
    assert compute_gain_share(curve, best) == pytest.approx(1.1)
    assert recommend_scale(
        tuple(dataclasses.replace(point, general_text=None) for point in curve)
    ) == dataclasses.replace(best, general_text=None)
