import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import open_dataset
from tunesmith.data.split import is_in_split, split_by_hash
from tunesmith.recipe.fields import DataSource


def texts(dataset):
    return [dataset.read_example(i).text for i in range(len(dataset))]


def open_rows(write, words, rows):
    path = write("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return open_dataset([DataSource(path=path)], words)


def test_hash_split_takes_about_the_fraction_and_depends_on_the_seed():
    sides = [[is_in_split(f"row {i}", 0.1, seed) for i in range(5000)] for seed in (0, 1)]
    for side in sides:
        assert 430 < sum(side) < 570
    assert sides[0] != sides[1]
    assert sides[0] == [is_in_split(f"row {i}", 0.1, 0) for i in range(5000)]


def test_a_larger_fraction_only_adds_rows():
    small = {i for i in range(500) if is_in_split(i, 0.1)}
    assert small < {i for i in range(500) if is_in_split(i, 0.3)}


def test_split_divides_all_rows_and_keeps_equal_ones_together(write, words):
    rows = [f"row  {i % 60}" if i < 100 else f"row {i % 60}" for i in range(180)]
    rest, part = split_by_hash(open_rows(write, words, rows), 0.3, seed=2)
    assert sorted(texts(rest) + texts(part)) == sorted(rows)
    even = [{" ".join(text.split()) for text in texts(side)} for side in (rest, part)]
    assert not even[0] & even[1]
    assert len(part) % 3 == 0
    assert part.get_id(0).startswith("train.jsonl:")


def test_a_split_that_leaves_a_side_empty_is_refused(write, words):
    for rows, fraction in ((["a", "a"], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0), (["a"], 0.5)):
        with pytest.raises(InputError, match="empty"):
            split_by_hash(open_rows(write, words, rows), fraction)
