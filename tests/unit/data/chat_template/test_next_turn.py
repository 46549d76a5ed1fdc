"""Templates that always write something after an answer: the end token stands before it."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from toy_chat import (
    assistant,
    make_example,
    mark_trained_text,
    render_marked,
    user,
    write_model_folder,
)
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4)
TOKENS = (
    "<|eos|>", "<|start|>", "<|stop|>", "<|end|>", "<|sep|>", "<|bos|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|inner|>",
)  # fmt: skip
TURN = "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>' }}"
TAGGED = "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
SPLIT = "{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content + '<|end|>' }}"
BARE = "{{ ('[Q]' if m.role == 'user' else '[A]') + m.content }}"
PROMPT = "{{ '<|start|>assistant\n' }}"


def loop(turn: str, after_answer: str = "", last: str = "") -> str:
    after = "{% if m.role == 'assistant' %}" + after_answer + "{% endif %}"
    return "{% for m in messages %}" + turn + after + "{% endfor %}" + last


def asked(prompt: str) -> str:
    return "{% if add_generation_prompt %}" + prompt + "{% endif %}"


DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>{% endif %}"
ALWAYS = {
    "header": loop(TURN, last=PROMPT),
    "header_after_default_system": DEFAULT_SYSTEM + loop(TURN, last=PROMPT),
    "header_in_two_tokens": "<|bos|>" + loop(SPLIT, last="{{ '<|start|>assistant<|stop|>\n\n' }}"),
    "role_token": "<|bos|>" + loop(TAGGED, last="<|assistant|>"),
    "user_header": loop(TAGGED, last="{% if messages[-1].role == 'assistant' %}<|user|>{% else %}"
                        "<|assistant|>{% endif %}"),
    "separator": loop(TURN, "<|sep|>", asked(PROMPT)),
    "separator_after_all": loop(TURN + "<|sep|>\n", last=asked(PROMPT)),
    "separator_and_header": loop(TURN + "<|sep|>\n", last=PROMPT),
    "bos_again": "<|bos|>" + loop(TURN, "<|bos|>", asked(PROMPT)),
    "reminder": loop(TURN, "<|start|>system\nBe kind.<|end|>", asked(PROMPT)),
    "reminder_of_other_tokens": loop(TAGGED, "<|system|>Be kind.<|end|>", asked("<|assistant|>")),
    "date": loop(TURN, "\nToday is {{ strftime_now('%d %b') }}.<|sep|>", asked(PROMPT)),
    "end_after_answers_only": loop(BARE, "<|end|><|sep|>", asked("[A]")),
    "bos_and_bare": loop("{% if m.role == 'user' %}<|bos|>{% endif %}" + BARE, "<|end|><|bos|>",
                         asked("[A]")),
}  # fmt: skip


@pytest.mark.parametrize("name", ALWAYS)
def test_the_end_token_stands_before_anything_of_the_next_turn(name: str, tmp_path: Path) -> None:
    model = write_model_folder(
        tmp_path, ALWAYS[name], TOKENS, eos_token="<|eos|>", bos_token="<|bos|>"
    )
    renderer = Renderer.from_folder(model, now=NOW)
    assert renderer.decode(renderer.end_ids) == "<|end|><|eos|>"
    turns = (user("one"), assistant("eins"), user("two"), assistant("zwei"))
    trained = "".join(render_marked(renderer, *turns))
    pieces = [part.split("⟧")[0] for part in trained.split("⟦")[1:]]
    assert pieces == ["eins<|end|>", "zwei<|end|>"]


def test_an_end_that_the_model_folder_names_comes_before_all_others(tmp_path: Path) -> None:
    """As Cohere's `<|END_TEXT|><|END_OF_TURN_TOKEN|>`: servers stop at the second only."""
    template = loop(TURN, "<|eos|>", asked(PROMPT))
    model = write_model_folder(tmp_path, template, TOKENS, eos_token="<|eos|>")
    renderer = Renderer.from_folder(model, now=NOW)
    assert renderer.decode(renderer.end_ids) == "<|eos|>"
    [trained] = render_marked(renderer, user("one"), assistant("eins"))
    assert trained.endswith("⟦eins<|end|><|eos|>⟧")


def test_a_template_that_renders_only_with_tools_has_its_end(tmp_path: Path) -> None:
    """As Cohere's `tool_use`: after the last answer the next header is written."""
    template = "{{ tools[0].function.name }}" + ALWAYS["header"]
    model = write_model_folder(tmp_path, template, TOKENS, eos_token="<|eos|>")
    renderer = Renderer.from_folder(model, now=NOW)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    row = make_example(user("one"), assistant("eins"), tools=(tool,))
    [document] = renderer.render(row).documents
    assert "⟦eins<|end|>⟧" in mark_trained_text(renderer, document)


