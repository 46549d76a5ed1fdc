"""Kept answers are those of the same question to the same weights, whatever happened to the
file."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tunesmith.core.types import GenerationOutput, GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate import answer_cache
from tunesmith.evaluate.answer_cache import AnswerCache, generate_cached, hash_weights
from tunesmith.model.causal_lm import PackedCausalLM

REQUESTS = [GenerationRequest(tuple(range(5, 5 + n)), 6) for n in (4, 9, 2, 30)]
IDENTITY: Json = {
    "tunesmith": "1",
    "base_sha256": {"model.safetensors": "ab"},
    "config": {"rope_theta": 10},
    "tokenizer": "cd",
    "renderer": "ef",
    "versions": {"torch": "2"},
    "machine": {"device": "cpu", "threads": 2},
    "plan": {"method": "lora", "dtype": "fp32", "attention": "sdpa", "learning_rate": 1},
}


class Calls:
    """Generates as ever, and counts what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int = 1000) -> None:
        self.asked: list[GenerationRequest] = []
        self.most, self._generate = most, answer_cache.generate_shared
        monkeypatch.setattr(answer_cache, "generate_shared", self)

    def __call__(
        self, model: PackedCausalLM, requests: list[GenerationRequest], **settings: Any
    ) -> Iterable[Any]:
        for count, result in enumerate(self._generate(model, requests, **settings)):
            if count == self.most:
                raise KeyboardInterrupt
            self.asked.append(requests[result[0]])
            yield result


def ask(
    model: PackedCausalLM,
    renderer: Renderer,
    file: Path | None,
    requests: list[GenerationRequest] = REQUESTS,
    **changed: Any,
):
    ends, state = changed.get("end_ids", renderer.end_ids), changed.get("state", "weights")
    store = None if file is None else AnswerCache(file, state)
    return generate_cached(model, requests, decode=renderer.decode, end_ids=ends, cache=store)


