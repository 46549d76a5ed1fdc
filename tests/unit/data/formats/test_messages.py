import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.formats.messages import read_tools, read_turns

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":  1.0}'}}


def user(content="hi", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="ok", **more):
    return {"role": "assistant", "content": content, **more}


def turns(*messages, **options):
    return read_turns("train.jsonl:7", list(messages), "messages", **options)


def weights(*messages):
    return [weight for _, weight in turns(*messages)]


def test_assistant_turns_are_trained_unless_they_say_otherwise():
    system, tool = (
        {"role": "system", "content": "be kind"},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
    )
    messages = [
        system,
        user(),
        assistant(),
        tool,
        assistant(train=False),
        assistant(weight=0),
        assistant(weight=0.5),
    ]
    assert weights(*messages, assistant(train=True, weight=2)) == [0, 0, 1, 0, 0, 0, 0.5, 2]
    assert [weight for _, weight in turns(assistant(), is_trained=False)] == [0]
    assert weights(user(weight=0), user(train=False)) == [0, 0]


def test_messages_keep_everything_but_train_and_weight():
    ((message, _),) = turns(assistant("a", name="n", reasoning_content="hm", weight=1, train=True))
    assert message == {"role": "assistant", "content": "a", "name": "n", "reasoning_content": "hm"}


def test_tool_calls_stay_as_they_are_and_allow_empty_content():
    as_object = {"name": "g", "arguments": {"b": 1, "a": {"z": None}}}
    for message in (
        assistant(None, tool_calls=[CALL, as_object]),
        {"role": "assistant", "tool_calls": [CALL, as_object]},
    ):
        ((read, _),) = turns(message)
        assert read == {"role": "assistant", "content": "", "tool_calls": [CALL, as_object]}
        assert list(read["tool_calls"][1]["arguments"]) == ["b", "a"]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    assert turns(user(parts))[0][0]["content"] == "a\nb"


def part(kind, value):
    return {"type": kind, "value": value}


def test_parts_as_llama_factory_writes_them_become_the_fields_of_a_message():
    call = part("tool_call", '{"name": "f", "arguments": {"x": 1}}')
    answer = assistant([part("reasoning", "hm"), part("text", "I look."), call], loss_weight=1.0)
    ((question, _), (converted, weight)) = turns(
        user([part("text", "how?")], loss_weight=0.0), answer
    )
    assert question == user("how?")
    assert weight == 1
    assert converted == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert weights(user(), assistant(loss_weight=0.0), user(), assistant(loss_weight=0.5)) == [
        0,
        0,
        0,
        0.5,
    ]


def test_the_older_function_calls_are_read_as_tool_calls():
    function = {"name": "f", "arguments": '{"x":1}'}
    answer = {"role": "function", "name": "f", "content": "3"}
    (call, weight), (result, _) = turns(assistant(None, function_call=function), answer)
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert weight == 1
    assert result == {"role": "tool", "name": "f", "content": "3"}
    assert read_tools(Row("r", {"functions": [function]})) == (
        {"type": "function", "function": function},
    )
    assert "function_call" not in turns(assistant(function_call=None))[0][0]


def test_an_empty_answer_is_fine_when_it_is_not_trained():
    assert weights(assistant("", train=False), assistant()) == [0, 1]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (assistant([part("reasoning", 3), part("text", "a")]), "a part has no `value`"),
        (assistant([part("tool_call", "{")]), "not JSON"),
        (assistant(""), "messages[1]: the assistant's answer is empty"),
        (assistant(" \n\t"), "the assistant's answer is empty"),
        (assistant(None), "the content is null"),
        (user(None), "the content is null"),
        (user(tool_calls=[CALL]), "a user turn has tool calls"),
        ({"role": "tool", "content": {"a": 1}}, "the content is a dict"),
        ({"role": "human", "content": ""}, "unknown role 'human'"),
        ({"role": "user|>x", "content": ""}, "unknown role"),
        ({"role": ["user"], "content": ""}, "unknown role"),
        ({"content": ""}, "has no role"),
        ("hello", "is not an object"),
        (
            user([{"type": "image_url", "image_url": {}}]),
            "the row has an image: messages[1].content[0] is 'image_url'",
        ),
        (user([{"type": "input_audio"}]), "the row has a recording"),
        (user([{"type": "text", "text": "a"}, {"type": "video"}]), "the row has a video"),
        (user([{"type": "table"}]), "content[0] is 'table', not text"),
        (user([{"type": "text"}]), "content[0] has no `text`"),
        (user(["a"]), "is 'str', not text"),
        (assistant(weight=-1), "`weight` is -1"),
        (assistant(weight=10**400), "`weight` is 1000"),
        (
            assistant(function_call={"name": "f"}, tool_calls=[CALL]),
            "`tool_calls` and `function_call`",
        ),
        (assistant(function_call="f"), "tool_calls[0] has no function name"),
        (assistant(weight=True), "`weight` is True"),
        (assistant(weight="1"), "`weight` is '1'"),
        (assistant(weight=float("inf")), "`weight` is inf"),
        (assistant(train="no"), "`train` is 'no'"),
        (assistant(train=False, weight=1), "contradict"),
        (assistant(train=True, weight=0), "contradict"),
        (user(train=True), "a user turn cannot be trained"),
        (user(weight=1), "a user turn cannot be trained"),
        (assistant(tool_calls={"name": "f"}), "`tool_calls` is not a list"),
        (assistant(tool_calls=[{"function": {}}]), "tool_calls[0] has no function name"),
        (assistant(tool_calls=["f"]), "tool_calls[0] has no function name"),
        (assistant(tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments are neither"),
    ],
)
def test_a_bad_message_is_named_with_a_fix(message, says):
    with pytest.raises(InputError) as caught:
        turns(user(), message)
    assert caught.value.where == "train.jsonl:7"
    assert "messages[1]" in caught.value.message
    assert says in caught.value.message
    assert caught.value.fix


def test_a_role_of_another_format_is_translated_in_the_fix():
    with pytest.raises(InputError, match="fix: write `assistant`"):
        turns({"role": "gpt", "content": "a"})


@pytest.mark.parametrize("messages", [[], None, {"role": "user"}, "hi"])
def test_messages_must_be_a_list(messages):
    with pytest.raises(InputError, match="`messages` is"):
        read_turns("r", messages, "messages")


@pytest.mark.parametrize(
    "data",
    [
        {"tools": "{}"},
        {"tools": "[1"},
        {"tools": ["f"]},
        {"tools": [{}], "functions": [{}]},
        {"functions": 3},
    ],
)
def test_bad_tools_are_refused(data):
    with pytest.raises(InputError, match=r"tools|functions"):
        read_tools(Row("r", data))


def test_no_tools_are_fine():
    assert turns(user(tool_calls=[]), user(tool_calls=None))[0] == turns(user())[0]
    assert (
        read_tools(Row("r", {}))
        == read_tools(Row("r", {"tools": None}))
        == read_tools(Row("r", {"tools": []}))
        == ()
    )
