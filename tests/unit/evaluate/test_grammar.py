"""Answers under a grammar follow the schema, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe, save_writer_folder
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.metrics import METRICS
from tunesmith.model.generation import engine
from tunesmith.model.generation.engine import generate
from tunesmith.model.generation.grammar import Grammar
from tunesmith.session.inputs import load_inputs
from tunesmith.session.session import load_starting_model

SCHEMA: Json = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer_folder(tmp_path_factory.mktemp("writer") / "writer")


def renderer_of(folder: Path) -> Renderer:
    return Renderer.from_folder(folder, now=datetime(2026, 1, 1))


def grammar_of(folder: Path, schema: Json = SCHEMA) -> Grammar:
    return Grammar(schema, folder, vocab_size=259, end_ids=renderer_of(folder).end_ids)


def test_a_model_that_writes_letters_writes_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = make_tiny_recipe(folder, tmp_path)
    model, renderer = load_starting_model(plan_recipe(wish), load_inputs(wish)), renderer_of(folder)
    requests = [
        GenerationRequest(renderer.encode_prompt([{"role": "user", "content": text}]), 60)
        for text in ("a", "bc", "def")
    ]
    options = {"decode": renderer.decode, "end_ids": renderer.end_ids}
    free = [result.text for _, result in sorted(generate(model, requests, **options))]
    assert not any(METRICS["json_valid"](text, "", None) for text in free)
    held = sorted(generate(model, requests, **options, grammar=grammar_of(folder)))
    assert [result.finish_reason for _, result in held] == ["end"] * 3
    for _, result in held:
        assert METRICS["schema_valid"](result.text, "", SCHEMA) == 1, result.text
    alone = [
        next(generate(model, [item], **options, grammar=grammar_of(folder)))[1] for item in requests
    ]
    assert alone == [result for _, result in held], (
        "an answer does not depend on what runs beside it"
    )
    monkeypatch.setattr(engine, "MAX_BATCH_ROWS", {"cpu": 1})
    again = grammar_of(folder)
    assert sorted(generate(model, requests, **options, grammar=again)) == held
    assert sorted(generate(model, requests, **options, grammar=again)) == held, (
        "the next answers start anew"
    )


def test_expected_answers_with_or_without_blanks_are_allowed(folder: Path) -> None:
    renderer, row = renderer_of(folder), {"kind": "dog", "old": True}
    grammar = grammar_of(folder)
    for text in (json.dumps(row), json.dumps(row, separators=(",", ":"))):
        answer, tokens = grammar.start_answer(), renderer.encode_text(text)
        for path in range(len(tokens)):
            assert answer.find_allowed(tokens[:path])[tokens[path]]
        assert answer.find_allowed(tokens).nonzero().flatten().tolist() == sorted(renderer.end_ids)


def test_what_the_grammar_leaves_to_the_model_is_told(folder: Path) -> None:
    assert grammar_of(folder).warnings == ()
    (warning,) = grammar_of(
        folder, {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    ).warnings
    assert "uniqueItems" in warning


def test_no_grammar_and_no_library_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the schema has no grammar"):
        grammar_of(folder, {"type": "string", "pattern": "(?=a)b("})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError) as refusal:
        grammar_of(folder)
    assert refusal.value.fix == "pip install 'tunesmith[constrained]'"
