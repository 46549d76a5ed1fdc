"""Rows to a CSV file for review and back."""

import csv
import io
import json
import random

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.agreement import measure_agreement
from tunesmith.data.dataset import open_dataset
from tunesmith.data.golden_set import write_lock
from tunesmith.data.reviews import import_reviews, write_reviews
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
    result = import_reviews([table], golden, reviewer="ada", day="2026-11-25")
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
    assert import_reviews([again], tmp_path / "again.jsonl").verdicts == {"good": 2}


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
    ],
)
def test_what_is_no_table_of_reviews_is_refused(content, message, tmp_path):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(InputError) as refusal:
        import_reviews([tmp_path / "r.csv"], tmp_path / "golden.jsonl")
    assert message in str(refusal.value)
    assert not (tmp_path / "golden.jsonl").exists()


def test_a_table_without_end_and_an_existing_file_are_refused(opened, tmp_path):
    file = tmp_path / "r.csv"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="more than 268,435,456 bytes"):
        import_reviews([file], tmp_path / "golden.jsonl")
    with pytest.raises(InputError, match="already exists"):
        write_reviews(opened(ROWS[:1]), file)


# ---------------------------------------------------------------- several reviewers, corrections


@pytest.fixture
def review(opened, tmp_path):
    """Rows, and for each file of a reviewer what each row gets, in the order of the rows -> the
    import, the rows that it wrote."""

    def of(rows, *files, name="golden.jsonl", **options):
        table = tmp_path / "empty.csv"
        write_reviews(opened(rows), table)
        lines = list(csv.DictReader(io.StringIO(table.read_text("utf-8-sig"), newline="")))
        lines.sort(key=lambda line: int(line["id"].rpartition(":")[2]))
        table.unlink()
        paths = []
        for number, cells in enumerate(files):
            paths.append(tmp_path / f"reviews-{number}.csv")
            with paths[-1].open("w", newline="") as file:
                writer = csv.DictWriter(file, lines[0])
                writer.writeheader()
                writer.writerows(a | b for a, b in zip(lines, cells, strict=False))
        result = import_reviews(paths, tmp_path / name, day="2026-11-25", **options)
        text = (tmp_path / name).read_text()
        return result, [json.loads(line) for line in text.splitlines()]

    return of


def verdicts(name, *each, **more):
    return [{"reviewer": name, "verdict": verdict, **more} for verdict in each]


def test_rows_on_which_reviewers_differ_are_settled_in_a_table(review, opened, tmp_path):
    ada = verdicts("ada", "good", "bad", "good", "good")
    bo = verdicts("bo", "good", "good", "bad", "", reason="no source")
    result, rows = review(ROWS, ada, bo)
    assert result.verdicts == {"good": 2, "unsettled": 2}
    assert (result.agreement.rows, result.agreement.equal_rows) == (3, 1)
    assert [each["verdict"] for each in rows[1]["review"]["reviews"]] == ["bad", "good"]
    assert rows[1]["review"]["reviews"][1]["reason"] == "no source"
    assert [each["reviewer"] for each in (rows[0]["review"], rows[3]["review"])] == [
        "ada, bo",
        "ada",
    ]
    assert opened(rows).rejected_rows.counts == {"unsettled verdict": 2}

    table = tmp_path / "golden.disagreements.csv"
    lines = list(csv.DictReader(io.StringIO(table.read_text("utf-8-sig"), newline="")))
    assert [line["verdicts"] for line in lines] == [
        "ada: bad; bo: good (no source)",
        "ada: good; bo: bad (no source)",
    ]
    lines[0] |= {"verdict": "good", "reviewer": "cy"}
    lines[1] |= {"correction": "so 20", "reviewer": "cy"}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    paths = [tmp_path / "reviews-0.csv", tmp_path / "reviews-1.csv", table]
    settled = import_reviews(paths, tmp_path / "settled.jsonl", day="2026-11-26")
    assert (settled.verdicts, settled.disagreements) == ({"good": 4}, "")
    assert settled.agreement == result.agreement, "who settles is no further opinion"
    rows = [json.loads(line) for line in (tmp_path / "settled.jsonl").read_text().splitlines()]
    assert rows[1]["review"]["reviewer"] == rows[2]["review"]["reviewer"] == "cy"
    assert len(rows[2]["review"]["reviews"]) == 3
    assert rows[2]["messages"][-1]["content"] == "so 20"
    assert rows[2]["review"]["corrected_from"] == "so 2"


