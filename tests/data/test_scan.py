import json
from datetime import datetime

import numpy as np
import pytest
from toy_chat import assistant, call, folder, user

from tunesmith.core.errors import InputError
from tunesmith.data import length_stats as scan_module
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check
from tunesmith.data.dataset import open_dataset
from tunesmith.data.length_stats import first_documents, percentiles, scan
from tunesmith.data.rejects import rejected_rows
from tunesmith.data.sampler import Schedule, order
from tunesmith.recipe.fields import DataSource


def open_texts(write, words, texts, **options):
    path = write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_dataset([DataSource(path=path)], words, **options)


def test_all_rows_are_counted(write, words):
    seen = scan(open_texts(write, words, ["a", "a b", "a b c"]))
    assert seen.lengths_D.tolist() == [3, 4, 5]
    assert seen.supervised_tokens == 9
    assert (seen.share, seen.scaled(3), dict(seen.dropped)) == (1.0, 3, {})


def test_losses_are_counted_by_reason(write, words):
    dataset = open_texts(write, words, ["a", "a b c", "a b c d"], max_length=4)
    seen = scan(dataset)
    assert dict(seen.dropped) == {"longer than max_length": ["train.jsonl:2", "train.jsonl:3"]}
    assert seen.marked["answer too long"] == ["train.jsonl:3"]
    cut = scan(dataset.limited(4, "truncate"))
    assert (cut.truncated, cut.lengths_D.tolist(), cut.marked["overlong"]) == (
        2,
        [3, 4, 4],
        ["train.jsonl:2", "train.jsonl:3"],
    )


def test_of_many_rows_a_fixed_sample_is_scanned(write, words, monkeypatch):
    monkeypatch.setattr(scan_module, "ALL_ROWS", 100)
    monkeypatch.setattr(scan_module, "SAMPLE", 40)
    dataset = open_texts(write, words, ["a " * (i % 7 + 1) for i in range(200)])
    seen = scan(dataset)
    assert len(seen.rows_R) == 40
    assert seen.rows_R.tolist() == scan(dataset).rows_R.tolist() == sorted(set(seen.rows_R.tolist()))
    assert seen.scaled(len(seen.lengths_D)) == 200
    assert len(scan(dataset.limited(100, "refuse")).rows_R) == 200


def test_of_many_rows_one_of_each_shape_is_rendered_too(write, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "ALL_ROWS", 100)
    monkeypatch.setattr(scan_module, "SAMPLE", 20)
    renderer = Renderer.from_folder(folder(tmp_path / "model"), now=datetime(2026, 3, 4))
    rows = [[user("q"), assistant("a")] for _ in range(200)]
    rows[137] = [user("q"), assistant("", tool_calls=[call(x=1)])]  # this template writes no calls
    path = write("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = open_dataset([DataSource(path=path)], renderer)
    seen = scan(dataset)
    assert 137 not in seen.rows_R
    assert (dict(seen.rejects.counts), dict(seen.rare.counts)) == ({}, {"cannot be rendered": 1})
    report = check({"data": dataset})["data"]
    assert report.rejected == {"cannot be rendered": 1}
    assert [line["id"] for line in rejected_rows(dataset, rendered=True)] == ["train.jsonl:138"]


def test_rows_that_the_policy_refuses_are_reported_together(write, words):
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used:\n  train\.jsonl:1: the row has 4 tokens"):
        scan(open_texts(write, words, ["a b", "a", "a b c"], max_length=3, overlong="refuse"))


def test_percentiles_are_lengths_of_real_documents():
    assert percentiles(np.array([5, 1, 3])) == {"p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert percentiles(np.array([], np.int64)) == {}


def test_long_rows_are_encoded_a_few_at_a_time(write, words, monkeypatch):
    monkeypatch.setattr(scan_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(scan_module, "BATCH_BYTES", 1000)
    dataset = open_texts(write, words, ["a"] * 4 + ["b " * 600, "c", "d " * 600, "e " * 600])
    batches = list(scan_module.batches(dataset, range(8)))
    assert [len(batch) for batch in batches] == [3, 2, 2, 1]
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert scan(dataset).lengths_D.tolist() == [3, 3, 3, 3, 603, 3, 603, 603]


def test_the_first_documents_are_those_of_the_first_steps(write, words):
    dataset = open_texts(write, words, ["a " * (i % 9 + 1) for i in range(400)])
    found = first_documents(dataset, order(3, 0, 400))
    schedule = Schedule(rows=400, batch_size=8, epochs=1, seed=3)
    rows = [row for step in range(1, 33) for row in schedule.rows_of(step)]
    assert [document.id for documents in found for document in documents] == [dataset.id(row) for row in rows]