def test_an_end_that_only_reasoning_shows_is_found(tmp_path: Path) -> None:
    """As Unsloth's gpt-oss: plain answers end as reasoning does, which is no end."""
    reasoned = "{{ m.thinking + '<|end|>' + m.content + '<|eos|>' }}"
    plain = "{{ m.content + '<|end|>' }}"
    turn = "{% if m.thinking %}" + reasoned + "{% else %}" + plain + "{% endif %}"
    model = write_model_folder(tmp_path, loop(turn), TOKENS, eos_token="<|eos|>")
    renderer = Renderer.from_folder(model, now=NOW)
    assert renderer.decode(renderer.end_ids) == "<|eos|>"
    [trained] = render_marked(renderer, user("a"), assistant("b", reasoning_content="c"))
    assert trained == "a<|end|>⟦c<|end|>b<|eos|>⟧"


@pytest.mark.parametrize("ends", [["<|eos|>"], ["<|end|>", "<|eos|>"], ["<|end|>"]])
def test_ends_of_generation_config_do_not_change_it(ends: list[str], tmp_path: Path) -> None:
    model = write_model_folder(tmp_path, ALWAYS["header"], TOKENS, eos_token="<|eos|>")
    ids = Renderer.from_folder(model, now=NOW).tokenizer
    config = {"eos_token_id": [ids.token_to_id(text) for text in ends]}
    (model / "generation_config.json").write_text(json.dumps(config))
    renderer = Renderer.from_folder(model, now=NOW)
    assert {renderer.decode([end]) for end in renderer.end_ids} == {"<|end|>", "<|eos|>"}
    assert render_marked(renderer, user("a"), assistant("b"))[0].endswith(
        "⟦b<|end|>⟧<|start|>assistant\n"
    )


def test_a_token_inside_the_answer_comes_before_its_end(tmp_path: Path) -> None:
    template = loop(
        "{{ '<|start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' %}<|inner|>{% endif %}<|end|>",
        last=PROMPT,
    )
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template, TOKENS), now=NOW)
    assert "⟦b<|inner|><|end|>⟧" in render_marked(renderer, user("a"), assistant("b"))[0]


@pytest.mark.parametrize("change", ["upper", "lower", "capitalize", "title"])
def test_a_change_of_case_hides_no_end(change: str, tmp_path: Path) -> None:
    turn = "{{ '<|start|>' + m.role + '\n' + m.content|" + change + " + '<|end|>' }}"
    model = write_model_folder(tmp_path, loop(turn, last=asked(PROMPT)), TOKENS)
    renderer = Renderer.from_folder(model, now=NOW)
    assert renderer.decode(renderer.end_ids[:1]) == "<|end|>"
    answer = getattr("bB c", change)()
    assert render_marked(renderer, user("a"), assistant("bB c"))[0].endswith(f"⟦{answer}<|end|>⟧")


@pytest.mark.parametrize("change", ["[:-1]", "[1:]", ".replace('6', '')", "[:3]"])
def test_a_template_that_changes_answers_is_refused(change: str, tmp_path: Path) -> None:
    turn = "{{ '<|start|>' + m.role + '\n' + m.content" + change + " + '<|end|>' }}"
    model = write_model_folder(tmp_path, loop(turn, last=asked(PROMPT)), TOKENS)
    with pytest.raises(InputError, match="the chat template changes the text of answers: 9604"):
        Renderer.from_folder(model, now=NOW)


NO_END = {
    "control_header": (
        loop("<|{{ m.role }}|>\n{{ m.content }}\n", last="{{ '<|assistant|>\n' }}"),
        "b\n",
    ),
    "words": (
        loop(
            "### {{ 'Q' if m.role == 'user' else 'A' }}:\n{{ m.content }}\n\n",
            last="{{ '### A:\n' }}",
        ),
        "b\n\n",
    ),
    "words_of_the_end": (
        loop("### {{ m.role }}:\n{{ m.content }}\nOver.\n\n", last="{{ '### assistant:\n' }}"),
        "b\nOver.\n\n",
    ),
}


@pytest.mark.parametrize("name", NO_END)
def test_without_an_end_token_one_is_appended_before_the_next_turn(
    name: str, tmp_path: Path
) -> None:
    template, answer = NO_END[name]
    model = write_model_folder(tmp_path, template, TOKENS, eos_token="<|eos|>")
    renderer = Renderer.from_folder(model, now=NOW)
    assert renderer.decode(renderer.end_ids) == "<|eos|>"
    for row in (
        (user("a"), assistant("b")),
        (user("x"), assistant("y"), user("a"), assistant("b")),
    ):
        assert render_marked(renderer, *row)[-1].endswith(f"⟦{answer}<|eos|>⟧")


def test_a_tool_result_is_kept_as_served(tmp_path: Path) -> None:
    result = (
        "{% elif m.role == 'tool' %}{{ '<|start|>tool\n[' + m.content }}"
        "{% if not loop.last %}{{ ']\n' }}{% else %}{{ ']' }}{% endif %}{{ '<|end|>' }}{% else %}"
    )
    template = loop("{% if false %}" + result + TURN + "{% endif %}", last=asked(PROMPT))
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template, TOKENS), now=NOW)
    turns = (user("a"), {"role": "tool", "content": "r"}, assistant("b"))
    (text,) = render_marked(renderer, *turns)
    assert text.endswith("<|start|>tool\n[r]<|end|><|start|>assistant\n⟦b<|end|>⟧")
