"""Provenance of trained weights: `tunesmith.json` in their folder, and its check when they are
loaded.

In: the base model's folder and the renderer of a run. Out: a `Provenance`, or an InputError that
lists every field that changed. It holds the hashes of the base weights, of the tokenizer and of the
chat template, the template's variables, the keys of the base's config.json that decide what it
computes, and a few conversations with their token ids: the same files may give other ids under
another version of a library. Of an adapter it also holds a few answers with their
log-probabilities, which show that it is applied (witness.py), and the schema of its answers. The
conversations are invented here, because an adapter is shared and its training rows should not
be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.core.atomic import MANIFEST, RESTORE_FOLDER_FIX, hash_file, read_manifest
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.core.types import Json, __version__
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.base_config import list_config_changes, select_forward_keys
from tunesmith.model.hub.validate import read_model_json

PROVENANCE_FILE = "tunesmith.json"
PROVENANCE_FORMAT = 2  # raised when older files would be misread; the first had no number
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
USER_MESSAGE = {"role": "user", "content": SAMPLE_TEXT}
ASSISTANT_MESSAGE = {"role": "assistant", "content": "It says:\n  7 </s>"}
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
    """A prompt and its token ids. Without messages it is SAMPLE_TEXT as plain text."""

    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GoldenAnswer:
    """The greedy answer of an adapter to an invented prompt, and the log-probability of each of its
    tokens with the adapter and without it, in nats."""

    messages: tuple[Json, ...]
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    base_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class CheckpointInputs:
    """Hold what the manifest of a checkpoint says of the base model and the rendering."""

    base: str
    base_sha256: dict[str, str]
    config: Json
    renderer: str


@dataclass(frozen=True)
class Provenance:
    """`now` is the date that templates render. `renderer` is a hash over everything that rendering
    depends on, named special tokens included. `variables` are chat_template_kwargs, None in a file
    that was written without them; `schema` is response_schema, `weights_sha256` the hash of the
    adapter's weights that gave the golden answers."""

    format: int
    tunesmith: str
    base: str
    base_sha256: dict[str, str]
    base_config: Json
    tokenizer_sha256: str
    template_sha256: dict[str, str]
    renderer: str
    end_ids: tuple[int, ...]
    now: str
    reference_prompts: tuple[ReferencePrompt, ...]
    variables: Json | None = None
    schema: Json | None = None
    weights_sha256: str = ""
    golden_answers: tuple[GoldenAnswer, ...] = ()


def build_provenance(
    name: str,
    base_sha256: dict[str, str],
    config: Json,
    renderer: Renderer,
    now: str,
    *,
    schema: Json | None = None,
    weights_sha256: str = "",
    golden_answers: tuple[GoldenAnswer, ...] = (),
) -> Provenance:
    """Build the provenance of weights trained on the base called `name`; `base_sha256` comes from
    `hash_weight_files`, `config` from its config.json, `golden_answers` of an adapter from
    `record_answers`."""
    reference_prompts: list[ReferencePrompt] = []
    for messages in ((), *SAMPLE_PROMPTS):
        has_tool_result = bool(messages) and messages[-1]["role"] == "tool"
        tools = (SAMPLE_TOOL,) if has_tool_result else ()
        if token_ids := _render_ids(messages, tools, renderer):
            reference_prompts.append(ReferencePrompt(messages, tools, token_ids))
    template_sha256: dict[str, str] = {}
    for key, template in renderer.templates.items():
        template_sha256[key] = hashlib.sha256(template.source.encode()).hexdigest()
    return Provenance(
        format=PROVENANCE_FORMAT,
        tunesmith=__version__,
        base=name,
        base_sha256=base_sha256,
        base_config=select_forward_keys(config),
        tokenizer_sha256=renderer.tokenizer.sha256,
        template_sha256=template_sha256,
        renderer=renderer.fingerprint,
        end_ids=renderer.end_ids,
        now=now,
        reference_prompts=tuple(reference_prompts),
        variables=renderer.variables,
        schema=schema,
        weights_sha256=weights_sha256,
        golden_answers=golden_answers,
    )


def hash_weight_files(base: Path) -> dict[str, str]:
    """Return file name -> sha256 of each weight file."""
    return {file.name: hash_file(file) for file in sorted(base.glob("*.safetensors"))}


def _render_ids(
    messages: tuple[Json, ...], tools: tuple[Json, ...], renderer: Renderer
) -> tuple[int, ...]:
    """Return the ids of a prompt, empty if the template cannot render it."""
    try:
        if messages:
            return renderer.encode_prompt(messages, tools)
        return tuple(renderer.encode_text(SAMPLE_TEXT))
    except InputError:
        return ()


def write_provenance(folder: Path, provenance: Provenance) -> None:
    (folder / PROVENANCE_FILE).write_bytes(dump_json(provenance, indent=2))


def drop_golden_answers(folder: Path) -> None:
    """Remove the recorded answers of an adapter whose weights are about to change."""
    provenance = read_provenance(folder)
    if provenance is not None and provenance.golden_answers:
        write_provenance(folder, replace(provenance, weights_sha256="", golden_answers=()))