def test_what_was_answered_is_not_generated_again(
    model: PackedCausalLM, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(model, renderer, None)
    calls = Calls(monkeypatch)
    first = ask(model, renderer, tmp_path / "answers.jsonl")
    assert (len(calls.asked), first) == (4, plain)
    assert ask(model, renderer, tmp_path / "answers.jsonl", REQUESTS[::-1]) == plain[::-1]
    assert len(calls.asked) == 4


def test_one_request_given_twice_is_answered_once(
    model: PackedCausalLM, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    first, second, third = ask(model, renderer, None, [REQUESTS[0], REQUESTS[1], REQUESTS[0]])
    assert (len(calls.asked), first) == (2, third)
    assert first != second


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": (5, 6, 7)},
        {"max_new_tokens": 7},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"seed": 1},
        {"stop": ("a",)},
        {"bad_words_ids": ((9,),)},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((9, 2.0),)},
        {"num_logprobs": 0},
        {"num_prompt_logprobs": 0},
        {"end_ids": (41,)},
        {"adapter_scale": 0.5},
        {"cache_salt": "other"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_no_answer_is_served_to_another_request(
    changed: dict[str, Any],
    model: PackedCausalLM,
    renderer: Renderer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(model, renderer, tmp_path / "answers.jsonl")
    calls = Calls(monkeypatch)
    other = dataclasses.replace(REQUESTS[0], **changed)
    ask(model, renderer, tmp_path / "answers.jsonl", [other])
    assert calls.asked == [other]


def test_every_field_of_a_request_was_changed_above() -> None:
    fields = {"tokens", "max_new_tokens", "temperature", "top_p", "seed", "stop", "bad_words_ids"}
    fields |= {"top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
    fields |= {
        "logit_bias",
        "num_logprobs",
        "num_prompt_logprobs",
        "end_ids",
        "adapter_scale",
        "cache_salt",
    }
    fields |= {"adapter"}  # which generation refuses without a bank
    assert {field.name for field in dataclasses.fields(GenerationRequest)} == fields


def test_no_answer_is_served_with_other_ends_or_weights(
    model: PackedCausalLM, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(model, renderer, tmp_path / "answers.jsonl")
    calls = Calls(monkeypatch)
    ask(model, renderer, tmp_path / "answers.jsonl", end_ids=(*renderer.end_ids, 40))
    assert len(calls.asked) == 4
    ask(model, renderer, tmp_path / "answers.jsonl", state="other weights")
    assert len(calls.asked) == 8


def test_every_part_of_what_weights_are_makes_another_state() -> None:
    changed = [{**IDENTITY, key: "other"} for key in answer_cache.MODEL_KEYS]
    changed += [
        {**IDENTITY, "plan": {**IDENTITY["plan"], key: "other"}} for key in answer_cache.PLAN_KEYS
    ]
    states = [hash_weights(item, {}) for item in (IDENTITY, *changed)]
    states += [hash_weights(IDENTITY, {"adapter.safetensors": sha}) for sha in "ab"]
    assert len(set(states)) == len(states) == 1 + len(changed) + 2
    trained_otherwise = {**IDENTITY, "plan": {**IDENTITY["plan"], "learning_rate": 2}}
    assert hash_weights(trained_otherwise, {}) == states[0], (
        "what says nothing of the weights does not count"
    )


def test_an_evaluation_that_was_killed_goes_on_where_it_was(
    model: PackedCausalLM, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(model, renderer, None)
    killed = Calls(monkeypatch, most=2)
    with pytest.raises(KeyboardInterrupt):
        ask(model, renderer, tmp_path / "answers.jsonl")
    monkeypatch.undo()
    calls = Calls(monkeypatch)
    assert ask(model, renderer, tmp_path / "answers.jsonl") == plain
    assert sorted(r.tokens for r in killed.asked + calls.asked) == sorted(
        r.tokens for r in REQUESTS
    )


@settings(max_examples=30, deadline=None)
@given(cut=some.integers(1, 400), letter=some.integers(0, 10_000), byte=some.integers(0, 255))
def test_a_torn_or_damaged_line_serves_nothing_wrong(
    cut: int, letter: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The file loses its end, and a byte anywhere changes: what is read is what was written, or
    nothing."""
    file = tmp_path_factory.mktemp("torn") / "answers.jsonl"
    written = {
        f"{n:064x}": GenerationOutput(f'answer "{n}" é', (n, n + 1), "end", 3) for n in range(4)
    }
    stored = answer_cache._AppendFile(file)
    for key, answer in written.items():
        stored.append_answer(key, answer)
    stored.close()
    content = bytearray(file.read_bytes()[:-cut])
    if content:
        content[letter % len(content)] = byte
    file.write_bytes(content)
    result = answer_cache._read_answers(file, written)
    assert all(written[key] == answer for key, answer in result.items())
    after = answer_cache._AppendFile(file)
    after.append_answer("new", GenerationOutput("more", (1,), "end", 2))
    after.close()
    assert answer_cache._read_answers(file, ["new"]), "what is added after a torn line can be read"


def test_what_cannot_be_written_is_answered_all_the_same(
    model: PackedCausalLM, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(model, renderer, None)
    assert ask(model, renderer, tmp_path / "no" / "such" / "folder.jsonl") == plain
    write = os.write

    def full(file: int, content: bytes) -> int:
        return write(file, content[:20])  # what a full disk takes

    monkeypatch.setattr(os, "write", full)
    assert ask(model, renderer, tmp_path / "answers.jsonl") == plain
    assert (tmp_path / "answers.jsonl").stat().st_size == 20
    monkeypatch.undo()
    assert ask(model, renderer, tmp_path / "answers.jsonl") == plain
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"]["finish_reason"] for line in lines[1:]], (
        "the torn line is ended"
    )
    assert len(lines) == 5
