"""What trained weights belong to: `tunesmith.json` beside them, and the check of it when they are
loaded.

In: the base's folder and the renderer that a run trained with. Out: a `Provenance`, or an
InputError that says field by field what is not as it was. It holds the hashes of the base's
weights, of the tokenizer and of the chat template, and some conversations with the ids they
rendered to: the same files may still give other ids under another version of a library. The
conversations are made up here, since an adapter travels and the rows it was trained on should not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Json, __version__
from tunesmith.data.chat_template.renderer import Renderer

PROVENANCE_FILE = "tunesmith.json"
SAMPLE_TEXT = "Größe  12,345\tof the <|im_end|> 日本 🤗\n\n  no more"
SAMPLE_TOOL = {
    "name": "look_up",
    "description": "Looks up.",
    "parameters": {"type": "object", "properties": {"of": {}}},
}
SAMPLE_TOOL_CALL = {
    "type": "function",
    "function": {"name": "look_up", "arguments": {"of": "a word"}},
}
USER_MESSAGE, ASSISTANT_MESSAGE = (
    {"role": "user", "content": SAMPLE_TEXT},
    {"role": "assistant", "content": "It says:\n  7 </s>"},
)
SAMPLE_PROMPTS: tuple[tuple[Json, ...], ...] = (
    (USER_MESSAGE,),
    ({"role": "system", "content": "Be brief."}, USER_MESSAGE),
    (USER_MESSAGE, ASSISTANT_MESSAGE, {"role": "user", "content": " and then?"}),
    (
        USER_MESSAGE,
        {"role": "assistant", "content": "", "tool_calls": [SAMPLE_TOOL_CALL]},
        {"role": "tool", "content": '{"found": 3}'},
    ),
)


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt and its ids. Without messages it is `TEXT`, as plain text."""

    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """`now`: the date in templates. `renderer`: over all that rendering depends on, named tokens
    included."""

    tunesmith: str
    base: str
    base_sha256: dict[str, str]
    tokenizer_sha256: str
    template_sha256: dict[str, str]
    renderer: str
    end_ids: tuple[int, ...]
    now: str
    reference_prompts: tuple[ReferencePrompt, ...]


def build_provenance(
    name: str, base_sha256: dict[str, str], renderer: Renderer, now: str
) -> Provenance:
    """`name`: what people call the base; `base_sha256`: see `hashes_of`."""
    templates = renderer.templates.items()
    prompts = [
        ReferencePrompt((), (), ()),
        *(
            ReferencePrompt(messages, (SAMPLE_TOOL,) if messages[-1]["role"] == "tool" else (), ())
            for messages in SAMPLE_PROMPTS
        ),
    ]
    rendered = [
        dataclasses.replace(prompt, token_ids=_render_ids(prompt, renderer)) for prompt in prompts
    ]
    return Provenance(
        tunesmith=__version__,
        base=name,
        base_sha256=base_sha256,
        tokenizer_sha256=renderer.tokenizer.sha256,
        template_sha256={
            key: hashlib.sha256(template.source.encode()).hexdigest() for key, template in templates
        },
        renderer=renderer.fingerprint,
        end_ids=renderer.end_ids,
        now=now,
        reference_prompts=tuple(prompt for prompt in rendered if prompt.token_ids),
    )


def hash_weight_files(base: Path) -> dict[str, str]:
    """sha256 of each weight file, at the speed of sha256."""
    return {file.name: hash_file(file) for file in sorted(base.glob("*.safetensors"))}


def _render_ids(prompt: ReferencePrompt, renderer: Renderer) -> tuple[int, ...]:
    """Nothing for what the template cannot render."""
    try:
        if prompt.messages:
            return renderer.encode_prompt(prompt.messages, prompt.tools)
        return tuple(renderer.encode_text(SAMPLE_TEXT))
    except InputError:
        return ()


def write_provenance(folder: Path, provenance: Provenance) -> None:
    (folder / PROVENANCE_FILE).write_bytes(dump_json(provenance, indent=2))


def read_provenance(folder: Path) -> Provenance | None:
    """None where there is none: the weights are not ours, or older."""
    path = folder / PROVENANCE_FILE
    return parse_as(Provenance, read_json(path), where=str(path)) if path.is_file() else None


def check_provenance(
    folder: Path, base_sha256: dict[str, str], renderer: Renderer, now: str
) -> None:
    """InputError when the weights in `folder` say that they belong to another base, tokenizer or
    template, or that their prompts had other ids."""
    stored = read_provenance(folder)
    if stored is None:
        return
    current = build_provenance(stored.base, base_sha256, renderer, now)
    if differences := [
        *_iter_differences(stored, current),
        *_iter_changed_prompts(stored, renderer, now),
    ]:
        fix = f"use the base that it was trained on ({stored.base}) and template: {folder / 'chat_template.jinja'}"
        message = "the weights were trained with something else:\n  " + "\n  ".join(differences)
        raise InputError(message, where=str(folder / PROVENANCE_FILE), fix=fix)


def _iter_differences(stored: Provenance, current: Provenance) -> Iterator[str]:
    yield from _iter_changed_hashes("base weights", stored.base_sha256, current.base_sha256)
    yield from _iter_changed_hashes(
        "chat template", stored.template_sha256, current.template_sha256
    )
    yield from _iter_changed_hashes(
        "tokenizer", {"": stored.tokenizer_sha256}, {"": current.tokenizer_sha256}
    )
    if (stored.tokenizer_sha256, stored.template_sha256) == (
        current.tokenizer_sha256,
        current.template_sha256,
    ):
        yield from _iter_changed_hashes(
            "names of special tokens", {"": stored.renderer}, {"": current.renderer}
        )
    if stored.end_ids != current.end_ids:
        yield f"end tokens: {list(stored.end_ids)} -> {list(current.end_ids)}"


def _iter_changed_hashes(
    label: str, stored: dict[str, str], current: dict[str, str]
) -> Iterator[str]:
    for name in sorted(stored.keys() | current.keys()):
        stored_hash, current_hash = (hashes.get(name, "none") for hashes in (stored, current))
        if stored_hash != current_hash:
            yield f"{label} {name}".rstrip() + f": sha256 {stored_hash[:12]} -> {current_hash[:12]}"


def _iter_changed_prompts(stored: Provenance, renderer: Renderer, now: str) -> Iterator[str]:
    """Prompts that the same files render differently; another date would be a reason by itself."""
    if stored.renderer != renderer.fingerprint or (stored.now != now and renderer.has_date):
        return
    for number, prompt in enumerate(stored.reference_prompts, start=1):
        stored_ids, current_ids = prompt.token_ids, _render_ids(prompt, renderer)
        if stored_ids != current_ids:
            position = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(stored_ids, current_ids, strict=False))
                    if a != b
                ),
                min(len(stored_ids), len(current_ids)),
            )
            yield f"golden prompt {number}: {len(stored_ids)} tokens -> {len(current_ids)}, they differ from token {position + 1} on"
