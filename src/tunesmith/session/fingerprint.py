"""What the bytes of a run depend on: its identity, recipe, plan, rows, kernels and libraries.

    build_fingerprint(plan, inputs, recipe) -> Json   fingerprint.json, and every manifest

Another processor, or another compiler of the same kernels, only rounds differently, so these fields
have a prefix of their own. Left out: comparing two fingerprints (identity.py)."""

from __future__ import annotations

import dataclasses

import torch

from tunesmith.core.atomic import hash_file
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json, Machine, Plan, __version__
from tunesmith.model.kernels.build import Kernels, load_kernels
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.session.identity import identify
from tunesmith.session.inputs import RunInputs

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")  # they determine tokens or numbers
GPU_LIBRARIES = ("triton", "fla-core")  # whose kernels run there
QUANTIZATION_LIBRARY = "bitsandbytes"  # in runs with 4-bit weights or 8-bit moments


def build_fingerprint(
    plan: Plan,
    inputs: RunInputs,
    recipe: Json,
    base_sha256: dict[str, str] | None = None,
) -> Json:
    """Return the fingerprint of a run; `recipe` is that of the run folder."""
    is_quantized = plan.config.method == "qlora" or plan.config.optim == "adamw_8bit"
    libraries = (*LIBRARIES, QUANTIZATION_LIBRARY) if is_quantized else LIBRARIES
    if inputs.machine.device == "cuda":
        libraries += GPU_LIBRARIES
    files = {role: dataset.fingerprint for role, dataset in inputs.datasets.items()}
    for role, path in (
        ("retention_data", inputs.recipe.general_texts),
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
    identity = identify(inputs.model.name, inputs.model.path, inputs.renderer, base_sha256)
    return to_jsonable(
        {
            "tunesmith": __version__,
            **dataclasses.asdict(identity),
            "data": files,
            "recipe": recipe,
            "plan": plan.values | {"steps": plan.steps},
            "versions": {name: inputs.machine.versions.get(name) for name in libraries},
            "kernels": kernels.describe() if kernels else "not used",
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
