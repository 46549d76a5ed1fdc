"""The sides of a row: pairs, labelled answers, and rows that give a side more than one document."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from toy_chat import CHATML, assistant, make_example, mark_trained_text, user, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4)
COUNTED = "{{ messages | length }} messages\n" + CHATML  # a document for each answer
ONE = make_example(user("a"), assistant("good"))
OTHER = make_example(user("a"), assistant("bad"))
TWO = make_example(user("a"), assistant("b"), user("c"), assistant("d"))
SINGLE = make_example(
    user("a"), assistant("b"), user("c"), assistant("d"), weights=(0.0, 0.0, 0.0, 1.0)
)


def make_renderer(tmp_path: Path, template: str = CHATML) -> Renderer:
    return Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)


def list_sides(renderer: Renderer, example: Example) -> list[tuple[str, str]]:
    """Return (side, trained text) of each document."""
    sides: list[tuple[str, str]] = []
    for document in renderer.render(example).documents:
        marked = mark_trained_text(renderer, document)
        sides.append((document.side, marked.partition("⟦")[2].partition("⟧")[0]))
    return sides


def test_each_side_has_its_answer(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    good = "good<|im_end|>"
    bad = "bad<|im_end|>"
    pair = replace(ONE, rejected=OTHER)
    assert list_sides(renderer, pair) == [("chosen", good), ("rejected", bad)]
    assert list_sides(renderer, replace(ONE, label=True)) == [("desirable", good)]
    assert list_sides(renderer, replace(OTHER, label=False)) == [("undesirable", bad)]
    both = replace(pair, label=True)
    assert list_sides(renderer, both) == [("desirable", good), ("undesirable", bad)]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (replace(TWO, rejected=OTHER), "one side of the pair has several trained answers"),
        (replace(OTHER, rejected=TWO), "one side of the pair has several trained answers"),
        (replace(TWO, label=True), "its label belongs to a single one"),
        (replace(TWO, label=False), "its label belongs to a single one"),
        (replace(ONE, rejected=TWO, label=True), "its label belongs to a single one"),
    ],
)
def test_a_side_of_several_documents_is_refused(
    example: Example, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        make_renderer(tmp_path, COUNTED).render(example)
    assert refused.value.where == "rows:7"
    assert "set `train: false` on the earlier" in refused.value.fix


def test_a_side_with_one_trained_answer_is_accepted(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path, COUNTED)
    sides = list_sides(renderer, replace(SINGLE, rejected=OTHER))
    assert sides == [("chosen", "d<|im_end|>"), ("rejected", "bad<|im_end|>")]
    assert list_sides(renderer, replace(SINGLE, label=False)) == [("undesirable", "d<|im_end|>")]


def test_equal_sides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="renders both sides of the pair identically"):
        make_renderer(tmp_path).render(replace(ONE, rejected=ONE))
