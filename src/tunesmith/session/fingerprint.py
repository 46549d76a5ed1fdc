"""What a run stands on, and what of it has changed since.

    identity_of(plan, facts, recipe) -> Json        kept as identity.json, and in every manifest of the run
    changes(was, now) -> ["data.data: sha256 0c5e... -> 91d2...", ...]

A run goes on bitwise only from the same recipe, plan, rows, tokenizer, template, weights and libraries, on the same
processor and threads. Other processors and threads round differently and do nothing else, so they are told apart. Left
out: what to do about a change (resumption.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from tunesmith.core.atomic import sha256_of
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json, to_json
from tunesmith.core.types import Json, Plan, __version__
from tunesmith.recipe.fields import own_metric
from tunesmith.session.inputs import Facts

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")  # those whose numbers or tokens end up in the weights
QUANTISING = "bitsandbytes"  # one more, in runs on 4-bit weights or with moments in 8
ROUNDING = "machine."  # fields that change the last bits only
ABSENT = "nothing"


def identity_of(plan: Plan, facts: Facts, recipe: Json) -> Json:
    """`recipe`: the wish as it stands in the run folder. Reads all weights once, at the speed of sha256."""
    folder, renderer = facts.model.path, facts.renderer
    quantising = plan["method"] == "qlora" or plan["optim"] == "adamw_8bit"
    libraries = (*LIBRARIES, QUANTISING) if quantising else LIBRARIES
    files = {role: dataset.fingerprint for role, dataset in facts.datasets.items()}
    for role, path in (("retention_data", facts.recipe.retention_data), ("schema", facts.recipe.answer_schema)):
        if path is not None and path.is_file():
            files[role] = sha256_of(path)
    own = [found[0] for metric in plan["metrics"] if (found := own_metric(metric))]
    files |= {f"metrics.{path.name}": sha256_of(path) for path in own if path.is_file()}
    if facts.adapter is not None:
        files["adapter_from"] = facts.adapter.sha256
    return to_json(
        {
            "tunesmith": __version__,
            "base": facts.model.name,
            "base_sha256": {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))},
            "config": read_json(folder / "config.json"),
            "tokenizer": renderer.tokenizer.sha256,
            "templates": {name: _sha256(template.source) for name, template in renderer.templates.items()},
            "renderer": renderer.fingerprint,
            "end_ids": renderer.end_ids,
            "data": files,
            "recipe": recipe,
            "plan": {key: choice.value for key, choice in plan.choices.items()} | {"steps": plan.steps},
            "versions": {name: facts.machine.versions.get(name) for name in libraries},
            "machine": {"device": facts.machine.device_name, "threads": torch.get_num_threads()},
        }
    )


def read_recipe(file: Path) -> Json:
    """The wish in a run folder. Raises InputError when it was edited into something else than a mapping."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not YAML: {error}", where=str(file), fix="put the file back as it was") from error
    if not isinstance(found, dict):
        raise InputError("not a recipe", where=str(file), fix="put the file back as it was")
    return cast("Json", found)


def changes(was: Json, now: Json) -> list[str]:
    """Field by field, what was and what is. The renderer is named only when its parts do not tell why it differs."""
    before, after = dict(_fields(was)), dict(_fields(now))
    fields = [field for field in {**before, **after} if before.get(field) != after.get(field)]
    if any(field == "tokenizer" or field.startswith("templates.") for field in fields):
        fields = [field for field in fields if field != "renderer"]
    return [f"{field}: {_shown(before.get(field))} -> {_shown(after.get(field))}" for field in fields]


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no mapping; a list counts as one value."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _shown(value: Any) -> str:
    text = ABSENT if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"sha256 {text[:12]}"
    return text if len(text) <= 80 else text[:79] + "…"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
