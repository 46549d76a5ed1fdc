"""Trained weights belong to a base, a tokenizer, a template and end tokens; each change of one is
named, and nothing else is."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from toy_chat import CHATML, write_model_folder
from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.session.identity import (
    PROVENANCE_FILE,
    SAMPLE_TEXT,
    SAMPLE_TOOL,
    Provenance,
    build_provenance,
    check_checkpoint,
    check_provenance,
    hash_weight_files,
    read_provenance,
    update_weights_hash,
    write_provenance,
)

NOW = datetime(2026, 3, 4)
DAY = "2026-03-04"
CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 10000.0, "use_cache": True}
DATED = CHATML.replace("{% for", "{{ strftime_now('%d %B %Y') }}{% for", 1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_model_folder(tmp_path / "base", bos="<|endoftext|>")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "b.safetensors").write_bytes(b"second")
    (folder / "a.safetensors").write_bytes(b"first")
    return folder


@pytest.fixture
def renderer(base: Path) -> Renderer:
    return Renderer.from_folder(base, now=NOW)


def build(base: Path, renderer: Renderer, now: str = DAY) -> Provenance:
    config = json.loads((base / "config.json").read_text())
    return build_provenance("tiny", hash_weight_files(base), config, renderer, now)


def store(folder: Path, provenance: Provenance, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_provenance(folder, dataclasses.replace(provenance, **changed))
    return folder


def list_problems(folder: Path, base: Path, renderer: Renderer, now: str = DAY) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_provenance(folder, base, renderer, now)
    assert caught.value.where == str(folder / PROVENANCE_FILE)
    headline, *problems = caught.value.message.split("\n  ")
    assert headline == "the weights were trained with other inputs:"
    return problems


def test_a_provenance_holds_what_the_weights_depend_on(base: Path, renderer: Renderer) -> None:
    provenance = build(base, renderer)
    assert list(provenance.base_sha256) == ["a.safetensors", "b.safetensors"]
    assert len(set(provenance.base_sha256.values())) == 2
    assert provenance.config == {k: v for k, v in CONFIG.items() if k != "use_cache"}
    assert provenance.end_ids == renderer.end_ids != ()
    assert provenance.tokenizer == renderer.tokenizer.sha256
    assert provenance.templates.keys() == {"default"}
    text, *chats = provenance.reference_prompts
    assert text.messages == ()
    assert list(text.token_ids) == renderer.encode_text(SAMPLE_TEXT)
    assert [prompt.messages[-1]["role"] for prompt in chats] == ["user", "user", "user", "tool"]
    assert [prompt.tools for prompt in chats] == [(), (), (), (SAMPLE_TOOL,)]
    for prompt in chats:
        assert prompt.token_ids == renderer.encode_prompt(prompt.messages, prompt.tools)


def test_weights_that_an_export_changes_get_their_hash(
    base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    provenance = build(base, renderer)
    folder = store(tmp_path / "a", provenance, weights_sha256="ab")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"x")
    update_weights_hash(folder, weights)
    assert read_provenance(folder) == dataclasses.replace(
        provenance, weights_sha256=hashlib.sha256(b"x").hexdigest()
    )
    update_weights_hash(tmp_path / "base", weights)  # weights of other tools have no record


def test_prompts_that_a_template_refuses_are_left_out(base: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (base / "chat_template.jinja").write_text(strict + CHATML)
    provenance = build(base, Renderer.from_folder(base, now=NOW))
    prompts = provenance.reference_prompts
    assert [prompt.messages[0]["role"] for prompt in prompts[1:]] == ["user", "user", "user"]


def test_unchanged_inputs_pass_and_foreign_weights_are_not_judged(
    base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    provenance = build(base, renderer)
    folder = store(tmp_path / "adapter", provenance)
    assert read_provenance(folder) == provenance
    check_provenance(folder, base, renderer, DAY)
    check_provenance(folder, base, renderer, "2026-05-06")  # the template prints no date
    assert read_provenance(base) is None
    check_provenance(base, base, renderer, DAY)


def test_a_config_may_hold_infinities(base: Path, renderer: Renderer, tmp_path: Path) -> None:
    """Published configs of Mamba layers have `time_step_limit: [0.0, Infinity]`."""
    limits = {"time_step_limit": [0.0, math.inf], "nested": {"a": -math.inf, "b": [math.nan]}}
    (base / "config.json").write_text(json.dumps(CONFIG | limits))
    folder = store(tmp_path / "adapter", build(base, renderer))
    check_provenance(folder, base, renderer, DAY)
    (base / "config.json").write_text(json.dumps(CONFIG | limits | {"time_step_limit": [0, 1]}))
    problems = list_problems(folder, base, renderer)
    assert len(problems) == 1
    assert problems[0].startswith("base config.json time_step_limit: [0.0, {'__float__': 'Inf")


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("base_sha256", lambda v: {**v, "a.safetensors": "0" * 64}, "base weights a.safetensors: "),
        ("base_sha256", lambda v: {**v, "c.safetensors": "0" * 64}, "base weights c.safetensors: "),
        ("base_sha256", lambda v: {"a.safetensors": v["a.safetensors"]}, "base weights b.safeten"),
        ("config", lambda v: {**v, "rope_theta": 5.0}, "base config.json rope"),
        ("templates", lambda _: {"default": "0" * 64}, "chat template default: sha256 0000"),
        ("tokenizer", lambda _: "0" * 64, "tokenizer: sha256 000000000000 -> "),
        ("renderer", lambda _: "0" * 64, "names of special tokens: sha256 000000000000 -> "),
        ("end_ids", lambda v: v[:-1], "end tokens: ["),
        ("end_ids", lambda v: (*v, 3), "end tokens: ["),
        ("end_ids", lambda _: (), "end tokens: [] -> ["),
    ],
)
def test_each_change_is_named(
    field: str,
    change: Callable[[Any], Any],
    problem: str,
    base: Path,
    renderer: Renderer,
    tmp_path: Path,
) -> None:
    provenance = build(base, renderer)
    changed = {field: change(getattr(provenance, field))}
    problems = list_problems(store(tmp_path / "adapter", provenance, **changed), base, renderer)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_a_change_shows_twelve_digits_of_both_hashes(
    base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    provenance = build(base, renderer)
    folder = store(tmp_path / "adapter", provenance, tokenizer="0" * 64)
    current = renderer.tokenizer.sha256[:12]
    assert list_problems(folder, base, renderer) == [f"tokenizer: sha256 {'0' * 12} -> {current}"]


@pytest.mark.parametrize("other", ["tokenizer", "templates"])
def test_special_tokens_are_named_only_where_nothing_else_explains_them(
    other: str, base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    provenance = build(base, renderer)
    values = {"tokenizer": "0" * 64, "templates": {"default": "0" * 64}}
    folder = store(tmp_path / "adapter", provenance, renderer="0" * 64, **{other: values[other]})
    problems = list_problems(folder, base, renderer)
    assert [problem.split(":")[0] for problem in problems] in (
        ["tokenizer"],
        ["chat template default"],
    )


def test_prompts_that_now_have_other_ids_are_named_with_their_first_change(
    base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    provenance = build(base, renderer)
    prompts = list(provenance.reference_prompts)
    ids = prompts[1].token_ids
    prompts[1] = dataclasses.replace(prompts[1], token_ids=(*ids[:2], ids[2] + 1, *ids[3:]))
    prompts[2] = dataclasses.replace(prompts[2], token_ids=prompts[2].token_ids[:-1])
    folder = store(tmp_path / "adapter", provenance, reference_prompts=tuple(prompts))
    count = len(prompts[2].token_ids)
    assert list_problems(folder, base, renderer) == [
        f"reference prompt 2: {len(ids)} tokens -> {len(ids)}, different from token 3 on",
        f"reference prompt 3: {count} tokens -> {count + 1}, different from token {count + 1} on",
    ]


def test_another_date_explains_other_ids_where_a_template_prints_it(
    base: Path, tmp_path: Path
) -> None:
    (base / "chat_template.jinja").write_text(DATED)
    renderer = Renderer.from_folder(base, now=NOW)
    provenance = build(base, renderer)
    prompts = [dataclasses.replace(p, token_ids=(1, 2)) for p in provenance.reference_prompts]
    folder = store(tmp_path / "adapter", provenance, reference_prompts=tuple(prompts))
    check_provenance(folder, base, renderer, "2026-05-06")
    assert len(list_problems(folder, base, renderer)) == len(prompts)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (None, "an older tunesmith: it has no format number"),
        (3, "an older tunesmith: format 3"),
        (5, "another tunesmith: format 5"),
        ("x" * 50, "another tunesmith: format 'xxxxxxxxxxxxxxxxxxx;"),
    ],
)
def test_files_of_another_format_are_refused(
    number: object, words: str, base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    folder = store(tmp_path / "adapter", build(base, renderer))
    content = json.loads((folder / PROVENANCE_FILE).read_text())
    content["format"] = number
    (folder / PROVENANCE_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_provenance(folder)
    assert words.removesuffix(";") in caught.value.message
    assert caught.value.message.endswith("; this version reads format 4")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, ""),
        ({"base_sha256": {"a.safetensors": "0" * 64}}, "base weights a.safetensors: sha256 0000"),
        ({"config": CONFIG | {"rope_theta": 5.0}}, "base config.json rope"),
        ({"config": CONFIG | {"use_cache": False}}, ""),
        ({"renderer": "0" * 64}, "names of special tokens: sha256 000000000000 -> "),
        ({"renderer": "g" * 64}, "names of special tokens: sha256 gggggggggggg -> "),
    ],
)
def test_a_checkpoint_names_what_has_changed(
    changed: dict[str, Any], problem: str, base: Path, renderer: Renderer, tmp_path: Path
) -> None:
    stored = {
        "base": "tiny",
        "base_sha256": hash_weight_files(base),
        "config": CONFIG,
        "tokenizer": renderer.tokenizer.sha256,
        "templates": build(base, renderer).templates,
        "renderer": renderer.fingerprint,
        "end_ids": renderer.end_ids,
    }
    checkpoint = tmp_path / "checkpoint"
    with atomic_dir(checkpoint, metadata=stored | changed):
        pass
    if not problem:
        check_checkpoint(checkpoint, base, renderer)
        return
    with pytest.raises(InputError) as caught:
        check_checkpoint(checkpoint, base, renderer)
    assert caught.value.message.split("\n  ")[1].startswith(problem)
    assert caught.value.fix == "restore the base model (tiny) as it was"
