"""Token ids beyond the embedding are refused with exit code 2 before anything is written, wherever
they come from; those that nothing uses do no harm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import END, build_sum_rows, make_chat_row, write_rows
from tunesmith.core.types import Json

ROWS = 259  # of the tiny model's embedding
IMAGE = "<|image|>"
FORGE = "{{ '<|image|>' }}"

RunCli = Callable[..., tuple[int, str, str]]


def copy_model(tiny_folder: Path, path: Path) -> Path:
    shutil.copytree(tiny_folder, path)
    return path


def edit_json(path: Path, **changed: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(data | changed), encoding="utf-8")


def add_token(model: Path, token_id: int, text: str = IMAGE, *, special: bool = True) -> None:
    path = model / "tokenizer.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    flags: Json = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    token = {"id": token_id, "content": text, "special": special, **flags}
    edit_json(path, added_tokens=[*tokens, token])


def write_template(model: Path, prefix: str) -> None:
    path = model / "chat_template.jinja"
    path.write_text(prefix + path.read_text(encoding="utf-8"), encoding="utf-8")


def write_recipe(model: Path, folder: Path, rows: list[Json] | None = None, **changed: Any) -> Path:
    data = write_rows(folder / "rows.jsonl", rows or build_sum_rows(1, 6))
    keys = {"model": str(model), "data": str(data), "output_dir": str(folder / "run")}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(keys | changed), encoding="utf-8")
    return path


def refuse(tunesmith: RunCli, recipe: Path, verb: str = "train") -> str:
    code, _, stderr = tunesmith(verb, str(recipe))
    assert code == 2, stderr
    assert "fix:" in stderr
    written = {path.name for path in (recipe.parent / "run").glob("*")}
    assert written <= {"rejected.jsonl"}, "rows that cannot be used are listed, no run is begun"
    return " ".join(stderr.split())


@pytest.mark.parametrize("token_id", [ROWS, 2_000_000_000, 4_000_000_000, 10**12])
def test_a_token_that_the_template_writes(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli, token_id: int
) -> None:
    model = copy_model(tiny_folder, tmp_path / "model")
    add_token(model, token_id)
    write_template(model, FORGE)
    error = refuse(tunesmith, write_recipe(model, tmp_path))
    assert f"{token_id:,}" in error or str(token_id) in error
    assert IMAGE in error


@pytest.mark.parametrize("stage", ["sft", "cpt"])
def test_a_token_of_the_vocabulary_that_a_row_makes(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli, stage: str
) -> None:
    model = copy_model(tiny_folder, tmp_path / "model")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary["ab"] = ROWS + 40
    tokenizer["model"]["merges"] = [["a", "b"]]
    edit_json(path, **tokenizer)
    rows = [{"text": f"text {n}"} for n in range(5)] + [{"text": "about"}]
    error = refuse(tunesmith, write_recipe(model, tmp_path, rows, stage=stage))
    assert "rows.jsonl:6" in error
    assert "'ab' has the id 299, but the model's embedding has 259 rows" in error


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "pad_token_id"),
        ("generation_config.json", "pad_token_id"),
        ("generation_config.json", "bos_token_id"),
        ("generation_config.json", "eos_token_id"),
    ],
)
@pytest.mark.parametrize("value", [10**12, ROWS, -7, [END, 2**33], "end", 3.5, True])
def test_special_ids_of_the_configs(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli, file: str, key: str, value: Any
) -> None:
    model = copy_model(tiny_folder, tmp_path / "model")
    edit_json(model / file, **{key: value})
    error = refuse(tunesmith, write_recipe(model, tmp_path))
    assert file in error
    assert key in error
    assert refuse(tunesmith, write_recipe(model, tmp_path), "plan")


@pytest.mark.promise
def test_end_ids_of_config_json_are_not_used(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli
) -> None:
    model = copy_model(tiny_folder, tmp_path / "model")
    edit_json(model / "config.json", eos_token_id=10**12, bos_token_id=5000)
    code, _, stderr = tunesmith("train", str(write_recipe(model, tmp_path)))
    assert code == 0, stderr
    edit_json(model / "config.json", eos_token_id="end")
    code, _, stderr = tunesmith("plan", str(write_recipe(model, tmp_path)))
    assert code == 2
    assert "eos_token_id 'end'" in stderr


def test_an_end_token_and_a_leading_token_of_the_tokenizer(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli
) -> None:
    ends = copy_model(tiny_folder, tmp_path / "ends")
    add_token(ends, 5000, "<|stop|>")
    edit_json(ends / "tokenizer_config.json", eos_token="<|stop|>")
    assert "<|stop|>" in refuse(tunesmith, write_recipe(ends, tmp_path))
    begins = copy_model(tiny_folder, tmp_path / "begins")
    add_token(begins, 5000, "<|begin|>")
    first = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence],
        "special_tokens": {
            "<|begin|>": {"id": "<|begin|>", "ids": [5000], "tokens": ["<|begin|>"]}
        },
    }
    edit_json(begins / "tokenizer.json", post_processor=processor)
    assert "5,000" in refuse(tunesmith, write_recipe(begins, tmp_path))


def test_a_special_id_of_a_post_processor_without_a_token(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli
) -> None:
    model = copy_model(tiny_folder, tmp_path / "model")
    first = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<|start|>": {"id": "<|start|>", "ids": [123456], "tokens": ["<|start|>"]}}
    processor = {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence],
        "special_tokens": special,
    }
    edit_json(model / "tokenizer.json", post_processor=processor)
    assert "123,456" in refuse(tunesmith, write_recipe(model, tmp_path))


def test_a_token_that_nothing_uses_does_no_harm(
    tiny_folder: Path, tmp_path: Path, tunesmith: RunCli
) -> None:
    """Gemma 3 of one billion parameters has an image token beyond its embedding."""
    model = copy_model(tiny_folder, tmp_path / "model")
    add_token(model, ROWS)
    edit_json(model / "config.json", pad_token_id=-1)
    rows = [make_chat_row(f"what is {n}?", f"it is {IMAGE}") for n in range(6)]
    code, _, stderr = tunesmith("plan", str(write_recipe(model, tmp_path, rows)))
    assert code == 0, stderr
