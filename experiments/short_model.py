"""A two-layer SmolLM2 and a few general texts for `--quick`.

The model has the real tokenizer, template and embeddings, and the first layers of the real model.
It answers nothing right, and a step takes a fraction of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from experiments.definitions import GENERAL_TEXTS, resolve_recipe
from safetensors.torch import load_file, save_file

from tunesmith.model.hub.resolve import resolve_model

MODEL = "smollm2-135m-instruct"
NUM_LAYERS = 2
TEXTS_PER_DOMAIN = 2
TEXT_CHARS = 300  # of each text: reading them took a third of the time


def save_short_model(folder: Path) -> Path:
    """Write the model; return the folder."""
    source = resolve_model(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    dropped = tuple(f"model.layers.{index}." for index in range(NUM_LAYERS, 1000))
    short = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = NUM_LAYERS
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def save_general_texts(file: Path) -> Path:
    """Write the start of two general texts of each domain, the fewest that have an interval; return
    the file."""
    source = Path(resolve_recipe({"texts": GENERAL_TEXTS}, file.parent)["texts"])
    lines_by_domain: dict[str, list[str]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        short = json.dumps(row | {"text": row["text"][:TEXT_CHARS]}, ensure_ascii=False)
        lines_by_domain.setdefault(row["domain"], []).append(short)
    chosen = [line for lines in lines_by_domain.values() for line in lines[:TEXTS_PER_DOMAIN]]
    file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return file
