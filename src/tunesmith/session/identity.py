"""What a run and its weights are, by content: one identity, compared wherever weights are loaded.

    identify(name, base, renderer) -> Identity        base weights and config, tokenizer, templates
    list_changes(stored, current) -> ["data.data: sha256 0c5e... -> 91d2...", ...]
    check_provenance(folder, base, renderer, now)     InputError for weights of another identity

A fingerprint (fingerprint.py) adds all else that the bytes of a run depend on. A provenance
(`tunesmith.json` beside trained weights) adds conversations with their token ids, since another
version of a library may give others, and the hash of an adapter's weights. The conversations are
invented: an adapter is shared, and its training rows should not be. Left out: what to do about a
change (train/resume.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from tunesmith.core.atomic import MANIFEST, RESTORE_FOLDER_FIX, hash_file, read_manifest
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, iter_leaves, parse_as, read_file
from tunesmith.core.types import Json, __version__
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.base_config import list_config_changes, select_forward_keys
from tunesmith.model.hub.validate import read_model_json
from tunesmith.recipe.yaml_lines import load_yaml

ROUNDING_PREFIX = "machine."  # fields that only change the last bits
PACKAGE_DIR = Path(__file__).parents[1]
SOURCE_SUFFIXES = (".py", ".c", ".h")
PROVENANCE_FILE = "tunesmith.json"
PROVENANCE_FORMAT = 4  # raised when older files would be misread; the first had no number
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
class Identity:
    """Say what weights belong to. `renderer` is a hash over all that rendering depends on, named
    special tokens included; `config` has the keys that change the forward. A fingerprint, a
    checkpoint and a provenance have these keys, too."""

    base: str
    base_sha256: dict[str, str]
    config: Json
    tokenizer: str
    templates: dict[str, str]
    renderer: str
    end_ids: tuple[int, ...]

    def list_changes(self, current: Identity) -> list[str]:
        """Describe what of this identity is another one now, but for its name."""
        changes = list(_iter_changed_hashes("base weights", self.base_sha256, current.base_sha256))
        for change in list_config_changes(self.config, current.config):
            changes.append(f"base config.json {change}")
        changes += _iter_changed_hashes("chat template", self.templates, current.templates)
        if self.tokenizer != current.tokenizer:
            changes.append(_describe_change("tokenizer", self.tokenizer, current.tokenizer))
        if not changes and self.renderer != current.renderer:
            label = "names of special tokens"
            changes.append(_describe_change(label, self.renderer, current.renderer))
        if self.end_ids != current.end_ids:
            changes.append(f"end tokens: {list(self.end_ids)} -> {list(current.end_ids)}")
        return changes


def identify(
    name: str, base: Path, renderer: Renderer, base_sha256: dict[str, str] | None = None
) -> Identity:
    """Return the identity of weights trained on the base in a folder.

    Reads all weights once, at the speed of sha256, unless their hashes are given."""
    hashes = hash_weight_files(base) if base_sha256 is None else base_sha256
    return build_identity(name, hashes, read_model_json(base / "config.json"), renderer)


def build_identity(
    name: str, base_sha256: dict[str, str], config: Json, renderer: Renderer
) -> Identity:
    templates: dict[str, str] = {}
    for key, template in renderer.templates.items():
        content = template.source.encode(errors="surrogatepass")
        templates[key] = hashlib.sha256(content).hexdigest()
    return Identity(
        base=name,
        base_sha256=base_sha256,
        config=select_forward_keys(config),
        tokenizer=renderer.tokenizer.sha256,
        templates=templates,
        renderer=renderer.fingerprint,
        end_ids=renderer.end_ids,
    )


def hash_weight_files(base: Path) -> dict[str, str]:
    """Return file name -> sha256 of each weight file."""
    return {file.name: hash_file(file) for file in sorted(base.glob("*.safetensors"))}


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


# ---------------------------------------------------------------- a run


@lru_cache
def hash_source(folder: Path = PACKAGE_DIR) -> str:
    """Return a digest of tunesmith's own files, for two checkouts may have the same version."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(f"{path.relative_to(folder)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def read_recipe(file: Path) -> Json:
    """Read the recipe of a run folder. Raises InputError if it was edited and is broken."""
    fix = "restore the file as the run wrote it"
    try:
        recipe = load_yaml(read_file(file, fix=fix).decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}", where=str(file), fix=fix) from error
    if not isinstance(recipe, dict):
        raise InputError("not a recipe", where=str(file), fix=fix)
    return cast("Json", recipe)


