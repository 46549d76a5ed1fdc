"""Constraints on answers: which rows break them, which tokens are bad, what is left out and what is
refused."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_chat_row, write_rows
from toy_chat import assistant, make_example, mark_trained_text, user, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import CharSpan, Example, Json
from tunesmith.data import constraints
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.constraints import ConstraintSet, Violation
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.rejects import write_rejected_rows
from tunesmith.data.split import split_by_hash
from tunesmith.recipe.fields import Constraint, DataSource


def ban(match: str, mode: Any = "ban") -> ConstraintSet:
    return ConstraintSet((Constraint(match=match, name="rule", mode=mode),))


def answer(text: str, **more: Any) -> Example:
    return Example(**{**vars(make_example(user("hello"), assistant(text))), **more})


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.from_folder(write_model_folder(tmp_path / "model"), now=datetime(2026, 3, 4))


def opened(renderer: Renderer, path: Path, rows: list[Json], rules: ConstraintSet) -> Dataset:
    return open_dataset(
        [DataSource(path=write_rows(path / "rows.jsonl", rows))], renderer, constraint_set=rules
    )


FINE = [make_chat_row(f"question {n}", f"answer {n}") for n in range(5)]


# ---------------------------------------------------------------- which tokens


@pytest.mark.parametrize(
    ("match", "bad"),
    [
        ("assistant", "assistant"),
        ("sist", "assistant"),
        ("the user", "the user"),
        ("12", " 12"),
        ("user.* 12", ""),
    ],
)
def test_the_tokens_of_a_ban_are_those_that_hold_its_matches(
    renderer: Renderer, match: str, bad: str
) -> None:
    sentence = "the assistant answers the user 12 345"
    (document,) = renderer.render(ban(match).mark_violations(answer(f"  {sentence}\n"))).documents
    trained = [
        token for token, weight in zip(document.tokens_L, document.weights_L, strict=True) if weight
    ]
    text = renderer.decode(trained)
    assert document.side == "banned"
    assert text.strip() in sentence
    start, end = next((m.start(), m.end()) for m in constraints.regex.finditer(match, sentence))
    assert sentence[start:end] in text
    assert not bad or text.strip() == bad.strip() or match == "sist"
    assert len(text) < len(sentence)
    assert renderer.end_ids[0] not in trained, "how an answer ends is not what is bad"


@pytest.mark.parametrize(
    ("match", "text", "banned"),
    [
        ("sorry", "I am Sorry", ()),
        ("sorry", "I am sorry", (CharSpan(1, 5, 10),)),
        ("(?i)sorry", "I am SORRY", (CharSpan(1, 5, 10),)),
        ("Sorry", "I am sorry", ()),
    ],
)
def test_a_pattern_has_the_case_that_it_is_written_in(
    match: str, text: str, banned: tuple[CharSpan, ...]
) -> None:
    assert ban(match).mark_violations(answer(text)).banned_spans == banned


def test_every_trained_turn_is_looked_at_and_no_other(renderer: Renderer) -> None:
    turns = [user("hello"), assistant("hello user"), user("hello"), assistant("hello there")]
    judged = ban("hello").mark_violations(make_example(*turns))
    assert [span.message for span in judged.banned_spans] == [1, 3]
    (document,) = renderer.render(judged).documents
    assert mark_trained_text(renderer, document).count("⟦hello⟧") == 2


def test_a_whole_answer_is_bad_where_the_row_says_so(renderer: Renderer) -> None:
    (document,) = renderer.render(
        ConstraintSet().mark_violations(answer("hello there", negative="whole"))
    ).documents
    assert "⟦hello there⟧" in mark_trained_text(renderer, document)


# ---------------------------------------------------------------- which rows


def test_what_becomes_of_a_row() -> None:
    bad, good = answer("I am sorry"), answer("hello")
    assert ban("sorry").mark_violations(good) is good
    assert ban("sorry").mark_violations(bad).violations == ("rule",)
    for rules in (ban("sorry", "filter"), ConstraintSet(ban("sorry").constraints, can_ban=False)):
        with pytest.raises(Violation, match="the answer breaks 'rule': 'sorry'"):
            rules.mark_violations(bad)
    rightly = answer("I am sorry", negative=False)
    assert ban("sorry", "filter").mark_violations(rightly) is rightly, (
        "the row says that it is right here"
    )
    with pytest.raises(InvalidRow, match="no constraint matches it"):
        ban("sorry").mark_violations(answer("hello", negative=True))
    with pytest.raises(InvalidRow, match="no constraint matches it"):
        ConstraintSet().mark_violations(answer("hello", negative=True))


def test_held_out_rows_stay_as_they_are() -> None:
    rules = ConstraintSet(ban("sorry", "filter").constraints, is_held_out=True)
    rightly, negative = answer("I am sorry"), answer("I am sorry", negative=True)
    assert rules.mark_violations(rightly) is rightly
    assert [span.start for span in rules.mark_violations(negative).banned_spans] == [5]


def test_a_negative_pair_is_refused() -> None:
    with pytest.raises(InvalidRow, match="a preference pair cannot be negative"):
        ban("x").mark_violations(answer("hello", negative=True, rejected=answer("there")))


def test_a_pattern_that_backtracks_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_MATCH_SECONDS", 0.05)
    with pytest.raises(
        InputError, match=r"never: rule: the pattern takes over 0.05 seconds on rows:1"
    ):
        ban("(a|aa)+$").mark_violations(answer("a" * 100 + "!", id="rows:1"))


# ---------------------------------------------------------------- files


def test_rows_that_break_a_filter_are_left_out_counted_and_written(
    renderer: Renderer, tmp_path: Path
) -> None:
    rows = [
        *FINE[:2],
        make_chat_row("no?", "I am sorry, no"),
        *FINE[2:],
        {**make_chat_row("right?", "so sorry"), "negative": False},
    ]
    dataset = opened(renderer, tmp_path, rows, ban("sorry", "filter"))
    assert [dataset.get_id(i) for i in range(len(dataset))] == [
        f"rows.jsonl:{n}" for n in (1, 2, 4, 5, 6, 7)
    ]
    assert dataset.constraint_counts.filtered == {"rule": 1}
    assert not dataset.rejected_rows.counts, "no error"
    reports = check_data({"data": dataset})
    assert reports["data"].filtered == {"rule": 1}
    assert not reports["data"].rejected
    findings = [f for f in reports["data"].findings if f.check == "never"]
    assert [(f.level, f.count, f.rows) for f in findings] == [("warn", 1, ("rows.jsonl:3",))]
    write_rejected_rows(tmp_path / "rejected.jsonl", {"data": dataset}, reports)
    (line,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (line["where"], line["reason"]) == ("rows.jsonl:3", "never")
    assert line["what"] == "the answer breaks 'rule': 'sorry'"


def test_a_constraint_that_most_answers_break_is_refused_with_examples(
    renderer: Renderer, tmp_path: Path
) -> None:
    rows = [make_chat_row("a?", "answer one"), *FINE]
    for mode in ("filter", "ban"):
        with pytest.raises(
            InputError, match=r"never: rule: 6 of 6 answers in .* break it:\n  rows.jsonl:1"
        ):
            opened(renderer, tmp_path, rows, ban("answer", mode))
    meant = [{**make_chat_row(f"{n}?", "answer sorry"), "negative": True} for n in range(9)]
    assert opened(renderer, tmp_path, [*meant, *FINE], ban("sorry")).constraint_counts.banned == {
        "rule": 9
    }


def test_a_ban_with_nothing_to_ban_is_a_warning(renderer: Renderer, tmp_path: Path) -> None:
    (findings,) = [
        f
        for f in check_data({"data": opened(renderer, tmp_path, FINE, ban("sorry"))})[
            "data"
        ].findings
        if f.check == "never"
    ]
    assert (findings.level, findings.message.partition(";")[0]) == (
        "warn",
        "no row breaks 'rule': its ban trains nothing",
    )
    for rules in (
        ban("sorry", "filter"),
        ConstraintSet(ban("sorry").constraints, is_held_out=True),
    ):
        assert not [
            f
            for f in check_data({"data": opened(renderer, tmp_path, FINE, rules)})["data"].findings
            if f.check == "never"
        ]


def test_a_split_tells_of_left_out_rows_once(renderer: Renderer, tmp_path: Path) -> None:
    rows = [
        *FINE,
        *(make_chat_row(f"{n}?", f"fine {n}") for n in range(9)),
        make_chat_row("no?", "I am sorry"),
    ]
    rest, taken = split_by_hash(opened(renderer, tmp_path, rows, ban("sorry", "filter")), 0.5)
    assert (
        len(rest) + len(taken),
        rest.constraint_counts.filtered,
        taken.constraint_counts.filtered,
    ) == (14, {"rule": 1}, {})


def test_a_mark_is_true_false_or_whole(renderer: Renderer, tmp_path: Path) -> None:
    dataset = opened(renderer, tmp_path, [*FINE, {**FINE[0], "negative": "yes"}], ConstraintSet())
    assert dataset.rejected_rows.counts == {"wrong mark": 1}
