"""Configs of multimodal models that would cost much: cases for hostile_inputs.py."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.core.types import Json
from tunesmith.model.hub import text_class  # noqa: F401 - imported before a case is measured
from tunesmith.model.hub.spec import read_spec

SIZES = ("hidden_size", "vocab_size", "intermediate_size")
# name -> values of the text part, values of the tower
PARTS: dict[str, tuple[Json, Json]] = {
    "a text part of a billion layers": ({"num_hidden_layers": 10**9}, {}),
    "a text part of 500 layers": ({"num_hidden_layers": 500}, {}),
    "a tower of a billion layers": ({}, {"num_hidden_layers": 10**9}),
    "a tower of a billion labels": ({}, {"num_labels": 10**9}),
    "a million layer types": ({"layer_types": ["full_attention"] * 1_000_000}, {}),
    "a text part of huge sizes": (dict.fromkeys(SIZES, 2**24), {}),
}


def read_parts(text: Json, tower: Json, folder: Path) -> Callable[[], Any]:
    """Describe a model from its config.json alone."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 2, "hidden_size": 32, **text},
        "vision_config": {"num_hidden_layers": 1, "hidden_size": 16, **tower},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return partial(read_spec, folder)


CASES = {name: partial(read_parts, *parts) for name, parts in PARTS.items()}
