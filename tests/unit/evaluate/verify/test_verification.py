"""`verify` against a server of stock transformers: the run is recognized, and eight servers that
serve something else are not, each by the check that names what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_runs import TURNS
from transformers_server import MODEL, Served, load_served, serving, train_color_run
from tunesmith.cli import app
from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.verify.recorded_items import RecordedItem
from tunesmith.evaluate.verify.server_client import LiveClient
from tunesmith.evaluate.verify.server_requests import LiveAnswer, _Alternative, _ChosenToken
from tunesmith.evaluate.verify.verification import (
    LiveVerification,
    _check_answers,
    _check_applied,
    _check_metrics,
    _check_probability,
    _check_prompts,
    _Pair,
    verify_run,
)

pytestmark = pytest.mark.promise


NUM_ITEMS = 12
OTHER_END = 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    train_color_run(folder)
    return folder


@pytest.fixture(scope="module")
def right(folder: Path) -> Served:
    return load_served(folder / "run")


def verify(folder: Path, served: Served, num_items: int = NUM_ITEMS) -> LiveVerification:
    with serving(served) as live:
        return verify_run(folder / "run", LiveClient(live.url), MODEL, num_items=num_items)


def statuses(result: LiveVerification) -> dict[str, str]:
    return {check.name: check.status for check in result.checks}


def failed(result: LiveVerification) -> set[str]:
    return {check.name for check in result.checks if check.status == "failed"}


# ---------------------------------------------------------------- the run


def test_the_run_is_recognized(folder: Path, right: Served) -> None:
    result = verify(folder, right)
    assert result.is_run
    assert set(statuses(result).values()) == {"ok"}
    assert list(statuses(result)) == [
        *("prompt", "applied", "answers", "metric: test exact_match"),
        *("probability", "end", "stable"),
    ]
    assert {check.n for check in result.checks if check.name != "stable"} == {NUM_ITEMS}
    assert result.differences == ()
    loss = next(check for check in result.checks if check.name == "probability")
    assert "+0.0000 nats/token" in loss.message or "-0.0000 nats/token" in loss.message


def test_a_server_that_tells_less_leaves_checks_unmeasured(folder: Path, right: Served) -> None:
    silent = replace(right, has_usage=False, has_logprobs=False, has_ids=False, has_echo=False)
    result = verify(folder, silent)
    assert result.is_run
    unmeasured = {check.name: check for check in result.checks if check.status == "not measured"}
    assert set(unmeasured) == {"prompt", "probability"}
    assert unmeasured["prompt"].message == "the server sends no usage"
    assert unmeasured["probability"].n == 0


def test_a_server_that_refuses_unknown_fields_is_asked_without_them(
    folder: Path, right: Served
) -> None:
    strict = replace(right, is_strict=True, has_prompt_logprobs=True)
    result = verify(folder, strict)
    assert result.is_run
    assert statuses(result)["probability"] == "ok"
    prompt = next(check for check in result.checks if check.name == "prompt")
    assert prompt.message == "the same number of tokens in all; no ids to compare"


def test_too_few_items_are_no_verdict(folder: Path, right: Served) -> None:
    result = verify(folder, right, num_items=4)
    assert not result.is_run
    assert {status for name, status in statuses(result).items() if name != "prompt"} == {
        "not measured"
    }
    assert "cannot tell whether the server matches the run" in result.problem
    answers = next(check for check in result.checks if check.name == "answers")
    assert answers.message == "too few items to tell: 4 of at least 6"


# ---------------------------------------------------------------- servers that are not


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": 0.0}, {"applied", "answers", "probability"}),
        ({"scale": 0.5}, {"answers", "probability"}),
        ({"template": TURNS.replace("'\n' + m", "' \n' + m")}, {"prompt"}),
        ({"template": TURNS.replace("<|start|>assistant", "<|start|>ASSISTANT")}, {"prompt"}),
        ({"first_ids": (OTHER_END,)}, {"prompt"}),
        ({"end_ids": (OTHER_END,)}, {"answers", "end"}),
        ({"base": "other"}, {"applied", "answers", "probability"}),
        ({"bits": 3}, {"probability"}),
        ({"temperature": 0.7}, {"answers", "stable"}),
    ],
    ids=[
        *("dropped", "half", "template", "same length", "bos"),
        *("end", "base", "quantized", "sampled"),
    ],
)
def test_another_server_is_named_by_its_check(
    folder: Path, options: dict[str, Any], named: set[str]
) -> None:
    if "base" in options:
        options = {"base": folder / options["base"]}
    result = verify(folder, load_served(folder / "run", **options))
    assert not result.is_run
    assert named <= failed(result), result.checks
    for name in named:
        assert name in result.problem


@pytest.mark.parametrize("scale", [0.4, 0.5])
def test_part_of_an_adapter_never_passes_without_log_probabilities(
    folder: Path, scale: float
) -> None:
    served = load_served(folder / "run", scale=scale, has_logprobs=False, has_echo=False)
    result = verify(folder, served)
    assert statuses(result)["answers"] in ("warning", "failed")
    assert not result.is_run


def test_rows_that_changed_since_are_refused(folder: Path, right: Served) -> None:
    file = folder / "test.jsonl"
    content = file.read_text()
    file.write_text(content.replace("red 40", "red 41"))
    try:
        with pytest.raises(InputError, match="not what the run was evaluated on"):
            verify(folder, right)
    finally:
        file.write_text(content)


# ---------------------------------------------------------------- the verb


def run_verb(words: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        app.main(list(words))
    assert isinstance(ended.value.code, int | None)
    return ended.value.code or 0


def test_the_verb_ends_with_0_or_4(
    folder: Path, right: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(folder / "run"), "--items", str(NUM_ITEMS), "--json", "--url"]
    with serving(right) as live:
        assert run_verb([*words, live.url]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["is_run"] is True
    assert [check["name"] for check in output["checks"]][:3] == ["prompt", "applied", "answers"]
    with serving(load_served(folder / "run", scale=0.0)) as live:
        assert run_verb([*words, live.url]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0])["differences"]
    assert "applied" in json.loads(lines[1])["error"]["message"]


def test_the_view_escapes_what_a_server_says(
    folder: Path, right: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rude(Served):
        def chat(self, body: dict[str, Any]) -> dict[str, Any]:
            reply = super().chat(body)
            reply["choices"][0]["message"]["content"] = "\x1b]0;owned\x07[red]\u202e"
            return reply

    rude = Rude(right.network, right.tokenizer, right.end_ids)
    with serving(rude) as live:
        assert run_verb(["verify", str(folder / "run"), "--items", "12", "--url", live.url]) == 4
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert "\u202e" not in output.out + output.err
    assert "[red]" in output.out


# ---------------------------------------------------------------- where answers part


def make_token(text: str, logprob: float, *others: tuple[str, float]) -> _ChosenToken:
    alternatives = tuple(_Alternative(other, value) for other, value in ((text, logprob), *others))
    return _ChosenToken(text, logprob, tuple(text.encode()), alternatives)


def make_item(number: int = 1, **changes: Any) -> RecordedItem:
    item = RecordedItem(
        id=str(number), messages=(), tools=(), prompt_text="", prompt_ids=(1, 2), expected="",
        before="", after="", is_cut=False, documents=(), loss_before=None, loss=None,
    )  # fmt: skip
    return replace(item, **changes)


def test_clear_differences_fail_although_one_is_not_explained() -> None:
    same = "a" * 300
    item = make_item(after=f"{same}b")
    right = LiveAnswer(item.after, "stop", completion_tokens=301)
    silent = LiveAnswer(f"{same}c", "stop", completion_tokens=301)
    clear = replace(silent, tokens=(make_token(same, -0.1), make_token("c", -0.1, ("b", -5.0))))
    for answers, status in (
        ([right] * 19 + [silent], "ok"),
        ([right] * 12 + [silent] + [clear] * 7, "failed"),
    ):
        check = _check_answers([_Pair(item, answer) for answer in answers])
        assert check.status == status, check.message


def test_preference_is_read_where_two_answers_part() -> None:
    tokens = (
        make_token("a b", -0.1, ("a", -3.0)),
        make_token(" c", -0.5, (" d", -0.7), ("<end>", -2.0)),
        make_token("<end>", -0.1, (" e", -4.0)),
    )
    answer = LiveAnswer("a b c", "stop", tokens=tokens, end_texts=("<end>",))
    assert answer.measure_preference("a b d") == pytest.approx(0.2)
    assert answer.measure_preference("a b") == pytest.approx(1.5)  # it ended there
    assert answer.measure_preference("a b c e") == pytest.approx(3.9)  # it went on
    assert answer.measure_preference("a b x") == pytest.approx(1.5)  # not listed: at least
    assert LiveAnswer("a b c", "stop").measure_preference("a b d") is None


def test_an_answer_that_should_have_ended_is_a_clear_difference() -> None:
    tokens = (make_token("a", -0.1), make_token("<end>", -0.1), make_token("b", -0.1))
    for text in ("a<end>b", "ab"):  # a server may show control tokens, or not
        answer = LiveAnswer(text, "length", tokens=tokens, end_texts=("<end>",))
        assert answer.measure_preference("a") == math.inf


# ---------------------------------------------------------------- never ok of nothing


def judge_metric(before: Sequence[float], after: Sequence[float], *, are_same: bool = False) -> Any:
    ids = tuple(str(i) for i in range(len(before)))
    recorded = MetricValues("test", "exact_match", ids, tuple(before))
    comparison = compare_measurements(recorded, replace(recorded, values=tuple(after)))
    (check,) = _check_metrics([comparison], are_same=are_same)
    return check


def test_a_metric_of_few_items_is_no_ok() -> None:
    check = judge_metric([1.0] * 8, [0.0] * 4 + [1.0] * 4)  # an interval that even excludes 0
    assert check.status == "warning"
    assert check.message.endswith("n = 8: too few items to tell it from a fall of 0.1")
    assert judge_metric([1.0] * 8, [1.0] * 8).status == "warning"


def test_a_metric_is_ok_if_its_interval_excludes_a_fall() -> None:
    assert judge_metric([1.0] * 64, [0.0] + [1.0] * 63).status == "ok"
    assert judge_metric([1.0] * 64, [0.0] * 4 + [1.0] * 60).status == "warning"
    assert judge_metric([1.0] * 64, [0.0] * 32 + [1.0] * 32).status == "failed"


def test_the_same_answers_have_the_same_metric() -> None:
    check = judge_metric([1.0, 0.0] * 4, [1.0, 0.0] * 4, are_same=True)
    assert (check.status, check.message[-23:]) == ("ok", "n = 8: the same answers")


def test_answers_that_are_neither_do_not_show_the_training() -> None:
    item = make_item(before="one", after="two")
    right = _Pair(item, LiveAnswer("two", "stop"))
    neither = _Pair(item, LiveAnswer("six", "stop"))
    assert _check_applied([right] * 6, {}).status == "ok"
    assert _check_applied([right] * 6 + [neither] * 4, {}).status == "warning"
    check = _check_applied([right] * 6 + [neither] * 30, {})
    assert check.status == "failed"
    assert "most are neither" in check.message


def test_prompts_that_are_not_counted_are_said() -> None:
    counted = _Pair(make_item(), LiveAnswer("", "stop", prompt_tokens=2))
    check = _check_prompts([counted] * 5 + [_Pair(make_item(), LiveAnswer("", "stop"))])
    assert (check.status, check.n) == ("warning", 5)
    assert check.message.endswith("no usage for 1")


def test_expected_answers_without_probabilities_are_said() -> None:
    document = Document("1", np.array([1, 2]), np.array([0.0, 1.0]))
    items = [make_item(number, loss=1.0, documents=(document,)) for number in range(10)]
    losses = {str(number): 1.0 for number in range(10)}
    assert _check_probability(items, losses).status == "ok"
    del losses["3"]
    check = _check_probability(items, losses)
    assert (check.status, check.n) == ("warning", 9)
    assert check.message.endswith("; 1 more without finite log-probabilities")
