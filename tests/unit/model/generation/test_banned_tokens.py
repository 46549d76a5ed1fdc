"""Banned token sequences: no answer holds one, a part of one is free, and other rows are left
alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.core.types import GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import generate

Spell = Callable[[Sequence[int]], str]


def answers(
    model: PackedCausalLM, requests: Sequence[GenerationRequest], spell: Spell
) -> list[tuple[int, ...]]:
    return [
        found.tokens for _, found in sorted(generate(model, requests, decode=spell, end_ids=()))
    ]


def holds(tokens: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_no_answer_completes_a_banned_sequence(
    model: PackedCausalLM, prompts: list[tuple[int, ...]], spell: Spell
) -> None:
    free = [GenerationRequest(prompt, 12) for prompt in prompts]
    first = answers(model, free, spell)
    bans = [(said[0],) if i % 2 else said[2:5] for i, said in enumerate(first)]
    asked = [replace(request, bad_words_ids=(ban,)) for request, ban in zip(free, bans, strict=True)]
    second = answers(model, [*asked, free[0]], spell)
    for i, (said, ban) in enumerate(zip(second[:-1], bans, strict=True)):
        assert not holds(said, ban)
        assert i % 2 or said[:4] == first[i][:4], "the beginning of a sequence is free"
    assert second[-1] == first[0], "a ban is of one request"
