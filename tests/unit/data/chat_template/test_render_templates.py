"""Every chat template that trl ships, beside transformers: text, ids, and spans from an oracle
without origins."""

import re
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from toy_chat import write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.assistant_spans import find_assistant_spans, find_spans_in_full
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.render_notes import END_TOKEN_APPENDED
from tunesmith.data.chat_template.renderer import Renderer

FOLDER = files("trl").joinpath("chat_templates")
TEMPLATES = {
    path.name[:-6]: path.read_text() for path in FOLDER.iterdir() if path.name.endswith(".jinja")
}
TOKENS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<\|\w+>|<\w+\|>|<\|\"\|>|\[gMASK\]|<sop>|</s>|<(?:start|end)_of_\w+>"
    r"|</?(?:think|tool_call|tool_response|arg_key|arg_value)>"
)
PARTS = ("idefics3", "llava_next", "smolvlm")

# The token that ends an answer, and one that calls a tool if that differs; read in the templates by
# hand.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|> <|tool_response>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|> <|tool_response>",
    "gemma4_v2": "<turn|>",
    "glm4moe_training": "<|user|> <|observation|>",
    "gptoss": "<|return|> <|call|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
FORCED_THINKING = "prompts for an answer with"
NO_CALLS = r"does not write message 3|does not write the tool calls"
# What is refused though transformers renders it: thinking that the template drops, or that follows
# an empty block of it in the prompt.
REFUSED = {
    "deepseek_r1_distill": ("thinking thinking_in_text tools", f"{FORCED_THINKING}|{NO_CALLS}"),
    "deepseek_r1_distill_training": ("thinking tools", f"{FORCED_THINKING}|{NO_CALLS}"),
    "deepseekv3": ("thinking thinking_in_text", FORCED_THINKING),
    "deepseekv3_training": ("thinking thinking_in_text", FORCED_THINKING),
    "qwen3_5_nothink": ("thinking thinking_in_text", FORCED_THINKING),
    "qwen3_5_nothink_training": ("thinking thinking_in_text", FORCED_THINKING),
} | {
    name: ("tools", NO_CALLS)
    for name in TEMPLATES
    if re.fullmatch(r"(idefics3|smolvlm|lfm2|llama3|phi3|phi3_5|qwen2_5_vl)(_training)?", name)
}  # fmt: skip


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more}


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 3}},
}
TEXT_CALL = {
    **CALL,
    "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": 3}'},
}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city <b>"}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS: dict[str, list[Json]] = {
    "with_system": [
        {"role": "system", "content": "Be brief."}, user("Hi there"), assistant("Hello!"),
    ],
    "plain": [user("Hi there"), assistant("Hello!")],
    "turns": [
        user("one"), assistant("eins"), user("two"), assistant("zwei"),
        user("three"), assistant("drei"),
    ],
    "spaces": [
        user("  lead and trail \n"), assistant("trail  \n\n"), user("\n\nx"), assistant("y \t"),
    ],
    "tools": [
        {"role": "system", "content": "Use tools."},
        user("Weather in Rome?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": '{"t": 21}'},
        assistant("It is 21 degrees."),
    ],
    "thinking": [
        user("2+2?"), assistant("4", reasoning_content="Two and two."),
        user("3+3?"), assistant("6", reasoning_content="Three and three."),
    ],
    "thinking_in_text": [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\n4")],
    "empty_system": [{"role": "system", "content": ""}, user("Hi"), assistant("Hello")],
    "unicode": [user("Grüße 🤗 日本語 e\u0301 \u200d"), assistant("👩‍👩‍👧 ok ﷺ 한국어")],
    "question_last": [user("a"), assistant("b"), user("c")],
}  # fmt: skip


