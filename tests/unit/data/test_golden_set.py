import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import open_dataset
from tunesmith.data.golden_set import (
    get_lock_path,
    refuse_locked_rows,
    refuse_test_leakage,
    write_lock,
)
from tunesmith.recipe.fields import DataSource

TRAINED = ("data", "rehearsal")


def chat(user, answer, **review):
    row = {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    }
    return {**row, "review": review} if review else row


def good(number):
    return chat(
        f"q{number}", f"a{number}", reviewer="ada", date=f"2026-11-{number + 10}", verdict="good"
    )


@pytest.fixture
def opened(write, words):
    def of(rows, name):
        path = write("".join(json.dumps(row) + "\n" for row in rows), name)
        return open_dataset([DataSource(path=path)], words)

    return of


def test_a_lock_says_who_reviewed_what(opened, tmp_path):
    rows = [good(1), good(5), chat("q", "a", reviewer="bob", date="2026-11-12", verdict="unsure")]
    golden = write_lock(opened(rows, "golden.jsonl"))
    assert (golden.file, golden.rows, golden.verdicts) == (
        "golden.jsonl",
        2,
        {"good": 2},
    )
    assert golden.excluded_rows == {"unsettled verdict": 1}
    assert (golden.reviewers, golden.first_date, golden.last_date) == (
        {"ada": 2},
        "2026-11-11",
        "2026-11-15",
    )
    assert (
        json.loads(get_lock_path(tmp_path / "golden.jsonl").read_text())["sha256"] == golden.sha256
    )
    with pytest.raises(InputError, match="already locked"):
        write_lock(opened(rows, "golden.jsonl"))


WRONG = {
    "none": (chat("q", "a"), "no `review`"),
    "nobody": (
        chat("q", "a", reviewer=" ", date="2026-11-12", verdict="good"),
        "has no reviewer",
    ),
    "verdict": (
        chat("q", "a", reviewer="ada", date="2026-11-12", verdict="fine"),
        "1 unknown verdict",
    ),
    "date": (
        chat("q", "a", reviewer="ada", date="12.11.2026", verdict="good"),
        "date of the review is '12.11.2026'",
    ),
    "number": (
        chat("q", "a", reviewer="ada", date=2026, verdict="good"),
        "date of the review is '2026'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_without_a_whole_review_is_not_locked(opened, tmp_path, wrong):
    row, what = WRONG[wrong]
    with pytest.raises(InputError, match=what) as raised:
        write_lock(opened([good(1), row], "golden.jsonl"))
    assert "golden.jsonl:2" in str(raised.value)
    assert not get_lock_path(tmp_path / "golden.jsonl").exists()


@pytest.mark.parametrize("verdict", ["bad", "unsure", "unsettled", "Good"])
def test_only_an_answer_found_good_is_used(opened, verdict):
    review = {"reviewer": "ada", "date": "2026-11-12", "verdict": verdict}
    data = opened([good(1), chat("q", "a", **review)], "train.jsonl")
    (problems,) = data.rejected_rows.examples.values()
    assert (len(data), problems[0].where) == (1, "train.jsonl:2")
    assert problems[0].message == f"the verdict is '{verdict}', by ada"
    undesirable = chat("q", "a", **review) | {"negative": "whole"}
    assert len(opened([good(1), undesirable], "bad.jsonl")) == 1 + (verdict == "bad")


def test_neither_a_locked_file_nor_its_rows_in_another_file_are_trained_on(opened):
    golden = opened([good(1), good(2)], "golden.jsonl")
    write_lock(golden)
    other = opened([chat("x", "y"), chat("z", "z")], "other.jsonl")
    refuse_locked_rows({"data": other, "test_data": golden}, TRAINED)
    with pytest.raises(
        InputError, match="the file is locked: its 2 rows are for evaluation"
    ) as raised:
        refuse_locked_rows({"data": golden}, TRAINED)
    assert raised.value.where.startswith("data: ")
    copied = opened([chat("x", "y"), chat(" q2 ", "a2")], "copied.jsonl")
    with pytest.raises(
        InputError, match=r"1 of 2 rows is in the locked golden\.jsonl: copied\.jsonl:2"
    ):
        refuse_locked_rows({"data": other, "rehearsal": copied}, TRAINED)


def test_a_locked_answer_is_not_trained_as_the_chosen_side_of_a_pair(opened, write, words):
    golden = opened([good(1), good(2)], "golden.jsonl")
    write_lock(golden)
    pair = {"prompt": [{"role": "user", "content": "q2"}]}
    for side, answer in (("chosen", "a2"), ("rejected", "other")):
        pair[side] = [{"role": "assistant", "content": answer}]
    path = write(json.dumps(pair) + "\n", "pairs.jsonl")
    pairs = open_dataset([DataSource(path=path)], words, row_kind="pair")
    with pytest.raises(InputError, match=r"1 of 1 rows is in the locked golden\.jsonl"):
        refuse_locked_rows({"data": pairs}, TRAINED)


def test_a_file_that_has_changed_since_is_not_measured_with(opened):
    write_lock(opened([good(1), good(2)], "golden.jsonl"))
    changed = opened([good(1), good(3)], "golden.jsonl")
    with pytest.raises(InputError, match="changed since it was locked"):
        refuse_locked_rows(
            {"data": opened([chat("x", "y")], "other.jsonl"), "test_data": changed}, TRAINED
        )


def test_a_broken_lock_is_no_permission(opened, write):
    data = opened([chat("x", "y")], "other.jsonl")
    write('{"file": "golden.jsonl"}', "golden.jsonl.lock.json")
    with pytest.raises(InputError, match="the lock cannot be read: not a Golden") as caught:
        refuse_locked_rows({"data": data}, TRAINED)
    assert "`tunesmith data lock` again" in caught.value.fix


def test_rows_of_the_test_are_not_trained_on(opened):
    data, test = (
        opened([chat("a", "b"), chat("c", "d")], "train.jsonl"),
        opened([chat("a ", "b")], "test.jsonl"),
    )
    with pytest.raises(
        InputError, match=r"1 of 1 rows is also in data: test\.jsonl:1 is train\.jsonl:1"
    ):
        refuse_test_leakage({"data": data, "test_data": test})
    refuse_test_leakage({"data": data, "eval_data": test})
    refuse_test_leakage({"data": data})
