"""Export for Ollama: a folder with a GGUF and a Modelfile for `ollama create NAME -f Modelfile`.

In: an ExportJob. Out: the folder. Prompts are rendered back by the Modelfile's own template, the
weights are read back from the GGUF.

Ollama does not run the Jinja template of a GGUF. TEMPLATES holds common chat templates in Go; one
is used only if it gives the same tokens as the model's own template, on the run's prompts and on
the sample conversations that it accepts. The Go templates need a loop over the messages, role and
content only.
Left out: tool calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.export.gguf import get_model_path, reload_gguf, write_gguf
from tunesmith.export.parity import ExportJob, ReloadedExport

MIN_OLLAMA_VERSION = "0.17.1"  # older ones read GGUF files out of bounds (CVE-2026-7482)
MODELFILE_NAME = "Modelfile"
MODELFILE_HINT = "export to gguf, and write the Modelfile yourself"

# A template is PREFIX, one TURN per message, and SUFFIX.
RANGE_START = "{{ range .Messages }}"
RANGE_END = "{{ end }}"
TEMPLATE_FIELD = re.compile(r"\{\{ \.(Role|Content) \}\}")
QUOTES = '"""'  # around multi-line texts; they cannot be escaped

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


@dataclass(frozen=True)
class OllamaTemplate:
    """How Ollama renders messages, and where an answer stops."""

    template: str
    system: str
    stops: tuple[str, ...]

    def render_prompt(self, messages: Sequence[Json]) -> str:
        """Return the text of a chat request; `system` comes first if the request has none."""
        prefix, _, rest = self.template.partition(RANGE_START)
        turn, _, suffix = rest.partition(RANGE_END)
        parts = [prefix]
        for message in _add_system(messages, self.system):
            parts.append(
                TEMPLATE_FIELD.sub(lambda field, message=message: message[field[1].lower()], turn)
            )
        return "".join([*parts, suffix])


def write_ollama(job: ExportJob) -> None:
    run = job.run
    if not job.chat_examples:
        message = "the run has no conversation to check the chat template on"
        raise InputError(message, where="chat_template", fix=MODELFILE_HINT)
    conversations = [example.messages for example in job.chat_examples]
    template = choose_template(run.saved_dir / "tokenizer.json", run.renderer, conversations)
    origin = f"{run.model_spec.name}, trained in {run.name}"
    comment = f"{origin}\nneeds Ollama {MIN_OLLAMA_VERSION} or newer"
    modelfile = render_modelfile(template, get_model_path(job).name, comment)
    (job.folder / MODELFILE_NAME).write_text(modelfile, encoding="utf-8")
    write_gguf(job)


def reload_ollama(job: ExportJob) -> ReloadedExport:
    template = parse_modelfile((job.folder / MODELFILE_NAME).read_text(encoding="utf-8"))
    tokenizer_path = job.run.saved_dir / "tokenizer.json"
    rendered_ids = [
        encode_prompt(template.render_prompt(example.messages), tokenizer_path, job.run.renderer)
        for example in job.chat_examples
    ]
    return replace(reload_gguf(job), rendered_ids=rendered_ids)


# ---------------------------------------------------------------- the template


def choose_template(
    tokenizer_path: Path, renderer: Renderer, conversations: Sequence[Sequence[Json]]
) -> OllamaTemplate:
    """Return the template that renders as the model's own does. Raises InputError if none does."""
    for messages in conversations:
        for turn in messages:
            is_text = isinstance(turn["content"], str)
            if turn["role"] == "tool" or turn.get("tool_calls") or not is_text:
                message = "the rows contain tool calls, which the Ollama templates do not support"
                raise InputError(message, fix=MODELFILE_HINT)
    stops = tuple(renderer.decode([end_id]) for end_id in renderer.end_ids)
    shared_system = _find_shared_system(conversations)
    references = [
        (conversation, renderer.encode_prompt(_add_system(conversation, shared_system)))
        for conversation in conversations
    ]
    for conversation in SAMPLE_CONVERSATIONS:
        with suppress(InputError):  # such as a system message, which some templates refuse
            ids = renderer.encode_prompt(_add_system(conversation, shared_system))
            references.append((conversation, ids))
    for text in TEMPLATES.values():
        system = shared_system or _find_default_system(text, renderer)
        template = OllamaTemplate(text, system, stops)
        if all(
            encode_prompt(template.render_prompt(conversation), tokenizer_path, renderer) == ids
            for conversation, ids in references
        ):
            return template
    names = ", ".join(TEMPLATES)
    message = f"no Ollama template ({names}) renders like this model's chat template"
    raise InputError(message, where="chat_template", fix=MODELFILE_HINT)


