"""Tables with the hub's usual column names: what is asked, what is trained, what stops a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import write_rows
from tunesmith.core.errors import InputError
from tunesmith.core.types import DataReport
from tunesmith.data.checks.run import check_data
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.rejects import refuse_unusable_rows
from tunesmith.recipe.fields import DataSource

REVIEWS = [(f"The {noun} was {word}", word) for noun in "abcdefghijkl" for word in ("good", "bad")]


def open_table(path: Path, words: Any, **source: Any) -> Dataset:
    return open_dataset([DataSource(path=path, **source)], words)


def read_turns(dataset: Dataset, row: int = 0) -> list[str]:
    return [message["content"] for message in dataset.read_example(row).messages]


def write_table(path: Path, header: str, rows: list[tuple[str, ...]]) -> Path:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "header", "row", "question"),
    [
        ("a.csv", "text,label", ("fine", "yes"), "label of this text?|fine"),
        ("a.csv", "label,review", ("yes", "fine"), "label of this review?|fine"),
        ("a.csv", "Text,LABEL", ("fine", "yes"), "label of this text?|fine"),
        ("a.tsv", "comment,sentiment", ("fine", "yes"), "sentiment of this comment?|fine"),
        ("a.csv", "idx,sentence,label", ("7", "fine", "yes"), "label of this sentence?|fine"),
        ("a.csv", "text,label,label_text", ("fine", "1", "yes"), "label of this text?|fine"),
        (
            "a.csv",
            "premise,hypothesis,label",
            ("rain", "wet", "yes"),
            "label of this premise and hypothesis?|premise: rain\n\nhypothesis: wet",
        ),
        (
            "a.csv",
            "question,answer,label",
            ("1+1", "2", "yes"),
            "label of this question and answer?|question: 1+1\n\nanswer: 2",
        ),
    ],
)
def test_the_prompt_asks_for_the_label_of_the_other_columns(
    tmp_path: Path, words: Any, name: str, header: str, row: tuple[str, ...], question: str
) -> None:
    dataset = open_table(write_table(tmp_path / name, header, [row]), words)
    asked, inputs = question.split("|")
    word = "sentiment" if "sentiment" in header else "label"
    prompt = f"What is the {asked} Answer with the {word} alone.\n\n{inputs}"
    assert read_turns(dataset) == [prompt, "yes"]
    assert "the prompt is 'What is the" in dataset.parts[0].format_reason
    assert not [each for each in check(dataset).findings if each.check == "unused"]


def check(dataset: Dataset) -> DataReport:
    return check_data({"data": dataset})["data"]


def refuse(dataset: Dataset) -> None:
    refuse_unusable_rows({"data": dataset}, {"data": check(dataset)}, skip_invalid=True)


def test_questions_and_answers_without_a_label_are_prompts_and_completions(
    tmp_path: Path, words: Any
) -> None:
    path = write_table(tmp_path / "a.csv", "question,answer", [("What is it?", "A table")])
    assert read_turns(open_table(path, words)) == ["What is it?", "A table"]


def test_number_labels_are_trained_as_text_and_a_row_without_one_is_rejected(
    tmp_path: Path, words: Any
) -> None:
    rows = [{"tweet": "fine", "label": 1}, {"tweet": "odd", "label": None}, {"tweet": "no label"}]
    dataset = open_table(write_rows(tmp_path / "a.jsonl", rows), words)
    assert read_turns(dataset)[1] == "1"
    assert "numbers without names" in dataset.parts[0].format_reason
    assert dataset.rejected_rows.counts == {"empty answer": 2}


def test_a_model_without_a_template_gets_a_line_between_text_and_label(
    tmp_path: Path, words: Any
) -> None:
    words.has_template = False
    path = write_table(tmp_path / "a.csv", "text,label", [("fine", "yes")])
    example = open_table(path, words).read_example(0)
    assert (example.prompt or "").endswith("fine\n\n")
    assert example.text == "yes"


def test_labels_that_are_texts_are_refused(tmp_path: Path, words: Any) -> None:
    path = write_table(tmp_path / "a.csv", "text,label", [("fine", "so " * 40)])
    with pytest.raises(InputError, match="short label, but has 120 characters"):
        open_table(path, words)
    mapped = open_table(path, words, columns={"prompt": "text", "completion": "label"})
    assert read_turns(mapped)[0] == "fine"


@pytest.mark.parametrize("header", ["text,label,source", "Text,Label,Source", "Question,Answer,x"])
def test_the_columns_that_the_refusal_names_are_read_as_before(
    tmp_path: Path, words: Any, header: str
) -> None:
    path = write_table(tmp_path / "a.csv", header, [(*review, "x") for review in REVIEWS])
    refused = open_table(path, words)
    with pytest.raises(InputError, match="not used") as caught:
        refuse(refused)
    fix = yaml.safe_load(str(caught.value.fix).split("`")[1])
    described = open_table(path, words, **fix)
    refuse(described)
    assert read_turns(described) == read_turns(refused)


@pytest.mark.parametrize(
    "header", ["text,source,label", "text,klasse", "prompt,context,completion"]
)
def test_an_unused_column_stops_until_columns_are_named(
    tmp_path: Path, words: Any, header: str
) -> None:
    rows = [(*review, "x")[: header.count(",") + 1] for review in REVIEWS]
    path = write_table(tmp_path / "a.csv", header, rows)
    with pytest.raises(InputError, match=r"not used: `(source|klasse|context)`") as caught:
        refuse(open_table(path, words))
    assert "columns: {" in (caught.value.fix or "")
    names = [name for name in header.split(",") if name not in ("source", "klasse", "context")]
    refuse_source = open_table(path, words, columns={name: name for name in names})
    if "source" not in header:
        refuse(refuse_source)


def test_columns_of_other_names_make_a_table_too(tmp_path: Path, words: Any) -> None:
    rows = [(*review, "web") for review in REVIEWS]
    path = write_table(tmp_path / "a.csv", "body,klasse,source", rows)
    dataset = open_table(path, words, columns={"text": "body", "label": "klasse"})
    assert read_turns(dataset)[0].endswith("label alone.\n\nThe a was good")
    refuse(dataset)


def test_one_label_in_all_rows_stops(tmp_path: Path, words: Any) -> None:
    rows = [(text, "good") for text, _ in REVIEWS]
    path = write_table(tmp_path / "a.csv", "text,label", rows)
    with pytest.raises(InputError, match="all 24 rows have the label 'good'"):
        refuse(open_table(path, words))


def test_continued_pretraining_and_other_kinds_read_no_tables(tmp_path: Path, words: Any) -> None:
    path = write_table(tmp_path / "a.csv", "text,label", REVIEWS)
    dataset = open_dataset([DataSource(path=path)], words, row_kind="text")
    assert dataset.parts[0].format == "text"
    refuse(dataset)


def test_class_numbers_of_parquet_get_their_names(tmp_path: Path, words: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = arrow.table({"text": ["one", "two", "three"], "label": [1, 0, -1]})
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    dataset = open_table(tmp_path / "a.parquet", words)
    assert [read_turns(dataset, row)[1] for row in range(2)] == ["good", "bad"]
    assert dataset.rejected_rows.counts == {"empty answer": 1}
