"""Rows of columns asked in several forms: by their content, with examples that train and are never
the row itself."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import write_rows
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.checks.run import check_data
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.formats.few_shot import add_shots
from tunesmith.data.split import split_by_hash
from tunesmith.recipe.fields import DataSource

FORMS: list[Any] = [
    "Capital of {country}?",
    {"prompt": "{country}: its capital, please", "shots": 2},
]


def capitals(first: int, count: int) -> list[Json]:
    return [
        {"country": f"Land{n}", "completion": f"City{n}", "source": "atlas"}
        for n in range(first, first + count)
    ]


def rows_of(path: Path, rows: list[Json], words: Any, **source: Any) -> Dataset:
    values = {"path": write_rows(path, rows), "name": "capitals", "prompts": FORMS} | source
    return open_dataset([DataSource.model_validate(values)], words)  # type: ignore[arg-type]


def read_contents(dataset: Dataset, row: int) -> list[str]:
    return [message["content"] for message in dataset.read_example(row).messages]


def test_each_row_has_one_form_by_its_content(tmp_path: Path, words: Any) -> None:
    dataset = rows_of(tmp_path / "a.jsonl", capitals(0, 100), words)
    questions = [read_contents(dataset, row)[-2] for row in range(100)]
    assert Counter(question.startswith("Capital") for question in questions)[True] in range(35, 66)
    assert {question.replace(f"Land{n}", "X") for n, question in enumerate(questions)} == {
        "Capital of X?",
        "X: its capital, please",
    }
    turned = rows_of(tmp_path / "b.jsonl", capitals(0, 100)[::-1], words)
    assert [read_contents(turned, row)[-2] for row in range(100)] == questions[::-1]
    assert dataset.parts[0].format_reason == "2 prompt forms, with up to 2 few-shot examples"
    assert dataset.read_row(0).data.keys() == {"prompt", "completion", "source"}


def test_examples_train_and_are_never_the_row_itself_nor_held_out(
    tmp_path: Path, words: Any
) -> None:
    rows = [*capitals(0, 40), *capitals(0, 3)]  # some stand there twice
    data, test = split_by_hash(rows_of(tmp_path / "a.jsonl", rows, words), 0.4)
    roles = add_shots({"data": data, "test_data": test})
    trained = {data.read_example(row).messages[-1]["content"] for row in range(len(data))}
    seen = 0
    for dataset in roles.values():
        for row in range(len(dataset)):
            *shown, _, answer = read_contents(dataset, row)
            assert len(shown) in (0, 4)
            assert set(shown[1::2]) <= trained - {answer}
            assert len(set(shown[1::2])) == len(shown) // 2
            assert all(question.endswith(": its capital, please") for question in shown[::2])
            (document,) = dataset.render_documents(row)
            assert document.weights_L.sum() == 2, "only the answer and its end are trained"
            seen += bool(shown)
    assert 10 < seen < 33
    again = add_shots({"data": data, "test_data": test})
    assert [read_contents(again["test_data"], row) for row in range(len(test))] == [
        read_contents(roles["test_data"], row) for row in range(len(test))
    ]


def test_examples_are_no_copies_to_the_data_check(tmp_path: Path, words: Any) -> None:
    rows = [
        {
            "country": f"the land {n} of " + " ".join(f"w{n}.{i}" for i in range(20)),
            "completion": f"C{n}",
        }
        for n in range(30)
    ]
    forms = {"prompt": "{country}?", "shots": 2}
    data, test = split_by_hash(rows_of(tmp_path / "a.jsonl", rows, words, prompts=forms), 0.4)
    report = check_data(add_shots({"data": data, "test_data": test}), should_read_all=True)[
        "test_data"
    ]
    assert not {finding.check for finding in report.findings} & {"ngram_overlap", "leaks"}


def test_without_turns_examples_stand_above_the_question(tmp_path: Path, words: Any) -> None:
    words.has_template = False
    data = rows_of(
        tmp_path / "a.jsonl", capitals(0, 4), words, prompts={"prompt": "{country} -> ", "shots": 1}
    )
    example = add_shots({"data": data})["data"].read_example(0)
    shown, _, question = (example.prompt or "").partition("\n\n")
    assert (question, example.text) == ("Land0 -> ", "City0")
    assert shown in {f"Land{n} -> City{n}" for n in (1, 2, 3)}


def test_equal_rows_are_equal_in_whatever_form(tmp_path: Path, words: Any) -> None:
    first, other = (
        rows_of(tmp_path / name, capitals(0, 5), words, prompts=prompts)
        for name, prompts in (("a.jsonl", FORMS), ("b.jsonl", "Where is the seat of {country}?"))
    )
    assert first.contents_N.tolist() == other.contents_N.tolist()
    assert len(set(first.prompts_N.tolist())) == 5


def test_what_stands_in_a_column_is_put_in_as_it_is(tmp_path: Path, words: Any) -> None:
    row = {"code": "{x!r} {completion}", "n": 3, "list": [1, "ü"], "completion": 7, "text": ""}
    forms = "{{ {code} {n} {list} }}{text}"
    dataset = rows_of(tmp_path / "a.jsonl", [row | {"completion": "7"}], words, prompts=forms)
    assert read_contents(dataset, 0) == ['{ {x!r} {completion} 3 [1, "ü"] }', "7"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"prompts": "{contry}?"},
            "the file has no column `contry`\n  fix: did you mean `country`",
        ),
        (
            {"format": "messages"},
            "prompts need `completion` rows, but the format is messages",
        ),
        ({"columns": {"completion": "source"}, "prompts": "{country}"}, ""),
        ({"prompts": "{source}", "columns": {"prompt": "completion"}}, "no row has one"),
    ],
    ids=["typo", "format", "mapped", "no-answer"],
)
def test_prompts_that_do_not_fit_the_file(
    source: Json, message: str, tmp_path: Path, words: Any
) -> None:
    if not message:
        assert read_contents(rows_of(tmp_path / "a.jsonl", capitals(0, 3), words, **source), 0) == [
            "Land0",
            "atlas",
        ]
        return
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path / "a.jsonl", capitals(0, 3), words, **source)
    assert message in str(caught.value)


def test_a_row_without_a_column_is_a_bad_row(tmp_path: Path, words: Any) -> None:
    rows = [*capitals(0, 2), {"country": None, "completion": "x"}]
    dataset = rows_of(tmp_path / "a.jsonl", rows, words)
    assert (len(dataset), dataset.rejected_rows.counts["missing key"]) == (2, 1)


@pytest.mark.parametrize(
    ("training", "name", "message"),
    [
        (
            2,
            "capitals",
            "the prompts use 2 shots, but 'capitals' has only 2 different training rows",
        ),
        (9, "other", "the prompts use 2 shots, but task 'capitals' has no training rows"),
    ],
    ids=["few", "none"],
)
def test_too_few_rows_to_show(
    training: int, name: str, message: str, tmp_path: Path, words: Any
) -> None:
    data = rows_of(
        tmp_path / "a.jsonl", capitals(0, training) * 2, words, name=name, prompts="{country}"
    )
    test = rows_of(tmp_path / "b.jsonl", capitals(50, 3), words)
    with pytest.raises(InputError) as caught:
        add_shots({"data": data, "test_data": test})
    assert message in str(caught.value)
    assert str(caught.value).startswith("test_data: ")


def test_a_row_asks_alike_whatever_its_white_space(tmp_path: Path, words: Any) -> None:
    rows = [
        {"country": "New  Land\n", "completion": "City"},
        {"country": "New Land", "completion": "City"},
    ]
    contents = rows_of(tmp_path / "a.jsonl", rows, words).contents_N
    assert contents[0] == contents[1], json.dumps(rows)