def list_changes(stored: Json, current: Json) -> list[str]:
    """Return each changed field with its stored and its current value.

    The renderer is listed only if its tokenizer and templates are unchanged."""
    stored_fields = dict(iter_leaves(stored))
    current_fields = dict(iter_leaves(current))
    changes: dict[str, str] = {}
    for field in stored_fields | current_fields:
        before = stored_fields.get(field)
        after = current_fields.get(field)
        if before != after:
            changes[field] = f"{field}: {_format_value(before)} -> {_format_value(after)}"
    if any(field == "tokenizer" or field.startswith("templates.") for field in changes):
        changes.pop("renderer", None)
    return list(changes.values())


def _format_value(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"sha256 {text[:12]}"
    return text if len(text) <= 80 else text[:79] + "…"


# ---------------------------------------------------------------- trained weights


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt and its token ids. Without messages it is SAMPLE_TEXT as plain text."""

    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Provenance(Identity):
    """The identity of weights as a file of their folder. `now` is the date that templates render.
    `variables` are chat_template_kwargs, `schema` is response_schema, and `weights_sha256` the hash
    of the adapter's weights."""

    format: int
    tunesmith: str
    now: str
    reference_prompts: tuple[ReferencePrompt, ...]
    variables: Json
    schema: Json | None = None
    weights_sha256: str = ""


def build_provenance(
    name: str,
    base_sha256: dict[str, str],
    config: Json,
    renderer: Renderer,
    now: str,
    *,
    schema: Json | None = None,
    weights_sha256: str = "",
) -> Provenance:
    """Build the provenance of weights trained on the base called `name`; `base_sha256` comes from
    `hash_weight_files`, `config` from its config.json."""
    reference_prompts: list[ReferencePrompt] = []
    for messages in ((), *SAMPLE_PROMPTS):
        has_tool_result = bool(messages) and messages[-1]["role"] == "tool"
        tools = (SAMPLE_TOOL,) if has_tool_result else ()
        if token_ids := _render_ids(messages, tools, renderer):
            reference_prompts.append(ReferencePrompt(messages, tools, token_ids))
    identity = build_identity(name, base_sha256, config, renderer)
    return Provenance(
        **vars(identity),
        format=PROVENANCE_FORMAT,
        tunesmith=__version__,
        now=now,
        reference_prompts=tuple(reference_prompts),
        variables=renderer.variables,
        schema=schema,
        weights_sha256=weights_sha256,
    )


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


def update_weights_hash(folder: Path, weights: Path) -> None:
    """Write the hash of an adapter's weights anew, after an export has changed them."""
    provenance = read_provenance(folder)
    if provenance is not None:
        write_provenance(folder, replace(provenance, weights_sha256=hash_file(weights)))


def read_provenance(folder: Path) -> Provenance | None:
    """Return the provenance in `folder`, None for weights from other tools. Raises InputError for a
    file of another format."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    content = read_model_json(path)
    file_format = content.get("format")
    if file_format != PROVENANCE_FORMAT:
        age = "an older tunesmith" if file_format in (None, 1, 2, 3) else "another tunesmith"
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
    current = identify(stored.base, base, renderer, base_sha256)
    differences: list[str] = []
    comparable: Identity = stored
    if stored.variables != renderer.variables:  # which the renderer's hash is of, too
        differences.append(f"chat_template_kwargs: {stored.variables} -> {renderer.variables}")
        comparable = replace(stored, renderer=current.renderer)
    differences += comparable.list_changes(current)
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
    stored = parse_as(Identity, manifest, where=where, fix=RESTORE_FOLDER_FIX)
    current = identify(stored.base, base, renderer, base_sha256)
    differences = stored.list_changes(current)
    if differences:
        message = "the checkpoint was trained with other inputs:\n  " + "\n  ".join(differences)
        fix = f"restore the base model ({stored.base}) as it was"
        raise InputError(message, where=str(checkpoint), fix=fix)


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
