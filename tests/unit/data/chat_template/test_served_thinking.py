"""Prompts that go on with a block of thinking, which the render of an answer lacks: what is trained
is the prompt as it is served, the answer, and its end."""

from datetime import datetime
from pathlib import Path

import pytest

from toy_chat import (
    assistant,
    make_example,
    make_tool_call,
    mark_trained_text,
    user,
    write_model_folder,
)
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.render_notes import OPEN_THINKING, SERVED_PROMPT
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4)
TOKENS = ("<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<think>", "</think>")
CALL = "{% if m.tool_calls %}<|channel>{{ m.tool_calls[0].function.name }}<channel|>{% endif %}"
REASON = "{% if m.reasoning_content %}OPEN{{ m.reasoning_content }}CLOSE{% else %}EMPTY{% endif %}"
TURN = (
    "{% for m in messages %}<|turn>{{ m.role }}\nREASON"
    "{{ m.content }}" + CALL + "<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>assistant\nTHINKING{% endif %}"
)
EMPTY_GEMMA = "<|channel>thought\n<channel|>"


def make_template(thinking: str, reason: str = "") -> str:
    reason = "{% if m.role == 'assistant' %}" + reason + "{% endif %}"
    return TURN.replace("REASON", reason).replace("THINKING", thinking)


def write_reason(opener: str, closer: str, empty: str = "") -> str:
    return REASON.replace("OPEN", opener).replace("CLOSE", closer).replace("EMPTY", empty)


GEMMA = make_template(EMPTY_GEMMA, write_reason("<|channel>thought\n", "\n<channel|>"))
COMMAND = make_template("<think></think>")
QWQ = make_template("<think>\n")
NEMOTRON = make_template("<think>\n", write_reason("<think>\n", "\n</think>\n", "<think></think>"))


@pytest.mark.parametrize(
    ("template", "answer", "is_open"),
    [
        (GEMMA, "eins<turn|>", False),
        (COMMAND, "eins<turn|>", False),
        (QWQ, "eins<turn|>", True),
        (NEMOTRON, "</think>eins<turn|>", False),
    ],
    ids=["Gemma 4", "Command R7B", "QwQ", "Nemotron"],
)
def test_an_answer_follows_the_served_prompt(
    template: str, answer: str, is_open: bool, tmp_path: Path
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template, TOKENS), now=NOW)
    turns = [user("one"), assistant("eins"), user("two"), assistant("eins")]
    row = renderer.render(make_example(*turns))
    assert SERVED_PROMPT in row.notes
    assert (OPEN_THINKING in row.notes) == is_open
    for document, until in zip(row.documents, (1, 3), strict=True):
        served = renderer.encode_prompt(turns[:until])
        assert tuple(document.tokens_L[: len(served)].tolist()) == served
        prompt = renderer.decode(served)
        assert mark_trained_text(renderer, document).rstrip() == f"{prompt}⟦{answer}⟧"


def test_a_call_follows_an_open_block_as_an_answer_does(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, QWQ, TOKENS), now=NOW)
    row = renderer.render(make_example(user("one"), assistant("", tool_calls=[make_tool_call()])))
    [trained] = [mark_trained_text(renderer, document) for document in row.documents]
    assert trained.rstrip().endswith("<think>\n⟦<|channel>look<channel|><turn|>⟧")


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (GEMMA, assistant("eins", reasoning_content="two is not one")),
        (COMMAND, assistant("<think>two is not one</think>eins")),
        (QWQ, assistant("eins", reasoning_content="two is not one")),
        (QWQ, assistant("<think>two is not one</think>eins")),
    ],
    ids=["closed", "closed, in the text", "dropped", "opened twice"],
)
def test_reasoning_that_cannot_follow_the_served_prompt_is_refused(
    template: str, answer: dict[str, str], tmp_path: Path
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template, TOKENS), now=NOW)
    with pytest.raises(InputError, match="prompts for an answer with") as refusal:
        renderer.render(make_example(user("one"), answer))
    assert "let the server" in refusal.value.fix


def test_reasoning_follows_an_open_block(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, NEMOTRON, TOKENS), now=NOW)
    row = renderer.render(make_example(user("one"), assistant("eins", reasoning_content="hm")))
    [trained] = [mark_trained_text(renderer, document) for document in row.documents]
    assert trained.rstrip().endswith("<think>\n⟦hm\n</think>\neins<turn|>⟧")
    assert OPEN_THINKING not in row.notes
