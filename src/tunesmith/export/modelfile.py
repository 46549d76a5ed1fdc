"""Ollama's Modelfile: the chat template once more, in Go's language, with the system message and the stop texts.

    choose(run, conversations) -> Served;  written(served, ...) -> text;  parsed(text) -> Served

Ollama does not run the Jinja template inside a GGUF. `FAMILIES` holds what models commonly use, in Go; one is taken
only if it gives the same tokens as the model's own template, on the run's prompts and on made-up conversations. They
use the least of Go: a loop over the messages, role and content. Left out: tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer

BEGIN, END = "{{ range .Messages }}", "{{ end }}"
FIELD = re.compile(r"\{\{ \.(Role|Content) \}\}")
QUOTES = '"""'  # around texts of several lines; nothing escapes them
MARK = "\N{BLACK STAR}system\N{BLACK STAR}"
HELLO: Json = {"role": "user", "content": "Hello, what is 12 + 30?"}
SAMPLES: tuple[tuple[Json, ...], ...] = (
    (HELLO,),
    ({"role": "system", "content": "Answer in one word."}, HELLO),
    (HELLO, {"role": "assistant", "content": "42"}, {"role": "user", "content": "Sure?\n  Think again."}),
)
INSTEAD = "export to gguf, and write the Modelfile by hand"


@dataclass(frozen=True)
class Served:
    """How Ollama makes a prompt of messages, and where an answer stops."""

    template: str
    system: str
    stops: tuple[str, ...]

    def prompt(self, messages: Sequence[Json]) -> str:
        """The text of a chat request; `system` goes first if the request brings no other."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        before, _, rest = self.template.partition(BEGIN)
        turn, _, after = rest.partition(END)
        turns = (FIELD.sub(lambda field, message=message: message[field[1].lower()], turn) for message in messages)
        return before + "".join(turns) + after


def choose(tokenizer: Path, renderer: Renderer, conversations: Sequence[Sequence[Json]]) -> Served:
    """The family that renders as the model's own template does. InputError if none does."""
    for messages in conversations:
        if any(m["role"] == "tool" or m.get("tool_calls") or not isinstance(m["content"], str) for m in messages):
            raise InputError("the rows call tools, which the templates for Ollama leave out", fix=INSTEAD)
    stops = tuple(renderer.decode([end]) for end in renderer.end_ids)
    own = _shared_system(conversations)
    for template in FAMILIES.values():
        served = Served(template, own or _default_system(template, renderer), stops)
        asked = [*conversations, *SAMPLES]
        if all(tokens_of(served.prompt(m), tokenizer, renderer) == _ours(renderer, own, m) for m in asked):
            return served
    what = f"none of the templates for Ollama ({', '.join(FAMILIES)}) renders as this model's chat template"
    raise InputError(what, where="template", fix=INSTEAD)


def tokens_of(text: str, tokenizer: Path, renderer: Renderer) -> tuple[int, ...]:
    """Ollama encodes the whole text, control tokens in it included, behind a first token where the model has one."""
    return (*renderer.tokenizer.bos, *Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids)


def _ours(renderer: Renderer, system: str, messages: Sequence[Json]) -> tuple[int, ...]:
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return renderer.prompt(messages)


def _shared_system(conversations: Sequence[Sequence[Json]]) -> str:
    """The system message, if all conversations begin with the same one."""
    found = {messages[0]["content"] if messages[0]["role"] == "system" else "" for messages in conversations}
    return found.pop() if len(found) == 1 else ""


def _default_system(template: str, renderer: Renderer) -> str:
    """The system message that the model's own template writes when it is given none."""
    before, _, after = Served(template, MARK, ()).prompt([HELLO]).partition(MARK)
    ours = renderer.decode(renderer.prompt([HELLO])[len(renderer.tokenizer.bos) :])
    fits = ours.startswith(before) and ours.endswith(after) and len(ours) >= len(before) + len(after)
    return ours[len(before) : len(ours) - len(after)] if fits else ""


# ---------------------------------------------------------------- the file


def written(served: Served, model: str, about: str) -> str:
    """The Modelfile. InputError for texts that its quotes cannot hold."""
    for text in (served.template, served.system):
        if QUOTES in text or text.endswith('"'):
            raise InputError(f"a Modelfile cannot hold a system message with {QUOTES}", where="system", fix=INSTEAD)
    lines = [f"# {line}" for line in about.splitlines()]
    lines += [f"FROM ./{model}", f"TEMPLATE {QUOTES}{served.template}{QUOTES}"]
    lines += [f"SYSTEM {QUOTES}{served.system}{QUOTES}"] if served.system else []
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in served.stops)]) + "\n"


def parsed(text: str) -> Served:
    """What `written` wrote."""
    found = {
        name: re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE) for name in ("TEMPLATE", "SYSTEM")
    }
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    template, system = (match[1] if match else "" for match in found.values())
    return Served(template, system, tuple(stops))


FAMILIES = {
    "ChatML": f"{BEGIN}<|im_start|>{{{{ .Role }}}}\n{{{{ .Content }}}}<|im_end|>\n{END}<|im_start|>assistant\n",
    "Llama 3": (
        f"{BEGIN}<|start_header_id|>{{{{ .Role }}}}<|end_header_id|>\n\n{{{{ .Content }}}}<|eot_id|>{END}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
