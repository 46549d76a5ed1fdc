"""Ollama's Modelfile: the chat template once more, in Go's language, with the system message and
the stop texts.

    choose(run, conversations) -> Served;  written(served, ...) -> text;  parsed(text) -> Served

Ollama does not run the Jinja template inside a GGUF. `FAMILIES` holds what models commonly use, in
Go; one is taken only if it gives the same tokens as the model's own template, on the run's prompts
and on made-up conversations. They use the least of Go: a loop over the messages, role and content.
Left out: tools."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer

TURNS_BEGIN, TURNS_END = "{{ range .Messages }}", "{{ end }}"
TEMPLATE_FIELD = re.compile(r"\{\{ \.(Role|Content) \}\}")
QUOTES = '"""'  # around texts of several lines; nothing escapes them
SYSTEM_MARKER = "\N{BLACK STAR}system\N{BLACK STAR}"
HELLO_MESSAGE: Json = {"role": "user", "content": "Hello, what is 12 + 30?"}
SAMPLE_CONVERSATIONS: tuple[tuple[Json, ...], ...] = (
    (HELLO_MESSAGE,),
    ({"role": "system", "content": "Answer in one word."}, HELLO_MESSAGE),
    (
        HELLO_MESSAGE,
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Sure?\n  Think again."},
    ),
)
MODELFILE_HINT = "export to gguf, and write the Modelfile by hand"


@dataclass(frozen=True)
class OllamaTemplate:
    """How Ollama makes a prompt of messages, and where an answer stops."""

    template: str
    system: str
    stops: tuple[str, ...]

    def render_prompt(self, messages: Sequence[Json]) -> str:
        """The text of a chat request; `system` goes first if the request brings no other."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        before, _, rest = self.template.partition(TURNS_BEGIN)
        turn, _, after = rest.partition(TURNS_END)
        turns = (
            TEMPLATE_FIELD.sub(lambda field, message=message: message[field[1].lower()], turn)
            for message in messages
        )
        return before + "".join(turns) + after


def choose_template(
    tokenizer_path: Path, renderer: Renderer, conversations: Sequence[Sequence[Json]]
) -> OllamaTemplate:
    """The family that renders as the model's own template does. InputError if none does."""
    for messages in conversations:
        if any(
            turn["role"] == "tool" or turn.get("tool_calls") or not isinstance(turn["content"], str)
            for turn in messages
        ):
            raise InputError(
                "the rows call tools, which the templates for Ollama leave out", fix=MODELFILE_HINT
            )
    stops = tuple(renderer.decode([end]) for end in renderer.end_ids)
    shared_system = _find_shared_system(conversations)
    for template in TEMPLATES.values():
        ollama_template = OllamaTemplate(
            template, shared_system or _find_default_system(template, renderer), stops
        )
        test_conversations = [*conversations, *SAMPLE_CONVERSATIONS]
        if all(
            encode_prompt(ollama_template.render_prompt(conversation), tokenizer_path, renderer)
            == _render_reference(renderer, shared_system, conversation)
            for conversation in test_conversations
        ):
            return ollama_template
    message = f"none of the templates for Ollama ({', '.join(TEMPLATES)}) renders as this model's chat template"
    raise InputError(message, where="template", fix=MODELFILE_HINT)


def encode_prompt(text: str, tokenizer_path: Path, renderer: Renderer) -> tuple[int, ...]:
    """Ollama encodes the whole text, control tokens in it included, behind a first token where the
    model has one."""
    return (
        *renderer.tokenizer.bos_ids,
        *Tokenizer.from_file(str(tokenizer_path)).encode(text, add_special_tokens=False).ids,
    )


def _render_reference(renderer: Renderer, system: str, messages: Sequence[Json]) -> tuple[int, ...]:
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return renderer.encode_prompt(messages)


def _find_shared_system(conversations: Sequence[Sequence[Json]]) -> str:
    """The system message, if all conversations begin with the same one."""
    systems = {
        messages[0]["content"] if messages[0]["role"] == "system" else ""
        for messages in conversations
    }
    return systems.pop() if len(systems) == 1 else ""


def _find_default_system(template: str, renderer: Renderer) -> str:
    """The system message that the model's own template writes when it is given none."""
    before, _, after = (
        OllamaTemplate(template, SYSTEM_MARKER, ())
        .render_prompt([HELLO_MESSAGE])
        .partition(SYSTEM_MARKER)
    )
    rendered = renderer.decode(
        renderer.encode_prompt([HELLO_MESSAGE])[len(renderer.tokenizer.bos_ids) :]
    )
    is_match = (
        rendered.startswith(before)
        and rendered.endswith(after)
        and len(rendered) >= len(before) + len(after)
    )
    return rendered[len(before) : len(rendered) - len(after)] if is_match else ""


# ---------------------------------------------------------------- the file


def render_modelfile(ollama_template: OllamaTemplate, model: str, comment: str) -> str:
    """The Modelfile. InputError for texts that its quotes cannot hold."""
    for text in (ollama_template.template, ollama_template.system):
        if QUOTES in text or text.endswith('"'):
            raise InputError(
                f"a Modelfile cannot hold a system message with {QUOTES}",
                where="system",
                fix=MODELFILE_HINT,
            )
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"FROM ./{model}", f"TEMPLATE {QUOTES}{ollama_template.template}{QUOTES}"]
    lines += [f"SYSTEM {QUOTES}{ollama_template.system}{QUOTES}"] if ollama_template.system else []
    return (
        "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in ollama_template.stops)]) + "\n"
    )


def parse_modelfile(text: str) -> OllamaTemplate:
    """What `written` wrote."""
    matches = {
        name: re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
        for name in ("TEMPLATE", "SYSTEM")
    }
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    template, system = (match[1] if match else "" for match in matches.values())
    return OllamaTemplate(template, system, tuple(stops))


TEMPLATES = {
    "ChatML": f"{TURNS_BEGIN}<|im_start|>{{{{ .Role }}}}\n{{{{ .Content }}}}<|im_end|>\n{TURNS_END}<|im_start|>assistant\n",
    "Llama 3": (
        f"{TURNS_BEGIN}<|start_header_id|>{{{{ .Role }}}}<|end_header_id|>\n\n{{{{ .Content }}}}<|eot_id|>{TURNS_END}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
