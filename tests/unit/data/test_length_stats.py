import json
from datetime import datetime

import numpy as np
import pytest

from toy_chat import assistant, make_tool_call, user, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data import length_stats as scan_module
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.dataset import open_dataset
from tunesmith.data.length_stats import (
    compute_percentiles,
    count_lengths,
    render_first_documents,
    scan_dataset,
)
from tunesmith.data.rejects import iter_rejected_rows
from tunesmith.data.sampler import StepSampler, permute_rows
from tunesmith.recipe.fields import DataSource


def open_texts(write, words, texts, **options):
    path = write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_dataset([DataSource(path=path)], words, **options)


def test_all_rows_are_counted(write, words):
    seen = scan_dataset(open_texts(write, words, ["a", "a b", "a b c"]))
    assert seen.lengths_D.tolist() == [3, 4, 5]
    assert seen.supervised_tokens == 9
    assert (seen.scanned_share, seen.estimate_total(3), dict(seen.dropped)) == (1.0, 3, {})


def test_losses_are_counted_by_reason(write, words):
    dataset = open_texts(write, words, ["a", "a b c", "a b c d"], max_length=4)
    seen = scan_dataset(dataset)
    assert dict(seen.dropped) == {"longer than max_length": ["train.jsonl:2", "train.jsonl:3"]}
    assert seen.flagged["answer too long"] == ["train.jsonl:3"]
    cut = scan_dataset(dataset.with_max_length(4, "truncate"))
    assert (cut.num_truncated, cut.lengths_D.tolist(), cut.flagged["overlong"]) == (
        2,
        [3, 4, 4],
        ["train.jsonl:2", "train.jsonl:3"],
    )


def test_of_many_rows_a_fixed_sample_is_scanned(write, words, monkeypatch):
    monkeypatch.setattr(scan_module, "MAX_FULL_SCAN_ROWS", 100)
    monkeypatch.setattr(scan_module, "SAMPLE_ROWS", 40)
    dataset = open_texts(write, words, ["a " * (i % 7 + 1) for i in range(200)])
    seen = scan_dataset(dataset)
    assert len(seen.rows_R) == 40
    assert (
        seen.rows_R.tolist()
        == scan_dataset(dataset).rows_R.tolist()
        == sorted(set(seen.rows_R.tolist()))
    )
    assert seen.estimate_total(len(seen.lengths_D)) == 200
    assert len(scan_dataset(dataset.with_max_length(100, "refuse")).rows_R) == 200


def test_of_many_rows_one_of_each_shape_is_rendered_too(write, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "MAX_FULL_SCAN_ROWS", 100)
    monkeypatch.setattr(scan_module, "SAMPLE_ROWS", 20)
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path / "model"), now=datetime(2026, 3, 4)
    )
    rows = [[user("q"), assistant("a")] for _ in range(200)]
    rows[137] = [
        user("q"),
        assistant("", tool_calls=[make_tool_call(x=1)]),
    ]  # this template writes no calls
    path = write("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = open_dataset([DataSource(path=path)], renderer)
    seen = scan_dataset(dataset)
    assert 137 not in seen.rows_R
    assert (dict(seen.rejected_rows.counts), dict(seen.rare_rejected_rows.counts)) == (
        {},
        {"cannot be rendered": 1},
    )
    report = check_data({"data": dataset})["data"]
    assert report.rejected == {"cannot be rendered": 1}
    assert [line["id"] for line in iter_rejected_rows(dataset, has_render_errors=True)] == [
        "train.jsonl:138"
    ]


def test_rows_that_the_policy_refuses_are_reported_together(write, words):
    with pytest.raises(
        InputError, match=r"2 of 3 rows cannot be used:\n  train\.jsonl:1: the row has 4 tokens"
    ):
        scan_dataset(
            open_texts(write, words, ["a b", "a", "a b c"], max_length=3, on_overlong="refuse")
        )


def test_percentiles_are_lengths_of_real_documents():
    assert compute_percentiles(np.array([5, 1, 3])) == {"p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert compute_percentiles(np.array([], np.int64)) == {}


def test_lengths_are_counted_in_bins_of_equal_width():
    lengths = np.array([1, 2, 3, 24, 24, 13])
    counts = count_lengths(lengths)
    assert counts == {str(2 * n): {1: 2, 2: 1, 7: 1, 12: 2}.get(n, 0) for n in range(1, 13)}
    assert count_lengths(np.array([5, 5])) == {"1": 0, "2": 0, "3": 0, "4": 0, "5": 2}
    assert count_lengths(np.array([], np.int64)) == {}


def test_long_rows_are_encoded_a_few_at_a_time(write, words, monkeypatch):
    monkeypatch.setattr(scan_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(scan_module, "BATCH_BYTES", 1000)
    dataset = open_texts(write, words, ["a"] * 4 + ["b " * 600, "c", "d " * 600, "e " * 600])
    batches = list(scan_module.iter_batches(dataset, range(8)))
    assert [len(batch) for batch in batches] == [3, 2, 2, 1]
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert scan_dataset(dataset).lengths_D.tolist() == [3, 3, 3, 3, 603, 3, 603, 603]


def test_the_first_documents_are_those_of_the_first_steps(write, words):
    dataset = open_texts(write, words, ["a " * (i % 9 + 1) for i in range(400)])
    first_documents = render_first_documents(dataset, permute_rows(3, 0, 400))
    schedule = StepSampler(num_rows=400, batch_size=8, epochs=1, seed=3)
    rows = [row for step in range(1, 33) for row in schedule.get_rows(step)]
    assert [document.id for documents in first_documents for document in documents] == [
        dataset.get_id(row) for row in rows
    ]
