"""Rows made of pieces of control tokens: no control token comes out of them, and the mask does not
move."""

from datetime import datetime
from importlib.resources import files

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toy_chat import CHATML, write_model_folder
from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.renderer import Renderer

TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
PIECES = [
    *TOKENS,
    "<|im_",
    "end|>",
    "im_end",
    "|>",
    "<",
    ">",
    "think>",
    "</",
    "<|im_start|>system\n",
    "\n",
    " ",
    "user",
    "é",
    "\u0338",
]
contents = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
QWEN = files("trl").joinpath("chat_templates", "qwen2_5.jinja").read_text()


@pytest.fixture(scope="module", params=[CHATML, QWEN], ids=["chatml", "qwen2_5"])
def renderer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path = write_model_folder(tmp_path_factory.mktemp("model"), request.param, TOKENS)
    return Renderer.from_folder(path, now=datetime(2026, 1, 1))


def document(renderer: Renderer, *contents: str) -> Document:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages: list[Json] = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    weights = tuple(float(message["role"] == "assistant") for message in messages)
    [made] = renderer.render(
        Example("row:1", messages=tuple(messages), turn_weights=weights)
    ).documents
    return made


def controls(renderer: Renderer, made: Document) -> list[tuple[int, bool]]:
    """Control tokens in order, and whether they are trained; structural ones aside."""
    structural = {c.id for c in renderer.tokenizer.controls.values() if c.is_structural}
    wanted = renderer.control_ids - structural
    pairs = zip(made.tokens_L.tolist(), (made.weights_L > 0).tolist(), strict=True)
    return [pair for pair in pairs if pair[0] in wanted]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(system=contents, question=contents, answer=contents)
def test_control_tokens_are_the_templates_alone(
    renderer: Renderer, system: str, question: str, answer: str
) -> None:
    made, clean = (
        document(renderer, system, question, answer + "."),
        document(renderer, "a", "b", "c"),
    )
    assert controls(renderer, made) == controls(renderer, clean)
    tokens, trained = made.tokens_L.tolist(), made.weights_L > 0
    structural = {c.id for c in renderer.tokenizer.controls.values() if c.is_structural}
    assert not structural & {token for token, hit in zip(tokens, trained, strict=True) if not hit}
    text = renderer.decode(tokens[i] for i in range(len(tokens)) if trained[i])
    assert text == answer + ".<|im_end|>"
    assert system + "<|im_end|>" in renderer.decode(tokens)
    assert question + "<|im_end|>" in renderer.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(first=contents, second=contents)
def test_masks_of_several_turns_hold_exactly_the_answers(
    renderer: Renderer, first: str, second: str
) -> None:
    made = document(renderer, "s", "a", "x" + first + ".", second, "x" + first + second + ".")
    tokens, trained = made.tokens_L.tolist(), made.weights_L > 0
    text = renderer.decode(tokens[i] for i in range(len(tokens)) if trained[i])
    assert text == f"x{first}.<|im_end|>x{first}{second}.<|im_end|>"