def encode_prompt(text: str, tokenizer_path: Path, renderer: Renderer) -> tuple[int, ...]:
    """Return the tokens as Ollama computes them: the complete text with its control tokens, after
    BOS where the model has one."""
    encoding = Tokenizer.from_file(str(tokenizer_path)).encode(text, add_special_tokens=False)
    return (*renderer.tokenizer.bos_ids, *encoding.ids)


def _add_system(messages: Sequence[Json], system: str) -> Sequence[Json]:
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _find_shared_system(conversations: Sequence[Sequence[Json]]) -> str:
    """Return the system message that all conversations start with, or an empty text."""
    systems: set[str] = set()
    for messages in conversations:
        systems.add(messages[0]["content"] if messages[0]["role"] == "system" else "")
    return systems.pop() if len(systems) == 1 else ""


def _find_default_system(template: str, renderer: Renderer) -> str:
    """Return the system message that the model's own template adds by default."""
    marked = OllamaTemplate(template, SYSTEM_MARKER, ()).render_prompt([HELLO_MESSAGE])
    prefix, _, suffix = marked.partition(SYSTEM_MARKER)
    prompt_ids = renderer.encode_prompt([HELLO_MESSAGE])
    rendered = renderer.decode(prompt_ids[len(renderer.tokenizer.bos_ids) :])
    is_long_enough = len(rendered) >= len(prefix) + len(suffix)
    if is_long_enough and rendered.startswith(prefix) and rendered.endswith(suffix):
        return rendered[len(prefix) : len(rendered) - len(suffix)]
    return ""


# ---------------------------------------------------------------- the Modelfile


def render_modelfile(template: OllamaTemplate, model: str, comment: str) -> str:
    """Return the Modelfile. Raises InputError for texts that it cannot quote."""
    for text in (template.template, template.system):
        if QUOTES in text or text.endswith('"'):
            reason = f"it contains {QUOTES} or ends in a quote"
            message = f"a Modelfile cannot quote this system message: {reason}"
            raise InputError(message, where="system", fix=MODELFILE_HINT)
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"FROM ./{model}", f"TEMPLATE {QUOTES}{template.template}{QUOTES}"]
    if template.system:
        lines.append(f"SYSTEM {QUOTES}{template.system}{QUOTES}")
    lines += [f'PARAMETER stop "{stop}"' for stop in template.stops]
    return "\n".join(lines) + "\n"


def parse_modelfile(text: str) -> OllamaTemplate:
    """Read what `render_modelfile` wrote."""
    values: dict[str, str] = {}
    for name in ("TEMPLATE", "SYSTEM"):
        match = re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
        values[name] = match[1] if match else ""
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    return OllamaTemplate(values["TEMPLATE"], values["SYSTEM"], tuple(stops))


CHATML_TURN = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
LLAMA3_TURN = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
LLAMA3_SUFFIX = "<|start_header_id|>assistant<|end_header_id|>\n\n"

TEMPLATES = {
    "ChatML": f"{RANGE_START}{CHATML_TURN}{RANGE_END}<|im_start|>assistant\n",
    "Llama 3": f"{RANGE_START}{LLAMA3_TURN}{RANGE_END}{LLAMA3_SUFFIX}",
}
