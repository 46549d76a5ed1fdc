"""What an export asks for, refused before a model library is loaded where the words or the run's
tokenizer already say no.

    check_request(run, target, type)            InputError, or None
    choose_type(target, type)                   the type, the target's first one without a type
    choose_output_path(run, target, type, ...)  the new folder

In: the words of the user and a run folder. Out: nothing, the type or the folder.
Left out: how a target is written and all that needs weights (export.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.core.run_dir import ADAPTER_DIR, MODEL_DIR, find_weights_dir
from tunesmith.core.types import Json
from tunesmith.model.hub.validate import read_model_json

REMOVED_TARGETS = {"hub": "export to peft, then `hf upload OWNER/NAME FOLDER` of huggingface_hub"}
REMOVED_TYPES = {
    "per-expert": "use --to merged: no server reads adapters of experts",
    "lora": "use --to gguf, or llama.cpp's convert_lora_to_gguf.py on the folder of --to peft",
}
LLAMA_SERVER = "llama-server"  # the only server that takes a type: that of its GGUF
MODEL_TYPES = ("f16", "q8_0", "bf16", "f32")  # of a GGUF of the whole model
TARGET_TYPES: dict[str, tuple[str, ...]] = {  # "" is the only form, or the usual one
    "peft": ("",),
    "merged": ("",),
    "gguf": MODEL_TYPES,
    "ollama": MODEL_TYPES,
}
ENGINES = {  # target -> the name of its server in messages
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama-server": "llama-server",
    "kserve": "KServe",
    "ray": "Ray Serve LLM",
}
TOKENIZER_FILE = "tokenizer.json"
FALLBACK_HINT = "export to merged or peft, which keep the model's own files"


def choose_type(target: str, export_type: str | None) -> str:
    """Return the export type; without one, the target's first. Raises InputError for an unknown
    target or type."""
    if target not in TARGET_TYPES:
        names = (*TARGET_TYPES, *ENGINES)
        hint = suggest_name(target, names)
        fix = f"{hint} use one of {', '.join(names)}".strip()
        fix = REMOVED_TARGETS.get(target, fix)
        raise InputError(f"unknown export target {target!r}", where="--to", fix=fix)
    return _choose(TARGET_TYPES[target], target, export_type)


def _choose(types: tuple[str, ...], target: str, export_type: str | None) -> str:
    chosen = types[0] if export_type is None else export_type
    if chosen not in types:
        names = [name for name in types if name]
        fix = f"use one of {', '.join(names)}" if names else "leave --type out"
        fix = REMOVED_TYPES.get(chosen, fix)
        raise InputError(f"{target} has no type {chosen!r}", where="--type", fix=fix)
    return chosen


def choose_output_path(
    run: Path, target: str, export_type: str, *, scale: float, out: Path | None
) -> Path:
    """Return the folder of an export. Raises InputError if it exists and is not empty."""
    name = f"{target}-{export_type}" if export_type else target
    if scale != 1:
        name += f"@{scale:g}"
    return _refuse_nonempty(out or run / "export" / name)


def choose_server_path(runs: Sequence[Path], target: str, out: Path | None) -> Path:
    """Return the folder of a server. Raises InputError if it exists and is not empty, and for
    several runs without one."""
    if out is None and len(runs) > 1:
        fix = "name it: --out FOLDER"
        raise InputError("several runs have no default output folder", where="--out", fix=fix)
    return _refuse_nonempty(out or runs[0] / "export" / target)


def _refuse_nonempty(path: Path) -> Path:
    """Return the folder to write. Raises InputError if something is there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        fix = "remove it, or choose another with --out"
        raise InputError("the output folder already exists", where=str(path), fix=fix)
    return path


def check_request(run: Path, target: str, export_type: str | None) -> None:
    """Raise InputError for an unknown target or type, or a tokenizer that a GGUF cannot hold."""
    if target == LLAMA_SERVER:
        chosen = _choose(MODEL_TYPES, target, export_type)
    elif target in ENGINES:
        chosen = _choose(("",), target, export_type)
    else:
        chosen = choose_type(target, export_type)
    if chosen not in MODEL_TYPES:
        return
    folder = find_weights_dir(run)
    for name in (ADAPTER_DIR, MODEL_DIR):
        file = folder / name / TOKENIZER_FILE
        if file.is_file():
            refuse_unless_bpe(read_model_json(file), file)


def refuse_unless_bpe(tokenizer: Json, file: Path) -> None:
    """Raise InputError unless the content of a tokenizer.json is a BPE with merges."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("merges"):
        message = "only byte-level BPE tokenizers can be written as GGUF"
        raise InputError(message, where=str(file), fix=FALLBACK_HINT)
