"""Rows to a CSV file for review and back."""

import csv
import io
import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import open_dataset
from tunesmith.data.golden_set import import_reviews, write_lock, write_reviews
from tunesmith.recipe.fields import DataSource

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f'=ask, {i} é\n"so"'},
            {"role": "assistant", "content": f"so {i}"},
        ],
        "source": i,
    }
    for i in range(4)
]
HEAD = "verdict,reviewer,date,row\n"


@pytest.fixture
def opened(write, words):
    def of(rows, name="rows.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return open_dataset([DataSource(path=write(text, name))], words)

    return of


def test_verdicts_come_back_with_the_rows_unchanged(opened, tmp_path):
    table = tmp_path / "reviews.csv"
    assert write_reviews(opened(ROWS), table) == 4
    lines = list(csv.DictReader(io.StringIO(table.read_text("utf-8-sig"), newline="")))
    assert lines[0]["question"].startswith("'=ask"), "no formula of a spreadsheet"
    for line, verdict in zip(lines, ["good", "Bad", "", "good"], strict=True):
        line |= {"verdict": verdict, "answer": "edited"}
    lines[0] |= {"reviewer": "bo", "date": "2026-11-24"}
    lines.append(lines[0])  # twice, with the same verdict
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    golden = tmp_path / "golden.jsonl"
    result = import_reviews(table, golden, reviewer="ada", day="2026-11-25")
    assert (result.rows, result.unanswered_rows) == (3, 1)
    assert result.verdicts == {"good": 2, "bad": 1}
    rows = [json.loads(line) for line in golden.read_text().splitlines()]
    reviews = [row.pop("review") for row in rows]
    assert all(row in ROWS for row in rows)
    assert reviews[0] == {"reviewer": "bo", "date": "2026-11-24", "verdict": "good"}
    assert reviews[1] == {"reviewer": "ada", "date": "2026-11-25", "verdict": "bad"}
    dataset = opened([row | {"review": review} for row, review in zip(rows, reviews, strict=True)])
    golden_lock = write_lock(dataset)
    assert (golden_lock.verdicts, golden_lock.excluded_rows) == ({"good": 2}, {"bad verdict": 1})
    again = tmp_path / "again.csv"
    write_reviews(dataset, again)
    assert import_reviews(again, tmp_path / "again.jsonl").verdicts == {"good": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column verdict"),
        (b"verdict;row\ngood;1\n", "no column verdict"),
        (b'[{"data": {"row": "{}"}}]', "no column verdict"),
        (b"\xff\xfe", "not CSV"),
        (f'{HEAD}good,ada,2026-11-25,"'.encode(), "not CSV"),
        (f"{HEAD}good,ada,2026-11-25,[]\n".encode(), "r.csv:2: `row` is not the original row"),
        (f"{HEAD},,,{{}}\n".encode(), "no row has a verdict"),
        (f"{HEAD}fine,ada,2026-11-25,{{}}\n".encode(), "r.csv:2: unknown verdict 'fine'"),
        (f"{HEAD}good,,2026-11-25,{{}}\n".encode(), "r.csv:2: the review has no reviewer"),
        (f"{HEAD}good,ada,yesterday,{{}}\n".encode(), "r.csv:2: the date of the review"),
        (
            f"{HEAD}good,ada,2026-11-25,{{}}\nbad,bo,2026-11-25,{{}}\n".encode(),
            "r.csv:3: reviewers disagree: ada: good, bo: bad",
        ),
    ],
)
def test_what_is_no_table_of_reviews_is_refused(content, message, tmp_path):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(InputError) as refusal:
        import_reviews(tmp_path / "r.csv", tmp_path / "golden.jsonl")
    assert message in str(refusal.value)
    assert not (tmp_path / "golden.jsonl").exists()


def test_a_table_without_end_and_an_existing_file_are_refused(opened, tmp_path):
    file = tmp_path / "r.csv"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="more than 268,435,456 bytes"):
        import_reviews(file, tmp_path / "golden.jsonl")
    with pytest.raises(InputError, match="already exists"):
        write_reviews(opened(ROWS[:1]), file)
