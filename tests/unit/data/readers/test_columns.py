import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.dataset import open_dataset
from tunesmith.data.formats.parse import rename_columns
from tunesmith.recipe.fields import DataSource


def test_columns_are_read_under_our_names():
    data = {"question": "q", "answer": "a", "prompt": "not meant", "id": 1}
    row = rename_columns(Row("r:1", data), {"prompt": "question", "completion": "answer"})
    assert (row.id, row.data) == ("r:1", {"prompt": "q", "completion": "a", "id": 1})
    assert rename_columns(Row("r:1", data), {"text": "body"}).data == data, (
        "a row may lack a column; its format says so"
    )
    assert rename_columns(Row("r:1", {"a": 1}), {"prompt": "a", "text": "a"}).data == {
        "prompt": 1,
        "text": 1,
    }


@pytest.mark.parametrize("format", ["auto", "completion"])
def test_a_mapped_file_is_read_like_any_other(format, write, words):
    columns = {"prompt": "question", "completion": "answer"}
    path = write("question,answer\na,b\n", "x.csv")
    dataset = open_dataset([DataSource(path=path, columns=columns, format=format)], words)
    assert [message["content"] for message in dataset.read_example(0).messages] == ["a", "b"]
    assert dataset.parts[0].format == "completion"
    lines = json.dumps({"instruction": "a", "chosen": "b", "rejected": "c"})
    dataset = open_dataset(
        [DataSource(path=write(lines), columns={"prompt": "instruction"})], words
    )
    assert [message["content"] for message in dataset.read_example(0).messages] == ["a", "b"]


@pytest.mark.parametrize(
    ("columns", "format", "says", "fix"),
    [
        (
            {"prompt": "questoin"},
            "auto",
            "prompt: the file has no column `questoin`",
            "did you mean `question`?",
        ),
        ({"prompt": "zzz"}, "auto", "no column `zzz`", "there are `question`, `answer`"),
        ({"promt": "question"}, "auto", "no row has a `promt`", "did you mean `prompt`?"),
        (
            {"text": "question"},
            "alpaca",
            "no alpaca row has a `text`",
            "there are `functions`, `history`",
        ),
    ],
)
def test_an_unknown_name_on_either_side_is_the_recipes_error(
    columns, format, says, fix, write, words
):
    path = write("question,answer\na,b\n", "x.csv")
    with pytest.raises(InputError) as caught:
        open_dataset([DataSource(path=path, columns=columns, format=format)], words)
    assert says in caught.value.message
    assert fix in caught.value.fix
    assert caught.value.where == str(path)