def test_the_later_verdict_of_a_reviewer_counts(review):
    later = verdicts("ada", "bad", "good", date="2026-11-24")
    earlier = verdicts("ada", "good", "good", date="2026-11-23")
    result, rows = review(ROWS, later, earlier)
    assert (result.verdicts, result.replaced_verdicts) == ({"bad": 1, "good": 1}, 2)
    assert (rows[0]["review"]["date"], result.agreement) == ("2026-11-24", None)


def test_the_last_one_that_decides_counts(review):
    two = [
        verdicts("ada", "good", date="2026-11-20"),
        verdicts("bo", "bad", date="2026-11-20"),
        verdicts("cy", "bad", date="2026-11-21", verdicts="..."),
        verdicts("dan", "good", date="2026-11-22", verdicts="..."),
        verdicts("cy", "bad", date="2026-11-23", verdicts="...", reason="read again"),
    ]
    _, rows = review(ROWS, *two)
    entry = rows[0]["review"]
    assert (entry["reviewer"], entry["verdict"], entry["date"]) == ("cy", "bad", "2026-11-23")
    assert len(entry["reviews"]) == 4


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "net"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "net"}]},
        {"prompt": "q", "completion": "net", "kind": "net"},
        {"instruction": "q", "output": "net"},
    ],
)
def test_a_correction_replaces_the_answer_of_every_format(review, row):
    result, rows = review([row], [{"correction": "=mail", "reviewer": "ada"}])
    assert (result.corrected_rows, result.verdicts) == (1, {"good": 1})
    entry = rows[0].pop("review")
    assert (entry["verdict"], entry["corrected_from"]) == ("good", "net")
    assert json.dumps(rows[0]) == json.dumps(row).replace('"net"', '"=mail"', 1)


@pytest.mark.parametrize(
    ("answer", "correction", "schema", "message"),
    [
        ("net", "Net", None, "'Net' is 'net' in other rows"),
        ('{"a": 1}', "a is 2", None, "not JSON"),
        ("one", '{"a": "x"}', {"properties": {"a": {"type": "number"}}}, "violates the schema"),
        ("one", "two", {"type": "object"}, "not JSON"),
    ],
)
def test_a_correction_that_no_run_could_use_is_refused(review, answer, correction, schema, message):
    rows = [{"prompt": "q", "completion": answer}, {"prompt": "r", "completion": answer}]
    with pytest.raises(InputError, match=message) as refusal:
        review(rows, [{"correction": correction, "reviewer": "ada"}], schema=schema)
    assert "reviews-0.csv:2" in str(refusal.value)


def test_a_file_of_other_rows_is_refused(review, opened, tmp_path):
    review(ROWS[:2], verdicts("ada", "good", "good"), name="first.jsonl")
    other = tmp_path / "other.csv"
    write_reviews(opened(ROWS[2:]), other)
    with pytest.raises(InputError, match="no row of the other files"):
        import_reviews([tmp_path / "reviews-0.csv", other], tmp_path / "both.jsonl")


# Krippendorff (2011), "Computing Krippendorff's alpha-reliability": 4 observers, 12 units. AC1 of
# the same data: Gwet's irrCAC.
PUBLISHED = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def test_agreement_is_that_of_published_examples():
    units = [
        [verdict for verdict in unit if verdict != "."] for unit in zip(*PUBLISHED, strict=True)
    ]
    agreement = measure_agreement(units)
    assert (agreement.rows, agreement.equal_rows) == (11, 8)
    assert agreement.alpha.value == pytest.approx(0.743, abs=5e-4)
    assert agreement.ac1.value == pytest.approx(0.77544, abs=5e-6)
    assert agreement.share.value == pytest.approx(0.81818, abs=5e-6)
    assert agreement.alpha.low < 0.743 < agreement.alpha.high


def test_agreement_without_rows_or_variety_says_so():
    assert measure_agreement([["good"], ["bad"], []]) is None
    same = measure_agreement([["good", "good"]] * 20)
    assert (same.share.value, same.alpha, same.ac1) == (1, None, None)
    few = measure_agreement([["good", "good"], ["good", "bad"], ["bad", "bad"]])
    assert (few.rows, few.equal_rows, few.share, few.alpha) == (3, 2, None, None)


def test_intervals_cover_the_agreement_of_many_rows():
    rng = random.Random(0)
    hits = 0
    for _ in range(40):
        units = [["good", "good" if rng.random() < 0.8 else "bad"] for _ in range(100)]
        share = measure_agreement(units).share
        hits += share.low <= 0.8 <= share.high
    assert hits >= 34
