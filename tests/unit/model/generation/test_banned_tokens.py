"""Banned token sequences: no answer holds one, a part of one is allowed, and other rows are
unchanged."""

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
        output.tokens for _, output in sorted(generate(model, requests, decode=spell, end_ids=()))
    ]


def holds(tokens: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_no_answer_completes_a_banned_sequence(
    model: PackedCausalLM, prompts: list[tuple[int, ...]], spell: Spell
) -> None:
    free = [GenerationRequest(prompt, 12) for prompt in prompts]
    first = answers(model, free, spell)
    bans = [(answer[0],) if i % 2 else answer[2:5] for i, answer in enumerate(first)]
    banned_requests = [
        replace(request, bad_words_ids=(ban,)) for request, ban in zip(free, bans, strict=True)
    ]
    second = answers(model, [*banned_requests, free[0]], spell)
    for i, (answer, ban) in enumerate(zip(second[:-1], bans, strict=True)):
        assert not holds(answer, ban)
        assert i % 2 or answer[:4] == first[i][:4], "the beginning of a sequence is free"
    assert second[-1] == first[0], "a ban is of one request"