def read_provenance(folder: Path) -> Provenance | None:
    """Return the provenance in `folder`, None for weights from other tools. Raises InputError for a
    file of another format."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    content = read_model_json(path)
    file_format = content.get("format")
    if file_format != PROVENANCE_FORMAT:
        age = "an older tunesmith" if file_format in (None, 1) else "another tunesmith"
        number = "it has no format number" if file_format is None else f"format {file_format!r:.20}"
        raise InputError(
            f"written by {age}: {number}; this version reads format {PROVENANCE_FORMAT}",
            where=str(path),
            fix="train again, or use the version that wrote it; without this file, adapter_from "
            "takes the weights and cannot verify their base",
        )
    return parse_as(Provenance, content, where=str(path))


def check_provenance(
    folder: Path,
    base: Path,
    renderer: Renderer,
    now: str,
    base_sha256: dict[str, str] | None = None,
) -> None:
    """Raise InputError if the weights in `folder` belong to another base than that in the folder
    `base`, to another tokenizer or template, or if their reference prompts now have other ids.

    `base_sha256` is what `hash_weight_files` has returned for `base`, None to hash its files."""
    stored = read_provenance(folder)
    if stored is None:
        return
    config = read_model_json(base / "config.json")
    hashes = hash_weight_files(base) if base_sha256 is None else base_sha256
    current = build_provenance(stored.base, hashes, config, renderer, now)
    differences = list(_iter_differences(stored, current))
    differences += _iter_changed_prompts(stored, renderer, now)
    if differences:
        message = "the weights were trained with other inputs:\n  " + "\n  ".join(differences)
        template = folder / "chat_template.jinja"
        fix = f"use the base model it was trained on ({stored.base}) and chat_template: {template}"
        raise InputError(message, where=str(folder / PROVENANCE_FILE), fix=fix)


def check_checkpoint(
    checkpoint: Path,
    base: Path,
    renderer: Renderer,
    base_sha256: dict[str, str] | None = None,
) -> None:
    """Raise InputError if a checkpoint belongs to another base, tokenizer or template.

    `base_sha256` is as in `check_provenance`."""
    where = str(checkpoint / MANIFEST)
    manifest = read_manifest(checkpoint)
    stored = parse_as(CheckpointInputs, manifest, where=where, fix=RESTORE_FOLDER_FIX)
    hashes = hash_weight_files(base) if base_sha256 is None else base_sha256
    differences = list(_iter_changed_hashes("base weights", stored.base_sha256, hashes))
    config = select_forward_keys(read_model_json(base / "config.json"))
    for change in list_config_changes(select_forward_keys(stored.config), config):
        differences.append(f"base config.json {change}")
    if stored.renderer != renderer.fingerprint:
        change = _describe_change("tokenizer or template", stored.renderer, renderer.fingerprint)
        differences.append(change)
    if differences:
        message = "the checkpoint was trained with other inputs:\n  " + "\n  ".join(differences)
        fix = f"restore the base model ({stored.base}) as it was"
        raise InputError(message, where=str(checkpoint), fix=fix)


def _iter_differences(stored: Provenance, current: Provenance) -> Iterator[str]:
    yield from _iter_changed_hashes("base weights", stored.base_sha256, current.base_sha256)
    for change in list_config_changes(stored.base_config, current.base_config):
        yield f"base config.json {change}"
    yield from _iter_changed_hashes(
        "chat template", stored.template_sha256, current.template_sha256
    )
    is_same_tokenizer = stored.tokenizer_sha256 == current.tokenizer_sha256
    if not is_same_tokenizer:
        yield _describe_change("tokenizer", stored.tokenizer_sha256, current.tokenizer_sha256)
    is_same_template = stored.template_sha256 == current.template_sha256
    has_changed_variables = stored.variables not in (None, current.variables)
    if has_changed_variables:
        yield f"chat_template_kwargs: {stored.variables} -> {current.variables}"
    is_same_input = is_same_tokenizer and is_same_template and not has_changed_variables
    if is_same_input and stored.renderer != current.renderer:
        yield _describe_change("names of special tokens", stored.renderer, current.renderer)
    if stored.end_ids != current.end_ids:
        yield f"end tokens: {list(stored.end_ids)} -> {list(current.end_ids)}"


def _iter_changed_hashes(
    label: str, stored: dict[str, str], current: dict[str, str]
) -> Iterator[str]:
    for name in sorted(stored.keys() | current.keys()):
        stored_hash = stored.get(name, "none")
        current_hash = current.get(name, "none")
        if stored_hash != current_hash:
            yield _describe_change(f"{label} {name}", stored_hash, current_hash)


def _describe_change(label: str, stored_hash: str, current_hash: str) -> str:
    return f"{label}: sha256 {stored_hash[:12]} -> {current_hash[:12]}"


def _iter_changed_prompts(stored: Provenance, renderer: Renderer, now: str) -> Iterator[str]:
    """Describe prompts that the same files now render differently."""
    # another date alone explains other ids
    is_other_date = stored.now != now and renderer.has_date
    if stored.renderer != renderer.fingerprint or is_other_date:
        return
    for number, prompt in enumerate(stored.reference_prompts, start=1):
        stored_ids = prompt.token_ids
        current_ids = _render_ids(prompt.messages, prompt.tools, renderer)
        if stored_ids == current_ids:
            continue
        position = 0
        for stored_id, current_id in zip(stored_ids, current_ids, strict=False):
            if stored_id != current_id:
                break
            position += 1
        yield (
            f"reference prompt {number}: {len(stored_ids)} tokens -> {len(current_ids)}, "
            f"different from token {position + 1} on"
        )