class Oracle:
    """transformers' renders of one conversation; spans are cut out of them by text alone."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, name: str, messages: list[Json], tools: list[Json]
    ) -> None:
        self.tokenizer, self.tools, self.ends = tokenizer, tools, _ends(name)
        self.messages = messages
        if name.startswith(PARTS):
            self.messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        if name == "deepseekv3":  # it writes arguments that are text
            self.messages = [
                {**m, "tool_calls": [TEXT_CALL]} if m.get("tool_calls") else m for m in messages
            ]
        self.trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    def text(self, count: int, *, prompt: bool = False) -> str:
        return self._apply(count, tokenize=False, add_generation_prompt=prompt)

    def ids(self, count: int) -> list[int]:
        return self._apply(count, tokenize=True)["input_ids"]

    def _apply(self, count: int, **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            self.messages[:count], tools=self.tools or None, **more
        )

    def served_text(self, turn: int) -> str:
        """The prompt as it is served, and what the template writes from where it leaves it."""
        prompt, text = self.text(turn, prompt=True), self.text(turn + 1)
        end = next(
            (i for i, pair in enumerate(zip(prompt, text, strict=False)) if len(set(pair)) > 1),
            len(prompt),
        )
        shared = re.sub(r"<[^<>]*$", "", prompt[:end])
        return prompt + text[len(shared) :]

    def served_ids(self, turn: int) -> list[int]:
        return self.tokenizer(self.served_text(turn), add_special_tokens=False)["input_ids"]

    def answer(self, turn: int) -> str:
        """From the end of the prompt through the last end token; to the end of the text if there is
        none."""
        answer = self.served_text(turn).removeprefix(self.text(turn, prompt=True))
        end = self.ends[-1] if "tool_calls" in self.messages[turn] else self.ends[0]
        return answer[: answer.rindex(end) + len(end)] if end else answer


def _ends(name: str) -> list[str]:
    prefix = max((prefix for prefix in ENDS if name.startswith(prefix)), key=len, default="")
    return ENDS[prefix].split() if prefix else [""]


def refusal(name: str, conversation: str) -> str:
    which, why = REFUSED.get(name, ("", ""))
    words = which.split()
    return (
        why if conversation in words or ("*" in words and f"-{conversation}" not in words) else ""
    )


def spans(renderer: Renderer, document: Document) -> list[tuple[str, str]]:
    """(text before, trained text) of each trained run."""
    tokens, trained = document.tokens_L.tolist(), [False, *(document.weights_L > 0).tolist(), False]
    starts = [i for i in range(len(tokens)) if trained[i + 1] and not trained[i]]
    ends = [i for i in range(1, len(tokens) + 1) if trained[i] and not trained[i + 1]]
    return [
        (renderer.decode(tokens[:a]), renderer.decode(tokens[a:b]))
        for a, b in zip(starts, ends, strict=True)
    ]


def check(
    renderer: Renderer, oracle: Oracle, documents: tuple[Document, ...], appended: bool
) -> None:
    end = "</s>" if appended else ""
    trained = oracle.trained
    ids = [document.tokens_L.tolist()[: -1 if appended else None] for document in documents]
    is_full_render = (
        not appended and len(documents) == 1 and ids[0] == oracle.ids(len(oracle.messages))
    )
    if not is_full_render:
        assert ids == [oracle.served_ids(turn) for turn in trained], "ids"
    trained_spans = [span for document in documents for span in spans(renderer, document)]
    assert trained_spans == [
        (oracle.text(turn, prompt=True), oracle.answer(turn) + end) for turn in trained
    ]


def write_model(folder: Path, source: str) -> Path:
    tokens = sorted({*TOKENS.findall(source), "<s>", "</s>"})
    return write_model_folder(folder, source, tokens, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_text_ids_and_spans(name: str, tmp_path: Path) -> None:
    source = TEMPLATES[name]
    path = write_model(tmp_path, source)
    renderer = Renderer.from_folder(path, now=datetime.now())
    full = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=source,
    )
    report = {}
    for conversation, messages in CONVERSATIONS.items():
        tools = [TOOL] if conversation == "tools" else []
        oracle = Oracle(full, name, messages, tools)
        report[conversation] = outcome(
            renderer, oracle, messages, tools, refusal(name, conversation)
        )
    table = "\n".join(f"  {conversation:18} {result}" for conversation, result in report.items())
    assert all(result.startswith("ok") for result in report.values()), f"{name}\n{table}"


def outcome(
    renderer: Renderer, oracle: Oracle, messages: list[Json], tools: list[Json], expected: str
) -> str:
    weights = tuple(float(message["role"] == "assistant") for message in messages)
    example = Example("row:1", messages=tuple(messages), turn_weights=weights, tools=tuple(tools))
    try:
        rendered = renderer.render(example)
    except InputError as error:
        if re.search(expected, error.message) if expected else _raises(oracle):
            return f"ok, refused: {error.message}"
        return f"REFUSED: {error}"
    if expected:
        return "RENDERED, but should be refused"
    try:
        check(renderer, oracle, rendered.documents, END_TOKEN_APPENDED in rendered.notes)
    except AssertionError as error:
        return f"DIFFERS: {error}"
    return f"ok, {len(rendered.documents)} documents"


def _raises(oracle: Oracle) -> bool:
    try:
        oracle.text(len(oracle.messages))
    except (TemplateError, TypeError, KeyError):
        return True
    return False


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_spans_in_the_full_render_are_those_of_each_turn(name: str, tmp_path: Path) -> None:
    renderer = Renderer.from_folder(write_model(tmp_path, TEMPLATES[name]), now=datetime.now())
    num_found = 0
    for conversation, messages in CONVERSATIONS.items():
        if refusal(name, conversation):
            continue
        tools = [TOOL] if conversation == "tools" else []
        try:
            chat, protocol = renderer._make_conversation(messages, tools)
            rendered = chat.render(len(messages))
        except InputError:
            continue
        full_text = TrackedText(rendered, renderer.tokenizer, chat.assistant_indices)
        weights = [float(message["role"] == "assistant") for message in messages]
        end_ids = (protocol.end_ids, renderer.end_ids)
        in_full = find_spans_in_full(chat, full_text, weights, end_ids)
        if in_full is None:
            continue
        each = find_assistant_spans(chat, renderer.tokenizer, weights, end_ids)
        num_found += 1
        for span, expected in zip(in_full, each, strict=True):
            assert replace(span, text=expected.text) == expected
            assert full_text.plain.startswith(expected.text.plain)
    assert num_found or re.match("deepseek|nemotron|glm4moe$", name)


@pytest.mark.parametrize(
    "name", ["nemotron_3_nano", "nemotron_3_ultra", "qwen3", "qwen3_5_think", "glm4moe"]
)
def test_thinking_is_switched_off_in_prompts_and_answers_alike(name: str, tmp_path: Path) -> None:
    source, off = TEMPLATES[name], {"enable_thinking": False}
    tokens = sorted({*TOKENS.findall(source), "<s>", "</s>"})
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, source, tokens, eos_token="</s>"),
        now=datetime.now(),
        variables=off,
    )
    turns = [user("2+2?"), assistant("4")]
    document = renderer.render(
        Example("row:1", messages=tuple(turns), turn_weights=(0.0, 1.0))
    ).documents[0]
    [(before, trained)] = spans(renderer, document)
    assert before == renderer.decode(renderer.encode_prompt(turns[:1]))
    assert "<think>" in before
    assert trained.strip().startswith("4")


def test_most_templates_render_most_conversations() -> None:
    originals = [name for name in TEMPLATES if not name.endswith("_training")]
    refused = {name for name in originals if refusal(name, "plain")}
    assert len(originals) - len(refused) >= 30
