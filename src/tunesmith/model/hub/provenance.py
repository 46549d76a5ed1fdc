"""What trained weights belong to: `tunesmith.json` beside them, and the check of it when they are loaded.

In: the base's folder and the renderer that a run trained with. Out: a `Provenance`, or an InputError that says field by
field what is not as it was. It holds the hashes of the base's weights, of the tokenizer and of the chat template, and
some conversations with the ids they rendered to: the same files may still give other ids under another version of a
library. The conversations are made up here, since an adapter travels and the rows it was trained on should not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import sha256_of
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import from_json, json_bytes, read_json
from tunesmith.core.types import Json, __version__
from tunesmith.data.chat_template.renderer import Renderer

FILE = "tunesmith.json"
TEXT = "Größe  12,345\tof the <|im_end|> 日本 🤗\n\n  no more"
TOOL = {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object", "properties": {"of": {}}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"of": "a word"}}}
USER, ANSWER = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "It says:\n  7 </s>"}
PROMPTS: tuple[tuple[Json, ...], ...] = (
    (USER,),
    ({"role": "system", "content": "Be brief."}, USER),
    (USER, ANSWER, {"role": "user", "content": " and then?"}),
    (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": '{"found": 3}'}),
)


@dataclass(frozen=True)
class Golden:
    """A prompt and its ids. Without messages it is `TEXT`, as plain text."""

    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """`now`: the date in templates. `renderer`: over all that rendering depends on, named tokens included."""

    tunesmith: str
    base: str
    base_sha256: dict[str, str]
    tokenizer_sha256: str
    template_sha256: dict[str, str]
    renderer: str
    end_ids: tuple[int, ...]
    now: str
    golden: tuple[Golden, ...]


def provenance_of(name: str, base_sha256: dict[str, str], renderer: Renderer, now: str) -> Provenance:
    """`name`: what people call the base; `base_sha256`: see `hashes_of`."""
    templates = renderer.templates.items()
    golden = [Golden((), (), ()), *(Golden(m, (TOOL,) if m[-1]["role"] == "tool" else (), ()) for m in PROMPTS)]
    rendered = [dataclasses.replace(prompt, ids=_ids(prompt, renderer)) for prompt in golden]
    return Provenance(
        tunesmith=__version__,
        base=name,
        base_sha256=base_sha256,
        tokenizer_sha256=renderer.tokenizer.sha256,
        template_sha256={key: hashlib.sha256(template.source.encode()).hexdigest() for key, template in templates},
        renderer=renderer.fingerprint,
        end_ids=renderer.end_ids,
        now=now,
        golden=tuple(prompt for prompt in rendered if prompt.ids),
    )


def hashes_of(base: Path) -> dict[str, str]:
    """sha256 of each weight file, at the speed of sha256."""
    return {file.name: sha256_of(file) for file in sorted(base.glob("*.safetensors"))}


def _ids(prompt: Golden, renderer: Renderer) -> tuple[int, ...]:
    """Nothing for what the template cannot render."""
    try:
        if prompt.messages:
            return renderer.prompt(prompt.messages, prompt.tools)
        return tuple(renderer.text_tokens(TEXT))
    except InputError:
        return ()


def write_provenance(folder: Path, provenance: Provenance) -> None:
    (folder / FILE).write_bytes(json_bytes(provenance, indent=2))


def read_provenance(folder: Path) -> Provenance | None:
    """None where there is none: the weights are not ours, or older."""
    path = folder / FILE
    return from_json(Provenance, read_json(path), where=str(path)) if path.is_file() else None


def check_provenance(folder: Path, base_sha256: dict[str, str], renderer: Renderer, now: str) -> None:
    """InputError when the weights in `folder` say that they belong to another base, tokenizer or template, or that
    their prompts had other ids."""
    stored = read_provenance(folder)
    if stored is None:
        return
    found = provenance_of(stored.base, base_sha256, renderer, now)
    if differences := [*_differences(stored, found), *_other_ids(stored, renderer, now)]:
        fix = f"use the base that it was trained on ({stored.base}) and template: {folder / 'chat_template.jinja'}"
        what = "the weights were trained with something else:\n  " + "\n  ".join(differences)
        raise InputError(what, where=str(folder / FILE), fix=fix)


def _differences(stored: Provenance, found: Provenance) -> Iterator[str]:
    yield from _changed("base weights", stored.base_sha256, found.base_sha256)
    yield from _changed("chat template", stored.template_sha256, found.template_sha256)
    yield from _changed("tokenizer", {"": stored.tokenizer_sha256}, {"": found.tokenizer_sha256})
    if (stored.tokenizer_sha256, stored.template_sha256) == (found.tokenizer_sha256, found.template_sha256):
        yield from _changed("names of special tokens", {"": stored.renderer}, {"": found.renderer})
    if stored.end_ids != found.end_ids:
        yield f"end tokens: {list(stored.end_ids)} -> {list(found.end_ids)}"


def _changed(what: str, stored: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    for name in sorted(stored.keys() | found.keys()):
        was, now = (hashes.get(name, "none") for hashes in (stored, found))
        if was != now:
            yield f"{what} {name}".rstrip() + f": sha256 {was[:12]} -> {now[:12]}"


def _other_ids(stored: Provenance, renderer: Renderer, now: str) -> Iterator[str]:
    """Prompts that the same files render differently; another date would be a reason by itself."""
    if stored.renderer != renderer.fingerprint or (stored.now != now and renderer.dated):
        return
    for number, prompt in enumerate(stored.golden, start=1):
        was, ids = prompt.ids, _ids(prompt, renderer)
        if was != ids:
            place = next((i for i, (a, b) in enumerate(zip(was, ids, strict=False)) if a != b), min(len(was), len(ids)))
            yield f"golden prompt {number}: {len(was)} tokens -> {len(ids)}, they differ from token {place + 1} on"
