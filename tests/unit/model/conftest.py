"""Fixtures over the tiny models of `tiny_gguf.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tiny_gguf import CONFIG, random_weights, write_gguf


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return make_gguf(architecture="llama", **changed), which returns the path of a tiny GGUF."""

    def make(architecture: str = "llama", **changed: Any) -> Path:
        return write_gguf(tmp_path / f"tiny-{architecture}.gguf", architecture, **changed)

    return make


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Return a folder with config.json and model.safetensors of a tiny Llama."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights("llama"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def change_config(model_folder: Path) -> Callable[..., Path]:
    """Return change_config(key=value), which changes config.json of the model folder; None removes
    a key."""

    def change(**changed: Any) -> Path:
        content = {key: value for key, value in (CONFIG | changed).items() if value is not None}
        (model_folder / "config.json").write_text(json.dumps(content))
        return model_folder

    return change
