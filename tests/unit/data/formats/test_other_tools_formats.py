"""Rows as other tools write them: ShareGPT, Alpaca, preferences of TRL and OpenAI, fine-tuning
files of OpenAI."""

import json

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.formats.parse import (
    detect_format,
    find_unused_keys,
    parse_labelled,
    parse_pair,
    parse_row,
    read_side,
)
from tunesmith.data.readers.invalid_row import InvalidRow

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WORSE = {"role": "assistant", "content": "5"}
FUNCTION = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}


def row(**data):
    return Row("train.jsonl:7", data)


def read(**data):
    """Detected and parsed, as turns (role, content) with the weights."""
    name, _ = detect_format([row(**data)], True)
    example = parse_row(row(**data), name, True)
    return (
        name,
        [(m["role"], m["content"]) for m in example.messages],
        list(example.turn_weights),
        example,
    )


def say(speaker, text, **more):
    return {"from": speaker, "value": text, **more}


# ---------------------------------------------------------------- ShareGPT


def test_sharegpt_speakers_become_roles():
    turns = [
        say("system", "s"),
        say("human", "q"),
        say("gpt", "a"),
        say("user", "r"),
        say("assistant", "b"),
    ]
    name, turns, weights, _ = read(conversations=turns)
    assert name == "sharegpt"
    assert turns == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    ]
    assert weights == [0, 0, 1, 0, 1]


def test_sharegpt_calls_observations_and_tools_as_llamafactory_writes_them():
    arguments = '{"z": 1.0, "a": {"k": [true, null]}}'
    turns = [
        say("human", "q"),
        say("function_call", f'{{"name": "add", "arguments": {arguments}}}'),
        say("observation", '{"sum": 4}'),
        say(
            "function_call",
            '[{"name": "add", "arguments": {}}, {"name": "add", "arguments": {"a": 1}}]',
        ),
        say("observation", "5"),
        say("gpt", "done"),
    ]
    _, turns, weights, example = read(
        conversations=turns, tools=json.dumps([FUNCTION]), system="be exact"
    )
    assert [role for role, _ in turns] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert weights == [0, 0, 1, 0, 1, 0, 1]
    (call,) = example.messages[2]["tool_calls"]
    assert call["type"] == "function"
    assert json.dumps(call["function"]["arguments"]) == arguments
    assert len(example.messages[4]["tool_calls"]) == 2
    assert example.tools == ({"type": "function", "function": FUNCTION},)


def test_sharegpt_may_have_openai_turns_weights_and_a_system_column():
    name, turns, weights, _ = read(
        conversations=[USER, ANSWER, USER, {**ANSWER, "weight": 0}, USER, ANSWER], system=""
    )
    assert (name, weights, len(turns)) == ("sharegpt", [0, 1, 0, 0, 0, 1], 6)
    assert read(conversations=[say("human", "q"), say("gpt", "a", train=False), say("gpt", "b")])[
        2
    ] == [0, 0, 1]
    both = [say("system", "same"), say("human", "q"), say("gpt", "a")]
    assert read(conversations=both, system="same")[1] == [
        ("system", "same"),
        ("user", "q"),
        ("assistant", "a"),
    ]


# ---------------------------------------------------------------- Alpaca


def test_alpaca_joins_instruction_and_input_and_trains_the_history_too():
    name, turns, weights, _ = read(
        instruction="Add.",
        input="2 2",
        output="4",
        system="s",
        history=[["hi", "hello"], ["1 1", "2"]],
        text="unused",
    )
    assert name == "alpaca"
    assert turns[0] == ("system", "s")
    assert turns[1:5] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "1 1"),
        ("assistant", "2"),
    ]
    assert turns[5:] == [("user", "Add.\n2 2"), ("assistant", "4")]
    assert weights == [0, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "rest", [{}, {"input": ""}, {"input": None, "system": None, "history": None}]
)
def test_alpaca_without_an_input_asks_the_instruction(rest):
    assert read(instruction="Add 2 2.", output="4", **rest)[1] == [
        ("user", "Add 2 2."),
        ("assistant", "4"),
    ]


# ---------------------------------------------------------------- preferences


