"""Trained text by `train_on`: masks of whole conversations and of single roles."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from toy_chat import (
    CHATML,
    CHATML_TOKENS,
    assistant,
    make_example,
    make_newline_bpe,
    mark_trained_text,
    user,
    write_model_folder,
)
from tunesmith.core.types import Example, Json, Row
from tunesmith.data.chat_template.render_notes import CUT_OFF
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.formats.parse import parse_row

NOW = datetime(2026, 3, 4)
SYSTEM: Json = {"role": "system", "content": "be kind"}
TOOL: Json = {"role": "tool", "content": "it is 7"}
DIALOG = (SYSTEM, user("hello"), assistant("hi"), user("and 7"), TOOL, assistant("yes"))
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Earlier answers lose their thinking, as in Qwen3.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and "
    "not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.from_folder(write_model_folder(tmp_path), now=NOW)


def mark(renderer: Renderer, example: Example, train_on: Any) -> list[str]:
    trained = renderer.train_on(train_on)
    row = trained.render(example)
    return [mark_trained_text(trained, document) for document in row.documents]


def read(messages: list[Json]) -> Example:
    return parse_row(Row("r:1", {"messages": messages}), "messages", has_template=True)


def test_all_but_the_first_token_is_trained(renderer: Renderer) -> None:
    (text,) = mark(renderer, make_example(*DIALOG), "all")
    start = "<|im_start|>"
    assert text.startswith(f"{start}⟦system\nbe kind<|im_end|>\n{start}user\nhello")
    assert text.endswith("yes<|im_end|>\n⟧")
    assert text.count("⟦") == 1


@pytest.mark.parametrize(
    ("roles", "trained"),
    [
        (("user",), ["hello<|im_end|>", "and 7<|im_end|>"]),
        (("system",), ["be kind<|im_end|>"]),
        (("tool",), ["it is 7<|im_end|>"]),
        (("assistant",), ["hi<|im_end|>", "yes<|im_end|>"]),
        (("user", "assistant"), ["hello", "hi", "and 7", "yes"]),
        (("system", "tool"), ["be kind", "it is 7"]),
    ],
)
def test_roles_are_trained_through_their_end_token(
    renderer: Renderer, roles: tuple[str, ...], trained: list[str]
) -> None:
    (text,) = mark(renderer, make_example(*DIALOG), roles)
    assert [piece.partition("⟧")[0] for piece in text.split("⟦")[1:]] == [
        piece.removesuffix("<|im_end|>") + "<|im_end|>" for piece in trained
    ]


def test_answers_are_what_they_were(renderer: Renderer) -> None:
    example = make_example(*DIALOG)
    assert mark(renderer, example, "answers") == mark(renderer, example, ("assistant",))
    plain = [mark_trained_text(renderer, d) for d in renderer.render(example).documents]
    assert mark(renderer, example, "answers") == plain


def test_the_developer_is_a_system_message(renderer: Renderer) -> None:
    example = make_example({"role": "developer", "content": "be kind"}, user("a"), assistant("b"))
    assert "⟦be kind<|im_end|>⟧" in mark(renderer, example, ("system",))[0]


def test_a_row_keeps_its_weights(renderer: Renderer) -> None:
    """`train: false` is obeyed, and a weight scales its message."""
    example = read(
        [
            {**user("hello"), "train": False},
            {**assistant("hi"), "train": False},
            user("and 7"),
            {**assistant("yes"), "weight": 0.5},
        ]
    )
    (text,) = mark(renderer, example, ("user", "assistant"))
    assert "⟦and 7<|im_end|>⟧" in text
    assert "⟦yes<|im_end|>⟧" in text
    assert "⟦h" not in text
    (text,) = mark(renderer, example, "all")
    assert "⟧hello<|im_end|>⟦" in text
    assert "⟧hi<|im_end|>⟦" in text
    document = renderer.train_on("all").render(example).documents[0]
    assert set(document.weights_L.tolist()) == {0.0, 0.5, 1.0}


def test_answers_of_a_prompt_are_trained_by_role(renderer: Renderer) -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    example = parse_row(Row("r:1", row), "completion", has_template=True)
    assert "⟦b<|im_end|>⟧" not in mark(renderer, example, "answers")[0]
    assert "⟦b<|im_end|>⟧" in mark(renderer, example, ("assistant",))[0]


def test_a_message_without_end_token_is_trained_to_its_last_token(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, INST, [*CHATML_TOKENS, "[INST]", "[/INST]"])
    renderer = Renderer.from_folder(folder, now=NOW)
    example = make_example(user("hello"), assistant("hi"))
    (text,) = mark(renderer, example, ("user",))
    assert text.partition("⟦")[2].partition("⟧")[0].strip() == "hello"
    assert mark(renderer, example, "all")[0].count("⟧") == 1


def test_each_message_is_trained_once_where_turns_are_documents(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, FORGETFUL)
    renderer = Renderer.from_folder(folder, now=NOW)
    example = make_example(
        user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")
    )
    first, second = mark(renderer, example, ("user", "assistant"))
    assert first.count("⟦") == second.count("⟦") == 2
    assert "⟦a<|im_end|>⟧" in first
    assert "⟦a<|im_end|>⟧" not in second
    assert "⟦c<|im_end|>⟧" in second
    (full,) = mark(renderer, example, "all")
    assert full.count("⟦") == 1
    assert "x</think>" not in full


def test_rows_without_a_trained_role_have_no_targets(renderer: Renderer) -> None:
    row = renderer.train_on(("tool",)).render(make_example(user("a"), assistant("b")))
    assert not any(document.weights_L.any() for document in row.documents)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("answers", "a b⟦ c"), ("all", "a⟦ b c"), (("user",), "a⟦ b⟧ c"), (("assistant",), "a b⟦ c")],
)
def test_completions_without_a_template(tmp_path: Path, train_on: Any, expected: str) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, None), now=NOW)
    example = parse_row(Row("r:1", {"prompt": "a b", "completion": " c"}), "completion", False)
    (text,) = mark(renderer, example, train_on)
    assert text.startswith(expected)


def test_the_template_is_that_of_the_test() -> None:
    assert "add_generation_prompt" in CHATML


# Earlier answers have no end token, and each turn is a document.
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [FORGETFUL, OPEN_ENDED])
@pytest.mark.parametrize(
    ("roles", "trained"),
    [
        (("user", "assistant"), ["thanks", "bye"]),
        (("tool", "assistant"), ["it is 7"]),
        (("user", "tool", "assistant"), ["thanks", "it is 7", "bye"]),
        (("system", "assistant"), []),
        (("assistant",), []),
    ],
)
def test_messages_after_the_last_answer_are_trained_where_turns_are_documents(
    tmp_path: Path, template: str, roles: tuple[str, ...], trained: list[str]
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    answers = (user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d"))
    example = make_example(*answers, user("thanks"), TOOL, user("bye"))
    texts = mark(renderer, example, roles)
    assert len(texts) == 2 + bool(trained)
    if trained:
        pieces = [piece.partition("⟧")[0] for piece in texts[-1].split("⟦")[1:]]
        assert [piece.strip().removesuffix("<|im_end|>") for piece in pieces] == trained
    notes = renderer.train_on(roles).render(example).notes
    assert (CUT_OFF in notes) == (not trained)


def test_a_last_answer_that_is_not_trained_stays_so(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, FORGETFUL), now=NOW)
    first = [user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")]
    untrained = [{**assistant(text), "train": False} for text in ("f", "h")]
    example = read([*first, user("e"), untrained[0], user("g"), untrained[1]])
    last = mark(renderer, example, ("user", "assistant"))[-1]
    assert [piece.partition("<")[0] for piece in last.split("⟦")[1:]] == ["e", "g"]


def mark_users(folder: Path, template: str, contents: tuple[str, ...], **model: Any) -> str:
    """Return the marked text of questions alone, each before the same answer."""
    write_model_folder(folder, template, **model)
    messages = [message for content in contents for message in (user(content), assistant("yes"))]
    trained = Renderer.from_folder(folder, now=NOW).train_on(("user",))
    (document,) = trained.render(make_example(*messages)).documents
    return mark_trained_text(trained, document)


def test_the_first_token_of_a_text_without_header_is_no_target(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    text = mark_users(tmp_path, template, ("hello", "and 7"))
    first, *later = text.split("⟦")
    assert len(later) == 2
    assert first
    assert (first + later[0]).startswith("hello<|im_end|>⟧")
    assert later[1].startswith("and 7<|im_end|>⟧")


def test_text_of_the_template_before_the_end_token_is_trained(tmp_path: Path) -> None:
    template = CHATML.replace("'<|im_end|>", "' .<|im_end|>")
    assert template != CHATML
    text = mark_users(tmp_path, template, ("hello",))
    assert "⟦hello .<|im_end|>⟧" in text


def test_tokens_that_a_message_shares_with_the_template_are_trained(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ':\\n' + m.content + '\\n' }}{% endfor %}"
    text = mark_users(tmp_path, template, ("\nhello\n", "7"), base=make_newline_bpe())
    assert text.startswith("user:⟦\n\nhello\n\n⟧assistant:")
    assert "user:\n⟦7⟧\nassistant" in text
