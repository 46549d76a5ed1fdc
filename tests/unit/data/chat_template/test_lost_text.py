"""Templates that lose text of a row, or write some of it after the token at which a model stops."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from toy_chat import CHATML, assistant, make_example, user, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.render_notes import NO_CALLS, NO_THINKING, PART_LOST
from tunesmith.data.chat_template.renderer import RenderedRow, Renderer

NOW = datetime(2026, 11, 25)
END = "'<|im_end|>\\n'"
FIRST_CALL = "m.tool_calls[0].function"
THINKING: Json = {"reasoning_content": "Two and two."}
QUESTION = user("What is it?\nIn one word.")
ANSWER = assistant("One line.\nAnd another.")


def make_call(name: str, **arguments: Any) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function}


TWO_CALLS = assistant("", tool_calls=[make_call("look", x=1), make_call("find", y=2)])


def write_calls(calls: str) -> str:
    """Return a template that writes `calls` after the content of an answer."""
    return CHATML.replace("m.content +", f"m.content + ({calls} if m.tool_calls else '') +")


def render(folder: Path, template: str, *messages: Json) -> RenderedRow:
    renderer = Renderer.from_folder(write_model_folder(folder, template), now=NOW)
    return renderer.render(make_example(*messages))


@pytest.mark.parametrize(
    ("calls", "lost"),
    [
        (f"{FIRST_CALL} | tojson", "only one of several tool calls"),
        ("m.tool_calls[-1].function | tojson", "only one of several tool calls"),
        (f"{FIRST_CALL}.name + m.tool_calls[-1].function.name", "arguments of tool calls"),
    ],
)
def test_calls_that_a_template_loses_are_refused(calls: str, lost: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=lost) as caught:
        render(tmp_path, write_calls(calls), user("a"), TWO_CALLS)
    assert "chat_template" in caught.value.fix


def test_the_context_of_an_answer_has_all_calls_too(tmp_path: Path) -> None:
    template = write_calls(f"{FIRST_CALL} | tojson")
    context = {**TWO_CALLS, "train": False}
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    example = make_example(
        user("a"), context, {"role": "tool", "content": "r"}, assistant("b"), weights=(0, 0, 0, 1)
    )
    with pytest.raises(InputError, match="several tool calls"):
        renderer.render(example)


def test_a_call_in_the_context_that_is_not_written_is_noted(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path), now=NOW)
    example = make_example(
        user("a"), TWO_CALLS, {"role": "tool", "content": "r"}, assistant("b"), weights=(0, 0, 0, 1)
    )
    assert NO_CALLS in renderer.render(example).notes


def test_one_call_of_such_a_template_is_trained(tmp_path: Path) -> None:
    call = assistant("", tool_calls=[make_call("look", x=1)])
    row = render(tmp_path, write_calls(f"{FIRST_CALL} | tojson"), user("a"), call)
    assert len(row.documents) == 1


def test_a_name_is_all_of_a_call_without_arguments(tmp_path: Path) -> None:
    call = assistant("", tool_calls=[make_call("look")])
    row = render(tmp_path, write_calls(f"{FIRST_CALL}.name"), user("a"), call)
    assert len(row.documents) == 1


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        pytest.param(
            write_calls(f"{END} + '<|im_start|>assistant\\n' + {FIRST_CALL} | tojson"),
            assistant("I look.", tool_calls=[make_call("look", x=1)]), id="a turn for the call",
        ),
        pytest.param(
            CHATML.replace("m.content +", "(m.reasoning_content + '<|im_end|>\\n' if"
                           " m.reasoning_content else '') + m.content +"),
            assistant("4", **THINKING), id="an end after the thinking",
        ),
        pytest.param(
            CHATML.replace(END, f"{END} + ('why: ' + m.reasoning_content if m.reasoning_content"
                           " else '')"),
            assistant("4", **THINKING), id="a reason behind the end",
        ),
        pytest.param(
            CHATML.replace(END, f"{END} + ('<|im_start|>memory\\n' + m.content + {END}"
                           " if m.role == 'assistant' else '')"),
            assistant("4"), id="the answer twice",
        ),
    ],
)  # fmt: skip
def test_text_behind_the_token_at_which_a_model_stops_is_refused(
    template: str, answer: Json, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"'<\|im_end\|>' inside an answer"):
        render(tmp_path, template, user("2+2?"), answer)


@pytest.mark.parametrize(
    "written",
    ["m.content[:5]", "m.content.split('\\n')[0]", "m.content | replace('line', '')"],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_part_of_a_message_that_is_lost_is_noted(role: str, written: str, tmp_path: Path) -> None:
    messages = [{**QUESTION, "role": "system"}, QUESTION, ANSWER]
    condition = f"({written} if m.role == '{role}' and m.content[0] not in '579' else m.content)"
    template = CHATML.replace("m.content", condition)
    if "line" in written:
        messages = [{**message, "content": "A line."} for message in messages]
    assert PART_LOST in render(tmp_path, template, *messages).notes


@pytest.mark.parametrize(
    "written",
    [
        "m.content",
        "m.content | trim",
        "m.content.split() | join(' ')",
        "m.content | upper",
        "m.content | tojson",
        "m.content | replace('\\n', '\\\\n')",
    ],
)
def test_white_space_and_other_letters_are_no_loss(written: str, tmp_path: Path) -> None:
    template = CHATML.replace("m.content", f"({written})")
    assert PART_LOST not in render(tmp_path, template, QUESTION, ANSWER).notes


def test_thinking_that_a_template_writes_itself_is_no_loss(tmp_path: Path) -> None:
    thinking = (
        "('<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip()"
        " + '\\n</think>\\n\\n' + m.content.split('</think>')[-1].strip()"
        " if '</think>' in m.content else m.content)"
    )
    answer = assistant("<think>\nTwo and two.\n</think>\n\n4")
    row = render(tmp_path, CHATML.replace("m.content", thinking), user("2+2?"), answer)
    assert not {PART_LOST, NO_THINKING} & set(row.notes)


@pytest.mark.parametrize("changed", ["m.content[:3]", "m.content[::-1]"])
def test_a_template_that_changes_questions_gets_no_parts(changed: str, tmp_path: Path) -> None:
    """Content as parts is for templates that read them, not for those that print a list."""
    template = CHATML.replace("m.content", f"({changed} if m.role == 'user' else m.content)")
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    assert renderer.normalize_messages([user("abc")]) == [user("abc")]
    assert "type" not in renderer.render_text([user("abc"), assistant("d")])
