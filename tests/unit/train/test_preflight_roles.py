"""Preflight of `train_on`: masks of other text than the recipe asks for are refused."""

import dataclasses
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tiny_recipe_runs import Lab
from toy_chat import assistant, make_example, make_tool_call, user, write_model_folder
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.assistant_spans import weigh_messages
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.session.preflight_probe import PreflightSamples, RoleMask, Subject, build_role_mask
from tunesmith.train.preflight_tokens import (
    check_eos_supervised,
    check_role_masks,
    swap_role_masks,
)

EXAMPLE = make_example(
    {"role": "system", "content": "you are a helpful assistant"},
    user("the user asks the assistant"),
    assistant("the assistant answers the user"),
)
Corruption = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.from_folder(write_model_folder(tmp_path), now=datetime(2026, 3, 4))


def make_subject(*masks: RoleMask, documents: tuple[Document, ...] = ()) -> Subject:
    samples = PreflightSamples(documents, (), frozenset(), role_masks=masks)
    return Subject(cast("Any", None), samples)


def build_mask(
    renderer: Renderer, train_on: Any, corrupt: Corruption, example: Example = EXAMPLE
) -> RoleMask:
    documents = [
        dataclasses.replace(document, weights_L=corrupt(document.weights_L))
        for document in renderer.train_on(train_on).render(example).documents
    ]
    weights = weigh_messages(example, train_on)
    return build_role_mask(example, documents, weights, renderer, trains_all=train_on == "all")


def keep(weights_L: np.ndarray) -> np.ndarray:
    return weights_L


def drop_half(weights_L: np.ndarray) -> np.ndarray:
    targets = np.flatnonzero(weights_L)
    dropped_L = weights_L.copy()
    dropped_L[targets[: len(targets) // 2]] = 0
    return dropped_L


def train_everything(weights_L: np.ndarray) -> np.ndarray:
    return np.ones_like(weights_L)


def drop_last(weights_L: np.ndarray) -> np.ndarray:
    dropped_L = weights_L.copy()
    dropped_L[np.flatnonzero(weights_L)[-1]] = 0
    return dropped_L


@pytest.mark.parametrize("train_on", ["all", ("user",), ("system", "assistant")])
def test_masks_of_the_renderer_pass_and_others_do_not(renderer: Renderer, train_on: Any) -> None:
    result = check_role_masks(make_subject(build_mask(renderer, train_on, keep)))
    assert result.level == "ok"
    assert "3 messages" in result.evidence
    swapped = swap_role_masks(make_subject(build_mask(renderer, train_on, keep)))
    with pytest.raises(GateError, match="a trained message is not a target"):
        check_role_masks(swapped)
    with pytest.raises(GateError, match=r"not a target|not targets"):
        check_role_masks(make_subject(build_mask(renderer, train_on, drop_half)))


QUESTION = "weather in Paris tomorrow"
TOOL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content']|replace('**', '') if m['role'] == 'assistant' else m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUOTES: dict[str, tuple[Json, ...]] = {
    "tool call": (
        user(QUESTION),
        assistant("", tool_calls=[make_tool_call(query=QUESTION)]),
    ),
    "nested arguments": (
        user('{"city": "Paris", "days": [1, 2], "metric": true}'),
        assistant("", tool_calls=[make_tool_call(city="Paris", days=[1, 2], metric=True)]),
    ),
    "reasoning": (user(QUESTION), assistant("rain", reasoning_content=f"they ask: {QUESTION}")),
    "altered answer": (user(QUESTION), assistant(f"you asked **for** the {QUESTION}, it rains")),
    "case": (user("the capital of France"), assistant("**It** is the capital of France")),
    "altered answer in the question": (user("is **this** it"), assistant("**this**")),
    "tool result": (
        user("which day"),
        assistant("", tool_calls=[make_tool_call(day="Friday the 13th")]),
        {"role": "tool", "content": "Friday the 13th"},
        assistant("it is a Friday"),
    ),
}


@pytest.mark.parametrize("name", QUOTES)
def test_answers_that_quote_untrained_messages_pass(name: str, tmp_path: Path) -> None:
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, TOOL_TEMPLATE), now=datetime(2026, 3, 4)
    )
    example = make_example(*QUOTES[name])
    mask = build_mask(renderer, ("assistant",), keep, example)
    check_role_masks(make_subject(mask))
    assert mask.skipped >= 1
    evidence = check_role_masks(make_subject(mask, build_mask(renderer, "all", keep))).evidence
    assert f"{mask.skipped} cannot be compared" in evidence


def test_rows_with_tool_calls_are_still_compared(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, TOOL_TEMPLATE), now=datetime(2026, 3, 4)
    )
    call = assistant("", tool_calls=[make_tool_call(query="Paris")])
    example = make_example(user(QUESTION), call, user("and the day after?"), assistant("it rains"))
    mask = build_mask(renderer, ("assistant",), keep, example)
    assert check_role_masks(make_subject(mask)).level == "ok"
    assert mask.untrained == ("weatherinParistomorrow", "andthedayafter?")
    leaked = build_mask(renderer, ("assistant",), train_everything, example)
    with pytest.raises(GateError, match="an untrained message is a target"):
        check_role_masks(make_subject(leaked))


def test_text_of_other_roles_is_refused(renderer: Renderer) -> None:
    mask = build_mask(renderer, ("user",), train_everything)
    with pytest.raises(GateError, match="an untrained message is a target"):
        check_role_masks(make_subject(mask))


def test_a_single_missing_target_is_refused_if_all_is_trained(renderer: Renderer) -> None:
    with pytest.raises(GateError, match="1 tokens are not targets"):
        check_role_masks(make_subject(build_mask(renderer, "all", drop_last)))


def test_nothing_to_compare_is_a_warning() -> None:
    assert check_role_masks(make_subject()).level == "warn"


def test_the_end_of_an_answer_may_be_followed_by_trained_text(renderer: Renderer) -> None:
    (document,) = renderer.train_on("all").render(EXAMPLE).documents
    subject = make_subject(documents=(document,)).with_samples(end_ids=frozenset(renderer.end_ids))
    assert check_eos_supervised(subject).level == "ok"
    with pytest.raises(GateError, match="not an end token"):
        check_eos_supervised(subject.with_samples(role_masks=None))
    with pytest.raises(GateError, match="not an end token"):
        check_eos_supervised(subject.with_samples(end_ids=frozenset({-1})))


def test_a_run_says_what_it_checked(tiny_folder: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_folder, tmp_path)
    checks = {e.kind: e for e in lab.events(train_on="user") if isinstance(e, CheckResult)}
    assert checks["trained roles"].level == "ok"
    assert checks["EOS is supervised"].level == "warn"
    assert "targets where none are trained" in checks["negative controls"].evidence
    checks = {e.kind: e for e in lab.events(train_on="all") if isinstance(e, CheckResult)}
    assert checks["EOS is supervised"].level == checks["trained roles"].level == "ok"
    checks = {e.kind: e for e in lab.events() if isinstance(e, CheckResult)}
    assert "trained roles" not in checks