PREFERENCES = {
    "strings": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "lists": {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    "single messages": {"prompt": [USER], "chosen": ANSWER, "rejected": WORSE},
    "sharegpt": {
        "prompt": [say("human", "2+2?")],
        "chosen": say("gpt", "4"),
        "rejected": say("gpt", "5"),
    },
    "sharegpt, LLaMA-Factory's": {
        "conversations": [say("human", "2+2?")],
        "chosen": say("gpt", "4"),
        "rejected": say("gpt", "5"),
    },
    "whole": {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    "whole, prompt repeated": {
        "prompt": "2+2?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, WORSE],
    },
}


def test_rows_that_could_be_read_as_pairs_are_where_pairs_are_wanted():
    both = row(messages=[USER], chosen=ANSWER, rejected=WORSE)
    assert detect_format([both], True)[0] == "messages"
    name, reason = detect_format([both], True, has_pairs=True)
    assert (name, "not used" in reason) == ("preference", False), (
        "its messages are what is answered"
    )
    assert [m["content"] for m in parse_row(both, name, True).messages] == ["2+2?", "4"]
    conversation_pair = row(
        prompt="2+2?", messages=[USER, ANSWER], chosen=[USER, ANSWER], rejected=[USER, WORSE]
    )
    assert (
        "`messages` is there too, but not used"
        in detect_format([conversation_pair], True, has_pairs=True)[1]
    )


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preference_rows_train_the_chosen_side_and_give_both(kind):
    name, turns, weights, _ = read(**PREFERENCES[kind])
    assert (name, turns, weights) == ("preference", [("user", "2+2?"), ("assistant", "4")], [0, 1])
    other = read_side(row(**PREFERENCES[kind]), True, side="rejected")
    assert [m["content"] for m in other.messages] == ["2+2?", "5"]
    assert other.turn_weights == (0, 1)


def test_of_whole_conversations_what_both_sides_share_is_the_prompt():
    before = [{"role": "system", "content": "s"}, USER, ANSWER, USER]
    data = {"chosen": [*before, ANSWER, USER, ANSWER], "rejected": [*before, WORSE, USER, ANSWER]}
    assert read(**data)[2] == [0, 0, 0, 0, 1, 0, 1]
    assert read(chosen=[*before, ANSWER], rejected=[*before, ANSWER])[2] == [0, 0, 0, 0, 1], (
        "the same on both sides"
    )


def test_strings_without_a_template_stay_text():
    example = parse_row(row(**PREFERENCES["strings"]), "preference", False)
    assert (example.prompt, example.text) == ("2+2?", "4")


def test_the_reason_says_that_only_one_side_is_trained():
    assert (
        "stage sft trains on the chosen answers"
        in detect_format([row(**PREFERENCES["strings"])], True)[1]
    )


def test_openai_preference_rows_are_refused_with_our_names():
    data = {"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": []}
    with pytest.raises(InputError) as caught:
        read(**data)
    assert "write input.messages as `prompt`" in caught.value.fix


def test_openai_fine_tuning_files_are_read_unchanged():
    line = """{"messages": [{"role": "system", "content": "Marv is a factual, sarcastic chatbot."},
      {"role": "user", "content": "What's the weather?"},
      {"role": "assistant", "tool_calls": [{"id": "call_id", "type": "function",
        "function": {"name": "get_weather", "arguments": "{\\"location\\":  \\"SF\\"}"}}]},
      {"role": "tool", "tool_call_id": "call_id", "content": "21"},
      {"role": "assistant", "content": "21 degrees", "weight": 1}],
      "parallel_tool_calls": false,
      "tools": [{"type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object"}}}]}"""
    data = json.loads(line)
    name, _, weights, example = read(**data)
    assert (name, weights) == ("messages", [0, 0, 1, 0, 1])
    assert example.messages[2]["tool_calls"] == data["messages"][2]["tool_calls"]
    assert list(example.tools) == data["tools"]
    assert find_unused_keys(row(**data), name) == ["parallel_tool_calls"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("format", "data", "reason", "says"),
    [
        (
            "sharegpt",
            {"conversations": [say("robot", "q")]},
            "unknown role",
            "unknown role 'robot'",
        ),
        (
            "sharegpt",
            {"conversations": [say("human", None), say("gpt", "a")]},
            "null content",
            "conversations[0]",
        ),
        (
            "sharegpt",
            {"conversations": [say("human", "q")]},
            "no answer at the end",
            "the last turn is `user`",
        ),
        (
            "sharegpt",
            {"conversations": [say("human", "q"), say("function_call", "add(2)")]},
            "not JSON",
            "[1]",
        ),
        (
            "sharegpt",
            {"conversations": [say("function_call", {"name": "f"})]},
            "wrong tool call",
            "not a string",
        ),
        (
            "sharegpt",
            {"conversations": [say("function_call", "3")]},
            "wrong tool call",
            "has no function name",
        ),
        (
            "sharegpt",
            {"conversations": [say("system", "a"), say("gpt", "b")], "system": "c"},
            "contradiction",
            "two",
        ),
        ("sharegpt", {"conversations": [say("gpt", "a")], "tools": "{"}, "not JSON", "tools: "),
        (
            "sharegpt",
            {"conversations": [say("gpt", "a")], "tools": '{"a": NaN}'},
            "NaN or infinity",
            "tools: NaN",
        ),
        (
            "sharegpt",
            {"conversations": [USER, ANSWER], "images": ["http://x/y.png"]},
            "not text",
            "nothing is downloaded",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": " "},
            "empty answer",
            "turns[1]: the assistant's answer is empty",
        ),
        ("alpaca", {"instruction": None, "output": "b"}, "not text", "`instruction` is null"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "input": 3},
            "not text",
            "`input` is an int",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": ["x"]},
            "not messages",
            "`history`",
        ),
        ("preference", {"chosen": "a", "rejected": "b"}, "missing key", "`chosen` has no prompt"),
        (
            "preference",
            {"prompt": "a", "chosen": "\n", "rejected": "b"},
            "empty answer",
            "the chosen is empty",
        ),
        (
            "preference",
            {"chosen": [ANSWER, USER], "rejected": []},
            "no answer at the end",
            "the last turn is `user`",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_has_a_typed_reason(format, data, reason, says):
    with pytest.raises(InvalidRow) as caught:
        parse_row(row(**data), format, True)
    assert (caught.value.where, caught.value.reason) == ("train.jsonl:7", reason)
    assert says in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("sharegpt", {"conversations": [USER, ANSWER]}),
        ("alpaca", {"instruction": "a", "output": "b"}),
    ],
)
def test_without_a_template_the_model_is_to_blame_not_the_row(format, data):
    with pytest.raises(InputError, match="need a chat template") as caught:
        parse_row(row(**data), format, False)
    assert not isinstance(caught.value, InvalidRow)


def turns(*contents):
    """Return turns of the user and the assistant, alternating."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"chosen": turns("x", "a"), "rejected": turns("y", "b")}, "in message 1"),
        ({"chosen": turns("x", "a", "y", "c"), "rejected": turns("x", "a", "z", "c")}, "message 3"),
        ({"chosen": turns("x", "a", "y", "c"), "rejected": turns("x", "a")}, "continues the other"),
        (
            {"prompt": "x", "chosen": turns("x", "a")[1:],
             "rejected": [{"role": "system", "content": "s"}, *turns("x", "b")[1:]]},
            "in message 2",
        ),
        (
            {"chosen": [{"role": "system", "content": "s"}, *turns("x", "a")],
             "rejected": turns("x", "b")},
            "in message 1",
        ),
    ],
)  # fmt: skip
def test_the_sides_of_a_pair_have_the_same_prompt(data, problem):
    with pytest.raises(InvalidRow, match=problem) as caught:
        parse_pair(Row("train.jsonl:7", data), "preference", True)
    assert caught.value.reason == "different prompts"
    assert caught.value.fix


def test_a_trajectory_may_differ_from_its_first_answer_on():
    data = {"chosen": turns("x", "a", "y", "c"), "rejected": turns("x", "b", "z", "d")}
    example = parse_pair(Row("train.jsonl:7", data), "preference", True)
    assert example.rejected is not None
    assert example.turn_weights == example.rejected.turn_weights == (0, 1, 0, 1)


@pytest.mark.parametrize("label", ["true", "False", "1", ""])
def test_a_label_as_text_is_refused_with_what_csv_cannot_hold(label):
    row = Row("train.csv:7", {"prompt": "a", "completion": "b", "label": label})
    with pytest.raises(InvalidRow, match="`label` is") as caught:
        parse_labelled(row, "completion", True)
    assert "not in CSV: use JSONL" in caught.value.fix


def test_messages_as_text_are_refused_with_what_csv_cannot_hold():
    row = Row("train.csv:7", {"messages": json.dumps(turns("x", "a"))})
    with pytest.raises(InvalidRow, match="not a list of messages") as caught:
        parse_row(row, "messages", True)
    assert "not in CSV: use JSONL" in caught.value.fix
