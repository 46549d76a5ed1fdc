"""Rows to Label Studio and Argilla and back, in the files that those tools write."""

import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.annotation import import_reviews, write_tasks
from tunesmith.data.dataset import open_dataset
from tunesmith.data.golden_set import write_lock
from tunesmith.recipe.fields import DataSource

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"ask {i} é"},
            {"role": "assistant", "content": f"so {i}"},
        ],
        "source": i,
    }
    for i in range(4)
]


@pytest.fixture
def opened(write, words):
    def of(rows, name="rows.jsonl"):
        return open_dataset(
            [DataSource(path=write("".join(json.dumps(row) + "\n" for row in rows), name))], words
        )

    return of


def answered(tool, tasks, verdicts):
    """The export, as the tool writes it once people have answered: whose, and what they said, task
    by task."""
    for task, answers in zip(tasks, verdicts, strict=True):
        if tool == "argilla":
            task["responses"] = (
                {"verdict": [{"value": verdict, "user_id": name} for name, verdict in answers]}
                if answers
                else {}
            )
            task["_server_id"] = "0f5e"
            continue
        task |= {"id": 7, "project": 1, "predictions": []}
        task["annotations"] = [
            {
                "id": number,
                "completed_by": {"id": number, "email": name},
                "was_cancelled": False,
                "created_at": f"2026-11-2{number}T10:00:00.000000Z",
                "result": [
                    {
                        "from_name": "verdict",
                        "to_name": "answer",
                        "type": "choices",
                        "value": {"choices": [verdict]},
                    }
                ],
            }
            for number, (name, verdict) in enumerate(answers)
        ]
    return tasks


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_rows_come_back_reviewed_as_they_were_and_can_be_locked(tool, opened, tmp_path):
    data = opened(ROWS)
    assert write_tasks(data, tool, tmp_path / "tasks.json") == 4
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    shown = [task["data"] if tool == "label-studio" else task["fields"] for task in tasks]
    assert {(task["question"], task["answer"]) for task in shown} == {
        (f"ask {i} é", f"so {i}") for i in range(4)
    }
    answers = [[("ada", "good")], [("bo", "bad"), ("ada", "bad")], [], [("ada", "unsure")]]
    (tmp_path / "export.json").write_text(json.dumps(answered(tool, tasks, answers)))
    reviewed = import_reviews(tmp_path / "export.json", tmp_path / "golden.jsonl", "2026-11-25")
    assert (reviewed.tool, reviewed.rows, reviewed.unanswered_rows) == (tool, 3, 1)
    assert reviewed.verdicts == {"good": 1, "bad": 1, "unsure": 1}
    back = [json.loads(line) for line in (tmp_path / "golden.jsonl").read_text().splitlines()]
    assert all({key: row[key] for key in ("messages", "source")} in ROWS for row in back)
    assert back[0]["review"] == {
        "reviewer": "ada",
        "date": "2026-11-20" if tool == "label-studio" else "2026-11-25",
        "verdict": "good",
    }
    golden = open_dataset([DataSource(path=tmp_path / "golden.jsonl")], data.renderer)
    assert write_lock(golden).verdicts == {"good": 1, "bad": 1, "unsure": 1}
    assert set(golden.contents_N) <= set(data.contents_N), (
        "a review does not change what a row says"
    )
    for name in ("label-studio", "argilla"):  # what is reviewed goes out and in again
        write_tasks(golden, name, tmp_path / f"again-{name}.json")
        import_reviews(tmp_path / f"again-{name}.json", tmp_path / f"again-{name}.jsonl")
        again = [
            json.loads(line) for line in (tmp_path / f"again-{name}.jsonl").read_text().splitlines()
        ]
        assert sorted(again, key=str) == sorted(back, key=str)


def test_of_one_reviewer_the_newest_word_counts_and_cancelled_ones_do_not(opened, tmp_path):
    write_tasks(opened(ROWS[:2]), "label-studio", tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    export = answered(
        "label-studio", tasks, [[("ada", "bad"), ("ada", "good")], [("bo", "bad"), ("ada", "good")]]
    )
    export[1]["annotations"][0]["was_cancelled"] = True
    (tmp_path / "export.json").write_text(json.dumps(export))
    assert import_reviews(tmp_path / "export.json", tmp_path / "golden.jsonl").verdicts == {
        "good": 2
    }


@pytest.mark.parametrize(
    ("export", "what"),
    [
        ("{}", "not a JSON array"),
        ("[", "not valid JSON"),
        ("[]", "neither tasks"),
        ('[{"text": 1}]', "neither tasks"),
        ('[{"data": {"question": "a"}}]', "not the original row"),
        ('[{"data": {"row": "{}"}, "annotations": []}]', "no row has a verdict"),
        (
            '[{"fields": {}, "metadata": {"row": "{}"}, '
            '"responses": {"verdict": [{"value": "bad", "user_id": 1}]}}]',
            "has no date",
        ),
        ('[{"data": 3, "annotations": 4}]', r"not an export of label-studio: \$.data"),
        (
            '[{"fields": {}, "responses": {"verdict": [{"value": "good"}]}}]',
            "'user_id' is a required property",
        ),
        (
            '[{"data": {"row": "{}"}, "annotations": [null]}]',
            r"annotations\[0\]: None is not of type",
        ),
        (
            '[{"data": {"row": "{}"}, '
            '"annotations": [{"completed_by": 1, "created_at": "yesterday", "result": '
            '[{"from_name": "verdict", "value": {"choices": ["good"]}}]}]}]',
            "date of the review is 'yesterday'",
        ),
    ],
    ids=[
        "object",
        "torn",
        "empty",
        "other",
        "no row",
        "unanswered",
        "no date",
        "number",
        "nobody",
        "null",
        "yesterday",
    ],
)
def test_what_is_no_export_is_refused(export, what, tmp_path):
    (tmp_path / "export.json").write_text(export)
    with pytest.raises(InputError, match=what):
        import_reviews(tmp_path / "export.json", tmp_path / "golden.jsonl")
    assert not (tmp_path / "golden.jsonl").exists()


def test_an_export_without_end_is_refused(tmp_path):
    file = tmp_path / "export.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="more than 268,435,456 bytes"):
        import_reviews(file, tmp_path / "golden.jsonl")
    file.write_text("[" + "[]," * 1_000_000 + "[]]")
    with pytest.raises(InputError, match="more than 2,000,000 commas"):
        import_reviews(file, tmp_path / "golden.jsonl")


def test_reviewers_who_disagree_and_unknown_verdicts_are_told(opened, tmp_path):
    write_tasks(opened(ROWS[:1]), "label-studio", tmp_path / "tasks.json")
    for answers, what in (
        ([("ada", "good"), ("bo", "bad")], "ada: good, bo: bad"),
        ([("ada", "fine")], "'fine'"),
    ):
        tasks = json.loads((tmp_path / "tasks.json").read_text())
        (tmp_path / "export.json").write_text(
            json.dumps(answered("label-studio", tasks, [answers]))
        )
        with pytest.raises(InputError, match=what):
            import_reviews(tmp_path / "export.json", tmp_path / "golden.jsonl")
    with pytest.raises(InputError, match="unknown tool 'excel'"):
        write_tasks(opened(ROWS[:1]), "excel", tmp_path / "other.json")
    with pytest.raises(InputError, match="already exists"):
        write_tasks(opened(ROWS[:1]), "argilla", tmp_path / "tasks.json")
