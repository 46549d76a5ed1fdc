import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.dataset import open_dataset
from tunesmith.data.formats.parse import (
    FORMATS,
    detect_format,
    find_unused_keys,
    parse_row,
    rename_columns,
)
from tunesmith.recipe.fields import DataSource

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def row(**data):
    return Row("train.jsonl:7", data)


@pytest.mark.parametrize(
    ("data", "has_template", "name", "says"),
    [
        ({"messages": []}, True, "messages", "`messages`"),
        ({"messages": [], "text": ""}, True, "messages", "`text` is there too, but not used"),
        ({"prompt": "a", "completion": "b"}, True, "completion", "user turn"),
        ({"prompt": "a", "completion": "b"}, False, "completion", "concatenated"),
        (
            {"prompt": [USER], "completion": [ANSWER]},
            True,
            "completion",
            "`prompt` and `completion`",
        ),
        ({"text": "a", "prompt": "b"}, True, "text", "`text`"),
    ],
)
def test_the_format_is_detected_with_its_reason(data, has_template, name, says):
    format, reason = detect_format([row(**data), row(**data)], has_template)
    assert format == name
    assert says in reason


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        (
            {"id": "", "response": "", "query": ""},
            r"columns: \{prompt: query, completion: response\}",
        ),
        (
            {"chosen_messages": 1, "rejected_messages": 2},
            r"\{chosen: chosen_messages, rejected: rejected_messages\}",
        ),
        ({"x": 1}, r"columns: \{prompt: QUESTION, completion: ANSWER\}"),
        ({}, r"columns: \{prompt: QUESTION, completion: ANSWER\}"),
    ],
)
def test_an_unknown_format_says_how_to_map_it(data, fix):
    with pytest.raises(InputError, match=fix):
        detect_format([row(**data)], True)


def test_the_format_of_most_of_the_first_rows_is_taken():
    rows = [Row("train.jsonl:9", {"text": "a"}), row(messages=[]), row(x=1), row(messages=[])]
    assert detect_format(rows, True)[0] == "messages"
    assert detect_format(rows[:2], True)[0] == "messages", (
        "both once: the one that stands first in FORMATS"
    )


def test_strings_become_two_turns_on_a_model_with_a_template():
    example = parse_row(row(prompt="2+2?", completion=" 4\n"), "completion", True)
    assert example.messages == (USER, {"role": "assistant", "content": " 4\n"})
    assert example.turn_weights == (0.0, 1.0)
    assert (example.id, example.text, example.prompt) == ("train.jsonl:7", None, None)


def test_strings_stay_text_without_a_template():
    example = parse_row(row(prompt="2+2?", completion=" 4\n"), "completion", False)
    assert (example.prompt, example.text, example.messages) == ("2+2?", " 4\n", ())


def test_of_a_conversational_completion_only_the_completion_is_trained():
    before = [USER, ANSWER, {"role": "user", "content": "and 3+3?"}]
    after = [{"role": "assistant", "content": "6"}]
    example = parse_row(
        row(prompt=before, completion=after, tools=[{"type": "function"}]), "completion", True
    )
    assert example.messages == (*before, *after)
    assert example.turn_weights == (0, 0, 0, 1)
    assert example.tools == ({"type": "function"},)


def test_text_is_trained_as_it_is():
    assert parse_row(row(text=" a\n"), "text", True).text == " a\n"


@pytest.mark.parametrize(
    ("format", "data", "says"),
    [
        ("messages", {"text": "a"}, "the key `messages` is missing"),
        ("messages", {"messages": [ANSWER, USER]}, "the last turn is `user`"),
        ("messages", {"messages": [USER, {**ANSWER, "train": False}]}, "no turn is trained"),
        ("completion", {"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ("completion", {"prompt": "a", "completion": None}, "`completion` is null"),
        ("completion", {"prompt": 3, "completion": "b"}, "`prompt` is an int"),
        ("completion", {"prompt": [USER], "completion": [USER]}, "the last turn is `user`"),
        ("text", {"text": "\n"}, "the text is empty"),
        ("text", {"text": None}, "`text` is null"),
    ],
)
def test_a_row_that_cannot_be_trained_is_named_with_a_fix(format, data, says):
    with pytest.raises(InputError) as caught:
        parse_row(row(**data), format, True)
    assert caught.value.where == "train.jsonl:7"
    assert says in caught.value.message
    assert caught.value.fix


def test_messages_without_a_template_are_refused():
    for format, data in {
        "messages": {"messages": [USER, ANSWER]},
        "completion": {"prompt": [], "completion": []},
    }.items():
        with pytest.raises(InputError, match="need a chat template"):
            parse_row(row(**data), format, False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
message_keys = [
    "role",
    "content",
    "from",
    "value",
    "train",
    "weight",
    "tool_calls",
    "function_call",
    "name",
    "type",
    "text",
    "function",
]
likely_values = json_values | st.sampled_from(
    ["user", "assistant", "tool", "text", "f", [{"name": "f"}]]
)
any_message = st.dictionaries(st.sampled_from(message_keys), likely_values, max_size=5)
KEYS = sorted({key for format in FORMATS.values() for key in format.keys})
any_row = st.fixed_dictionaries(
    {key: json_values | st.lists(any_message, max_size=3) for key in KEYS},
    optional=dict.fromkeys(("tools", "functions", "system", "history", "images"), json_values),
)


@pytest.mark.promise
@given(any_row, st.sampled_from(list(FORMATS)), st.booleans())
def test_any_row_is_an_example_or_a_clear_error(data, format, has_template):
    example, problem = None, None
    try:
        example = parse_row(row(**data), format, has_template)
    except InputError as error:
        problem = error
    if problem:
        assert problem.where == "train.jsonl:7"
        assert problem.fix
    else:
        assert example.text is not None or any(example.turn_weights)
        assert all(isinstance(message["content"], str) for message in example.messages)
        assert len(example.messages) == len(example.turn_weights)


def test_unused_keys_are_known():
    assert find_unused_keys(row(messages=[], tools=[], id=3, source="x"), "messages") == ["source"]
    assert all(set(format.keys) <= format.used_keys for format in FORMATS.values())


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
        ({"prompt": "zzz"}, "auto", "no column `zzz`", "use one of `question`, `answer`"),
        ({"promt": "question"}, "auto", "no row format has a `promt`", "did you mean `prompt`?"),
        (
            {"text": "question"},
            "alpaca",
            "no alpaca row has a `text`",
            "use one of `functions`, `history`",
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
