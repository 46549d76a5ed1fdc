"""What a run stands on, and what of it has changed since.

    identity_of(plan, facts, recipe) -> Json        kept as fingerprint.json, and in every manifest of the run
    changes(was, now) -> ["data.data: sha256 0c5e... -> 91d2...", ...]

A run goes on bitwise only from the same recipe, plan, rows, tokenizer, template, weights and
libraries, on the same processor and threads. Other processors and threads round differently and do
nothing else, so they are told apart. Left out: what to do about a change (resumption.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json, to_jsonable
from tunesmith.core.types import Json, Plan, __version__
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.session.inputs import RunInputs

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
)  # those whose numbers or tokens end up in the weights
QUANTIZATION_LIBRARY = "bitsandbytes"  # one more, in runs on 4-bit weights or with moments in 8
ROUNDING_PREFIX = "machine."  # fields that change the last bits only
ABSENT_TEXT = "nothing"


def build_fingerprint(plan: Plan, inputs: RunInputs, recipe: Json) -> Json:
    """`recipe`: the wish as it stands in the run folder. Reads all weights once, at the speed of
    sha256."""
    folder, renderer = inputs.model.path, inputs.renderer
    is_quantized = plan.config.method == "qlora" or plan.config.optim == "adamw_8bit"
    libraries = (*LIBRARIES, QUANTIZATION_LIBRARY) if is_quantized else LIBRARIES
    files = {role: dataset.fingerprint for role, dataset in inputs.datasets.items()}
    for role, path in (
        ("retention_data", inputs.recipe.retention_data),
        ("response_schema", inputs.recipe.response_schema),
    ):
        if path is not None and path.is_file():
            files[role] = hash_file(path)
    metric_files = [
        parsed[0] for metric in plan.config.metrics if (parsed := parse_custom_metric(metric))
    ]
    files |= {f"metrics.{path.name}": hash_file(path) for path in metric_files if path.is_file()}
    if inputs.adapter is not None:
        files["adapter_from"] = inputs.adapter.sha256
    return to_jsonable(
        {
            "tunesmith": __version__,
            "base": inputs.model.name,
            "base_sha256": {
                file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))
            },
            "config": read_json(folder / "config.json"),
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
            "machine": {"device": inputs.machine.device_name, "threads": torch.get_num_threads()},
        }
    )


def read_recipe(file: Path) -> Json:
    """The wish in a run folder. Raises InputError when it was edited into something else than a
    mapping."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"not YAML: {error}", where=str(file), fix="put the file back as it was"
        ) from error
    if not isinstance(recipe, dict):
        raise InputError("not a recipe", where=str(file), fix="put the file back as it was")
    return cast("Json", recipe)


def list_changes(stored: Json, current: Json) -> list[str]:
    """Field by field, what was and what is. The renderer is named only when its parts do not tell
    why it differs."""
    stored_fields, current_fields = dict(_flatten(stored)), dict(_flatten(current))
    fields = [
        field
        for field in {**stored_fields, **current_fields}
        if stored_fields.get(field) != current_fields.get(field)
    ]
    if any(field == "tokenizer" or field.startswith("templates.") for field in fields):
        fields = [field for field in fields if field != "renderer"]
    return [
        f"{field}: {_format_value(stored_fields.get(field))} -> {_format_value(current_fields.get(field))}"
        for field in fields
    ]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no mapping; a list counts as one value."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from _flatten(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _format_value(value: Any) -> str:
    text = ABSENT_TEXT if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"sha256 {text[:12]}"
    return text if len(text) <= 80 else text[:79] + "…"


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
