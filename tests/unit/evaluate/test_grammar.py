"""Answers under a grammar follow the schema, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe, save_writer_folder
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.metrics import METRICS
from tunesmith.model.generation import engine
from tunesmith.model.generation.engine import DecodeBatch, generate
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


def grammar_of(folder: Path, schema: Json = SCHEMA, *, is_strict: bool = False) -> Grammar:
    end_ids = renderer_of(folder).end_ids
    return Grammar(schema, folder, vocab_size=259, end_ids=end_ids, is_strict=is_strict)


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


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "x-guidance": {"lenient": True}}, "x-guidance"),
    ],
)
def test_a_strict_grammar_refuses_by_name_what_it_cannot_enforce(
    folder: Path, schema: Json, name: str
) -> None:
    with pytest.raises(InputError, match=name):
        grammar_of(folder, schema, is_strict=True)
    assert grammar_of(folder, SCHEMA, is_strict=True).warnings == ()


def test_a_grammar_without_a_next_token_ends_its_row_only(folder: Path, tmp_path: Path) -> None:
    wish = make_tiny_recipe(folder, tmp_path)
    model, renderer = load_starting_model(plan_recipe(wish), load_inputs(wish)), renderer_of(folder)
    model.network.eval()
    batch = DecodeBatch(
        model, slots=2, decode=renderer.decode, end_ids=renderer.end_ids, cache_bytes=2**24
    )
    request = GenerationRequest(renderer.encode_prompt([{"role": "user", "content": "a"}]), 60)
    brackets = tuple((token,) for token in range(259) if "{" in renderer.decode([token]))
    grammar = grammar_of(folder, is_strict=True)
    stuck = batch.submit(replace(request, bad_words_ids=brackets), grammar.start_answer())
    held = batch.submit(request, grammar.start_answer())
    while batch.has_work:
        batch.step()
    assert isinstance(stuck.error, InputError)
    assert (held.finish_reason, METRICS["schema_valid"](held.text, "", SCHEMA)) == ("end", 1)


def test_no_grammar_and_no_library_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the schema has no grammar"):
        grammar_of(folder, {"type": "string", "pattern": "(?=a)b("})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError) as refusal:
        grammar_of(folder)
    assert refusal.value.fix == "pip install '.[constrained]' in tunesmith's folder"
