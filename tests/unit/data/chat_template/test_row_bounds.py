"""How many trained turns and characters a row may have."""

from datetime import datetime
from pathlib import Path

import pytest

from toy_chat import (
    assistant,
    make_example,
    make_newline_bpe,
    mark_trained_text,
    user,
    write_model_folder,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template import assistant_spans, template
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4)


def test_a_trace_of_400_messages_renders(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path), now=NOW)
    turns = [turn for i in range(200) for turn in (user(f"do {i}"), assistant(f"did {i}"))]
    (document,) = renderer.render(make_example(*turns)).documents
    trained = mark_trained_text(renderer, document)
    assert trained.count("⟦did") == 200


def make_long_turns(start: str = "") -> list[Json]:
    """Ten questions and answers of a thousand characters; each answer begins with `start`."""
    pair = user("a" * 1_000), assistant(start + "b" * 1_000)
    return [*pair] * 10


def check_document_limit(renderer: Renderer, turns: list[Json]) -> None:
    """Eight turns fit into the limit of their documents, and ten do not."""
    assert len(renderer.render(make_example(*turns[:16])).documents) == 8
    with pytest.raises(InputError, match="over 100,000 characters"):
        renderer.render(make_example(*turns))


def test_a_document_a_turn_has_fewer_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are all encoded, and all trained."""
    monkeypatch.setattr(assistant_spans, "MAX_TURN_CHARS", 100_000)
    source = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}"
    source += "{% if loop.last %} {% endif %}{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    folder = write_model_folder(tmp_path, source)
    renderer = Renderer.from_folder(folder, now=NOW)
    check_document_limit(renderer, make_long_turns())


def test_turns_that_would_merge_with_their_prompts_have_fewer_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are found in the render of all messages, and then encoded one by one."""
    monkeypatch.setattr(assistant_spans, "MAX_TURN_CHARS", 100_000)
    renderer = Renderer.from_folder(write_model_folder(tmp_path, base=make_newline_bpe()), now=NOW)
    check_document_limit(renderer, make_long_turns("\n"))


def test_trained_turns_times_messages_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assistant_spans, "MAX_MESSAGE_RENDERS", 50)
    renderer = Renderer.from_folder(write_model_folder(tmp_path), now=NOW)
    turns = make_long_turns()
    assert renderer.render(make_example(*turns[:10])).documents
    with pytest.raises(InputError, match="6 trained turns of 12 messages") as refusal:
        renderer.render(make_example(*turns[:12]))
    assert refusal.value.fix == template.SPLIT_FIX


def test_all_renders_of_a_row_have_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path), now=NOW)
    turns = [user("a"), assistant("b")] * 20
    assert renderer.render(make_example(*turns)).documents
    monkeypatch.setattr(template, "MAX_SECONDS", 0.0)
    with pytest.raises(InputError, match=r"of the 40 messages .* takes over 0 s") as caught:
        renderer.render(make_example(*turns))
    assert caught.value.fix == template.SPLIT_FIX


def test_turns_of_one_document_may_have_more_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the template ends each render with more than the next turn begins with."""
    monkeypatch.setattr(assistant_spans, "MAX_TURN_CHARS", 10_000)
    turns = make_long_turns()
    source = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    source += "{{ '<|im_start|>' if add_generation_prompt else '<|endoftext|>' }}"
    folder = write_model_folder(tmp_path, source)
    renderer = Renderer.from_folder(folder, now=NOW)
    assert len(renderer.render(make_example(*turns)).documents) == 1
