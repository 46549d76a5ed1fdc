"""Multiple choice by likelihood, and the loss of answers by byte: against the likelihoods
themselves."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Row
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.formats.parse import parse_row
from tunesmith.evaluate.loglikelihood import compute_nll, measure_loss, to_bits_per_byte
from tunesmith.evaluate.multiple_choice import build_choices, measure_multiple_choice
from tunesmith.model.causal_lm import PackedCausalLM


def requests(row: int, answer: str, *choices: str) -> Example:
    messages = [
        {"role": "user", "content": f"is {row} even?"},
        {"role": "assistant", "content": answer},
    ]
    return parse_row(
        Row(f"test:{row}", {"messages": messages, "choices": list(choices)}), "messages", True
    )


def output(renderer: Renderer, documents: tuple[Document, ...]) -> list[str]:
    return [renderer.decode(item.tokens_L[item.weights_L > 0].tolist()) for item in documents]


def test_a_choice_is_rendered_as_the_answer_would_be(renderer: Renderer) -> None:
    example = requests(2, "yes", "yes", "no", "maybe")
    (documents,) = build_choices([example], renderer).values()
    assert output(renderer, documents) == ["yes<|end|>", "no<|end|>", "maybe<|end|>"]
    (as_trained,) = renderer.render(example).documents
    assert documents[0].tokens_L.tolist() == as_trained.tokens_L.tolist()
    assert documents[0].weights_L.tolist() == as_trained.weights_L.tolist()


def test_only_the_last_trained_turn_is_chosen(renderer: Renderer) -> None:
    turns = ("q", "a", "2?", "yes", "thanks", "bye")
    messages = tuple(
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    )
    example = Example("test:1", messages, (0, 1, 0, 1, 0, 0), choices=("yes", "no"))
    (documents,) = build_choices([example], renderer).values()
    assert [renderer.decode(item.tokens_L[item.weights_L > 0].tolist()) for item in documents] == [
        "yes<|end|>",
        "no<|end|>",
    ]
    plain = Example("test:2", text=" yes", prompt="2?", choices=(" yes", " no"))
    (documents,) = build_choices([plain], renderer).values()
    assert [renderer.decode(item.tokens_L.tolist()) for item in documents] == [
        "2? yes<|end|>",
        "2? no<|end|>",
    ]


def test_the_likeliest_choice_counts(model: PackedCausalLM, renderer: Renderer) -> None:
    examples = [requests(n, "yes", "yes", "no", "maybe") for n in range(6)]
    choices = build_choices(examples, renderer)
    result = measure_multiple_choice(model, choices, task="test", pack_length=100)
    assert result == measure_multiple_choice(
        model, choices, task="test", pack_length=1000, share=True
    )
    documents = [item for row in choices.values() for item in row]
    nats = {i: nat for i, nat, _ in compute_nll(model, documents, 1000)}
    assert result.ids == tuple(f"test:{n}" for n in range(6))
    assert result.values == tuple(
        float(min(range(3), key=lambda k: nats[3 * n + k]) == 0) for n in range(6)
    )
    best = [("yes", "no", "maybe")[min(range(3), key=lambda k: nats[3 * n + k])] for n in range(6)]
    right = build_choices([requests(n, best[n], "yes", "no", "maybe") for n in range(6)], renderer)
    assert measure_multiple_choice(model, right, task="test", pack_length=100).values == (1.0,) * 6


def test_without_choices_the_answers_of_all_rows_are_labels(renderer: Renderer) -> None:
    choices = build_choices([requests(n, ("no", "yes")[n % 2]) for n in range(6)], renderer)
    assert {len(row) for row in choices.values()} == {2}
    assert output(renderer, choices["test:0"]) == ["no<|end|>", "yes<|end|>"]
    assert output(renderer, choices["test:1"]) == ["yes<|end|>", "no<|end|>"]


def test_labels_of_training_rows_are_the_choices(renderer: Renderer) -> None:
    labels = {"no": 3, "yes": 2, "maybe": 2}
    rows = [requests(0, "yes"), requests(1, "unseen")]
    choices = build_choices(rows, renderer, labels)
    assert output(renderer, choices["test:0"]) == ["yes<|end|>", "no<|end|>", "maybe<|end|>"]
    assert len(choices["test:1"]) == 4, "its own answer and the labels"
    spaced = Example("test:2", text=" yes", prompt="2?")
    (documents,) = build_choices([spaced], renderer, labels).values()
    assert [renderer.decode(each.tokens_L.tolist()) for each in documents] == [
        *("2? yes<|end|>", "2? no<|end|>", "2? maybe<|end|>")
    ]
    many = [requests(n, ("no", "yes")[n % 2]) for n in range(2_100)]
    assert len(build_choices(many, renderer)) == 2_000, "rows and labels are at most 4,000"


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([requests(1, "yes"), requests(2, "yes")], "1 distinct answer cannot be labels"),
        ([requests(n, f"answer {n}") for n in range(60)], "60 distinct answers cannot be labels"),
        (
            [requests(1, "yes", "no", "maybe")],
            "test:1: the expected answer 'yes' is not among the row's `choices`",
        ),
        ([requests(1, "yes", "yes", "yes ")], "test:1: the row's `choices` are all the same"),
    ],
    ids=["one label", "too many", "not offered", "no other"],
)
def test_rows_that_offer_nothing_to_choose_are_refused(
    renderer: Renderer, examples, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_choices(examples, renderer)


def test_the_loss_of_an_answer_by_byte(model: PackedCausalLM, renderer: Renderer) -> None:
    examples = [requests(n, text) for n, text in enumerate(("yes", "Grüße", "a longer answer"))]
    documents = [item for example in examples for item in renderer.render(example).documents]
    bad = dataclasses.replace(documents[0], side="banned")
    loss = measure_loss(model, documents, task="test", pack_length=100)
    result = to_bits_per_byte(loss, [*documents, bad], renderer)
    assert (result.metric, result.ids, result.higher_is_better) == (
        "bits_per_byte",
        loss.ids,
        False,
    )
    assert result.weights == (3.0, 7.0, 15.0), "bytes, without the end token"
    nats = {i: nat for i, nat, _ in compute_nll(model, documents, 100)}
    assert result.values == pytest.approx(
        [nats[i] / math.log(2) / result.weights[i] for i in range(3)]
    )
