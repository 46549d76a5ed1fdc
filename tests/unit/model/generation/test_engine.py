"""Answers do not depend on the rest of the batch, and equal those of transformers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from quick_families import leave_others_to_slow
from tiny_models import CONFIGS, make_tiny_model, make_tiny_network
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.generation import engine
from tunesmith.model.generation.engine import generate, stream_answer
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.paged_cache import BLOCK_TOKENS

Spell = Callable[[Sequence[int]], str]
Prompts = list[tuple[int, ...]]


def answers(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    spell: Spell,
    end_ids: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[GenerationOutput]:
    results = generate(model, requests, decode=spell, end_ids=end_ids, batch_size=batch_size)
    return [answer for _, answer in sorted(results)]


def stock_answer(network: PreTrainedModel, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    network.generation_config.eos_token_id = None
    out = network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_greedy_answers_equal_those_of_transformers(
    family: str, prompts: Prompts, spell: Spell
) -> None:
    network = make_tiny_network(family)
    budgets = [5 + 3 * (i % 4) for i in range(len(prompts))]  # so that rows leave and others join
    expected = [
        stock_answer(network, prompt, n) for prompt, n in zip(prompts, budgets, strict=True)
    ]
    assert len({token for answer in expected for token in answer}) > 5, (
        "the oracle repeats itself: nothing is tested"
    )
    model = wrap_model(network, torch.float32)
    requests = [GenerationRequest(prompt, n) for prompt, n in zip(prompts, budgets, strict=True)]
    for batch_size in (1, 4, 9):
        outputs = answers(model, requests, spell, batch_size=batch_size)
        assert [answer.tokens for answer in outputs] == expected
        assert {answer.finish_reason for answer in outputs} == {"length"}


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_a_common_beginning_is_computed_once_and_changes_nothing(
    family: str, prompts: Prompts, spell: Spell
) -> None:
    network = make_tiny_network(family)
    beginning = tuple(2 + token % 50 for token in range(BLOCK_TOKENS + 3))
    prompts = [beginning + prompt for prompt in prompts] + [beginning]
    expected = [stock_answer(network, prompt, 6) for prompt in prompts]
    model = wrap_model(network, torch.float32)
    outputs = answers(
        model, [GenerationRequest(prompt, 6) for prompt in prompts], spell, batch_size=4
    )
    assert [answer.tokens for answer in outputs] == expected


def test_the_common_prefix_is_the_longest() -> None:
    assert engine.find_common_prefix([(1, 2, 3), (1, 2, 4, 5), (1, 2)]) == (1, 2)
    assert engine.find_common_prefix([(1, 2), (1, 2)]) == (1, 2)
    assert engine.find_common_prefix([(1,), (2,)]) == ()


@pytest.mark.promise
def test_sampled_answers_do_not_depend_on_the_batch(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    requests = [
        GenerationRequest(prompt, 12, temperature=t, top_p=p, seed=seed)
        for seed, prompt in enumerate(prompts)
        for t, p in ((0.0, 1.0), (0.9, 1.0), (1.5, 0.8))
    ]
    alone = [answers(model, [request], spell)[0] for request in requests]
    assert answers(model, requests, spell, batch_size=5) == alone
    assert answers(model, requests[::-1], spell, batch_size=27) == alone[::-1]
    greedy, warm, hot = alone[0], alone[1], alone[2]
    assert len({greedy.tokens, warm.tokens, hot.tokens}) == 3
    assert answers(model, [replace(requests[2], seed=99)], spell)[0] != hot


def test_an_end_token_ends_the_answer(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    requests = [GenerationRequest(prompt, 20) for prompt in prompts]
    free = answers(model, requests, spell)
    end = free[1].tokens[4]
    for output, before in zip(answers(model, requests, spell, end_ids=[end]), free, strict=True):
        cut = before.tokens.index(end) + 1 if end in before.tokens else 20
        assert output.tokens == before.tokens[:cut]
        assert output.finish_reason == ("end" if end in before.tokens else "length")
        assert output.text == spell(before.tokens[: cut - 1 if end in before.tokens else 20])


def test_a_stop_string_ends_the_answer_across_tokens(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    free = answers(model, [GenerationRequest(prompts[1], 20)], spell)[0]
    start = next(i for i in range(5, 18) if free.text.find(free.text[i : i + 3]) == i)
    stop = free.text[start : start + 3]
    (output,) = answers(
        model, [GenerationRequest(prompts[1], 20, stop=("never there", stop))], spell
    )
    assert (output.finish_reason, output.text) == ("stop", free.text[:start])
    assert output.tokens == free.tokens[: start + 3]


def test_a_stop_string_inside_a_token_cuts_the_text(
    model: PackedCausalLM, prompts: Prompts
) -> None:
    def long_words(tokens: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    free = answers(model, [GenerationRequest(prompts[2], 8)], long_words)[0]
    inside = f"{free.tokens[3]}>"
    (output,) = answers(model, [GenerationRequest(prompts[2], 8, stop=(inside,))], long_words)
    assert output.finish_reason == "stop"
    assert free.text.startswith(output.text + inside)
    assert inside not in output.text


def test_pieces_of_a_stream_join_to_the_answer(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    for stop in (
        (),
        (spell(answers(model, [GenerationRequest(prompts[4], 15)], spell)[0].tokens[6:9]),),
    ):
        request = GenerationRequest(prompts[4], 15, stop=stop)
        pieces = list(stream_answer(model, request, decode=spell, end_ids=()))
        assert "".join(pieces) == answers(model, [request], spell)[0].text
        assert len(pieces) > 1


def test_a_stream_never_shows_half_a_character(model: PackedCausalLM, prompts: Prompts) -> None:
    def as_bytes(
        tokens: Sequence[int],
    ) -> str:  # each id is one of the four bytes of an emoji, in turn
        return "".join(
            "\N{HAMMER}" if i % 3 == 2 else "" for i in range(len(tokens))
        ) + "\ufffd" * (len(tokens) % 3 > 0)

    pieces = list(
        stream_answer(model, GenerationRequest(prompts[0], 9), decode=as_bytes, end_ids=())
    )
    assert pieces == ["\N{HAMMER}"] * 3
    cut = list(stream_answer(model, GenerationRequest(prompts[0], 4), decode=as_bytes, end_ids=()))
    assert "".join(cut) == "\N{HAMMER}\ufffd", "what is still cut at the end is shown"


def test_an_answer_ends_where_the_context_does(model: PackedCausalLM, spell: Spell) -> None:
    (output,) = answers(model, [GenerationRequest((5,) * 248, 50)], spell)
    assert (len(output.tokens), output.finish_reason, output.prompt_tokens) == (8, "length", 248)


@pytest.mark.parametrize(
    ("prompt", "message"), [((), "empty"), ((5,) * 256, "fills the context of 256")]
)
def test_impossible_prompts_are_refused(
    model: PackedCausalLM, spell: Spell, prompt: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        answers(model, [GenerationRequest((1, 2)), GenerationRequest(prompt)], spell)


def test_no_requests_give_no_answers(model: PackedCausalLM, spell: Spell) -> None:
    assert answers(model, [], spell) == []


def test_logits_that_are_not_finite_are_refused(model: PackedCausalLM, spell: Spell) -> None:
    model.network.get_output_embeddings().weight[3, 3] = torch.nan
    with pytest.raises(GateError, match="NaN or infinite"):
        answers(model, [GenerationRequest((1, 2, 3))], spell)


def test_generation_leaves_the_model_trainable(model: PackedCausalLM, spell: Spell) -> None:
    weight = model.network.get_output_embeddings().weight.requires_grad_(True)
    seen = []
    for _, answer in generate(model, [GenerationRequest((1, 2, 3), 4)], decode=spell, end_ids=()):
        assert torch.is_grad_enabled()
        seen.append(answer)
    assert len(seen) == 1
    weight.sum().backward()


def test_rows_fit_the_memory_for_keys_and_values(model: PackedCausalLM) -> None:
    assert model.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert (
        engine.compute_max_batch_rows(model, [GenerationRequest((1,) * 20, 100)])
        == engine.MAX_BATCH_ROWS["cpu"]
    )
    most = engine.CACHE_BYTES["cpu"] // model.cache_bytes_per_token
    assert engine.compute_max_batch_rows(model, [GenerationRequest((1,), most // 3)]) == 2
    assert engine.compute_max_batch_rows(model, [GenerationRequest((1,), most * 2)]) == 1


def test_the_cache_has_room_for_the_longest_rows_in_blocks(model: PackedCausalLM) -> None:
    """At most what the plan counts, where every row has the room of the longest."""
    block_bytes = BLOCK_TOKENS * model.cache_bytes_per_token
    requests = [GenerationRequest((1,) * n, 60) for n in (1, 4, 5, 68, 69, 250)]
    blocks = [engine.compute_cache_bytes(model, requests, n) / block_bytes for n in (1, 2, 3, 6)]
    assert blocks == [4, 4 + 3, 4 + 3 + 2, 4 + 3 + 2 + 2 + 1 + 1]


def test_an_adapter_is_switched_off_without_a_copy(prompts: Prompts, spell: Spell) -> None:
    requests = [GenerationRequest(prompt, 6) for prompt in prompts]
    base, model = make_tiny_model(method=None), make_tiny_model(method="lora")
    trained = answers(model, requests, spell)
    with scaled_adapter(model.network, 0):
        assert answers(model, requests, spell) == answers(base, requests, spell)
    assert answers(model, requests, spell) == trained != answers(base, requests, spell)


@pytest.mark.slow
def test_the_real_model_answers_as_transformers_does() -> None:
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = ChatTokenizer.from_folder(folder)
    requests = (
        "The capital of France is",
        "1, 2, 3, 4,",
        "Once upon a time there was a little",
        "def fibonacci(n):\n    ",
    )
    prompts = [tuple(tokenizer.encode(text, is_start=True)) for text in requests]
    network = load_network(folder, torch.float32)
    expected = [stock_answer(network, prompt, 12) for prompt in prompts]
    model = wrap_model(network, torch.float32)
    outputs = answers(
        model, [GenerationRequest(prompt, 12) for prompt in prompts], tokenizer.decode, batch_size=3
    )
    assert [answer.tokens for answer in outputs] == expected
    assert outputs[0].text.startswith(" Paris")
