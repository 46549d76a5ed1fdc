"""The fingerprint of a run: everything that its weights depend on, and what has changed since.

    build_fingerprint(plan, inputs, recipe) -> Json     fingerprint.json, and every manifest
    list_changes(stored, current) -> ["data.data: sha256 0c5e... -> 91d2...", ...]

A resumed run is bitwise identical only with the same recipe, plan, rows, tokenizer, template,
weights, kernels and libraries, on the same processor and threads. Another processor, or another
compiler of the same kernels, only rounds differently, so these fields have a prefix of their own.
Left out: what to do about a change (train/resume.py).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import iter_leaves, read_file, read_json, to_jsonable
from tunesmith.core.types import Json, Machine, Plan, __version__
from tunesmith.model.hub.base_config import encode_special_floats
from tunesmith.model.kernels.build import Kernels, load_kernels
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.recipe.yaml_lines import load_yaml
from tunesmith.session.inputs import RunInputs

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")  # they determine tokens or numbers
GPU_LIBRARIES = ("triton", "fla-core")  # whose kernels run there
QUANTIZATION_LIBRARY = "bitsandbytes"  # in runs with 4-bit weights or 8-bit moments
ROUNDING_PREFIX = "machine."  # fields that only change the last bits
ABSENT_TEXT = "none"
UNUSED_KERNELS = "not used"
PACKAGE_DIR = Path(__file__).parents[1]
SOURCE_SUFFIXES = (".py", ".c", ".h")


@lru_cache
def hash_source(folder: Path = PACKAGE_DIR) -> str:
    """Return a digest of tunesmith's own files, for two checkouts may have the same version."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(f"{path.relative_to(folder)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def build_fingerprint(
    plan: Plan, inputs: RunInputs, recipe: Json, base_sha256: Json | None = None
) -> Json:
    """Return the fingerprint of a run; `recipe` is that of the run folder.

    Reads all weights once, at the speed of sha256, unless their hashes are given."""
    folder = inputs.model.path
    renderer = inputs.renderer
    is_quantized = plan.config.method == "qlora" or plan.config.optim == "adamw_8bit"
    libraries = (*LIBRARIES, QUANTIZATION_LIBRARY) if is_quantized else LIBRARIES
    if inputs.machine.device == "cuda":
        libraries += GPU_LIBRARIES
    files = {role: dataset.fingerprint for role, dataset in inputs.datasets.items()}
    for role, path in (
        ("retention_data", inputs.recipe.retention_data),
        ("response_schema", inputs.recipe.response_schema),
    ):
        if path is not None and path.is_file():
            files[role] = hash_file(path)
    for metric in plan.config.metrics:
        parsed = parse_custom_metric(metric)
        if parsed is not None and parsed[0].is_file():
            files[f"metrics.{parsed[0].name}"] = hash_file(parsed[0])
    if inputs.adapter is not None:
        files["adapter_from"] = inputs.adapter.sha256
    kernels = get_kernels(plan, inputs.machine)
    if base_sha256 is None:
        base_sha256 = {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return to_jsonable(
        {
            "tunesmith": __version__,
            "base": inputs.model.name,
            "base_sha256": base_sha256,
            "config": encode_special_floats(read_json(folder / "config.json")),
            "tokenizer": renderer.tokenizer.sha256,
            "templates": {
                name: _hash_text(template.source) for name, template in renderer.templates.items()
            },
            "renderer": renderer.fingerprint,
            "end_ids": renderer.end_ids,
            "data": files,
            "recipe": recipe,
            "plan": plan.values | {"steps": plan.steps},
            "versions": {name: inputs.machine.versions.get(name) for name in libraries},
            "kernels": kernels.describe() if kernels else UNUSED_KERNELS,
            "machine": {
                "device": inputs.machine.device_name,
                "threads": torch.get_num_threads(),
                "kernels": kernels.sha256 if kernels else "",
            },
        }
    )


def get_kernels(plan: Plan, machine: Machine) -> Kernels | None:
    """Return the C kernels of a run, None if it has no bf16 tensors on the CPU."""
    return load_kernels() if plan.config.dtype == "bf16" and machine.device == "cpu" else None


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
    text = ABSENT_TEXT if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"sha256 {text[:12]}"
    return text if len(text) <= 80 else text[:79] + "…"


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
