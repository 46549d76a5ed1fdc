"""What a run can be exported to, and how near to the run each has to be.

In: the words of the user. Out: a `Format` with its two halves, and where the result goes. A new
target is two functions and a line in TARGETS. The tolerances were chosen from what was measured
(docs/guides/export.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tunesmith.core.atomic import format_bytes, read_manifest
from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.core.hardware import measure_machine
from tunesmith.core.types import Json, __version__
from tunesmith.evaluate.scale_choice import MAX_SCALE
from tunesmith.export.gguf.write import reload_gguf, reload_lora, write_gguf, write_lora
from tunesmith.export.hf import reload_merged, reload_peft, write_merged_folder, write_peft
from tunesmith.export.merge_base import MergeBase
from tunesmith.export.ollama import reload_ollama, write_ollama
from tunesmith.export.parity import (
    ExportJob,
    Parity,
    ReloadedExport,
    Tolerance,
    compare_outputs,
    compute_export_outputs,
    compute_live_outputs,
    refuse_mismatch,
)
from tunesmith.export.source_run import SourceRun


@dataclass(frozen=True)
class ExportFormat:
    """`write` fills the job's folder, `reread` reads it as another program would. `width`: bytes
    for each weight of the model; 0 for the adapter alone, None for the base's own."""

    write: Callable[[ExportJob], None]
    reload: Callable[[ExportJob], ReloadedExport]
    tolerance: Tolerance
    bytes_per_weight: float | None = 0


@dataclass(frozen=True)
class ExportedFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportResult:
    """What `tunesmith export` made, and how near it is to the run. `type` is empty where a target
    has one form; `base`: what the adapter was merged into."""

    target: str
    type: str
    path: str
    files: tuple[ExportedFile, ...]
    parity: Parity
    base: MergeBase
    scale: float = 1.0  # of the adapter


def find_format(target: str, export_type: str | None) -> tuple[str, ExportFormat]:
    """(type, format) that was asked for; without a type, the first of the target. InputError for
    what there is not."""
    if target not in TARGETS:
        matches = get_close_matches(target, TARGETS, n=1)
        fix = f"{f'did you mean {matches[0]}? ' if matches else ''}use one of {', '.join(TARGETS)}"
        raise InputError(f"there is no export target {target!r}", where="--to", fix=fix)
    formats = TARGETS[target]
    chosen = next(iter(formats)) if export_type is None else export_type
    if chosen not in formats:
        fix = f"use one of {', '.join(formats)}" if len(formats) > 1 else "leave --type out"
        raise InputError(f"{target} has no type {chosen!r}", where="--type", fix=fix)
    return chosen, formats[chosen]


def scale_run(run: SourceRun, scale: float) -> SourceRun:
    """The run with its adapter scaled. InputError for a scale that is none, and for a run without
    an adapter."""
    where, fix = (
        "--scale",
        f"a scale is a number above 0, at most {MAX_SCALE:g}; as trained, leave it out",
    )
    if scale == 0:
        raise InputError("the adapter times 0 is the base itself", where=where, fix=fix)
    if not 0 < scale <= MAX_SCALE:
        raise InputError(f"{scale:g} is no scale to export", where=where, fix=fix)
    if scale != 1 and not run.loras:
        message = f"this run trained all weights: there is no adapter to scale ({run.path})"
        raise InputError(message, where=where, fix="leave --scale out")
    return run.with_scale(scale)


def choose_output_path(run: SourceRun, target: str, export_type: str, out: Path | None) -> Path:
    """Where the export goes. InputError if there is something already."""
    name = "-".join(part for part in (target, export_type) if part) + (
        "" if run.scale == 1 else f"@{run.scale:g}"
    )
    path = out or run.path / "export" / name
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            "there is something already",
            where=str(path),
            fix="remove it, or choose another with --out",
        )
    return path


def refuse_unsupported(run: SourceRun, export_format: ExportFormat) -> None:
    """InputError for an adapter of a run that has none, or one that the format cannot hold,
    MachineError for a proof that does not fit in memory: one model in fp32, which transformers
    reads from a GGUF through a copy of it."""
    if export_format.bytes_per_weight == 0 and not run.loras:
        message = "this run trained all weights: there is no adapter"
        raise InputError(message, where=str(run.path), fix="export to merged or gguf")
    if export_format.write is write_lora and run.token_rows:
        message = "a GGUF adapter has no place for the rows of new tokens"
        raise InputError(
            message,
            where=str(run.path),
            fix="export to merged or gguf, with the rows in the weights",
        )
    if export_format.write is write_lora and any(
        lora.magnitude_O is not None for lora in run.loras.values()
    ):
        message = "a GGUF adapter has no place for DoRA's magnitudes"
        raise InputError(
            message,
            where=str(run.path),
            fix="export to merged or gguf, with the adapter in the weights",
        )
    needed_bytes = (
        run.model_spec.parameters
        * 4
        * (2 if export_format.reload in (reload_gguf, reload_ollama) else 1)
    )
    free_bytes = measure_machine(run.path).available_bytes
    if needed_bytes > free_bytes:
        message = f"the proof of the export needs about {format_bytes(needed_bytes)} of memory, {format_bytes(free_bytes)} are free"
        raise MachineError(
            message,
            where=str(run.path),
            fix="end other programs, or export on a machine with more memory",
        )


def verify_export(job: ExportJob, export_format: ExportFormat) -> Parity:
    """What was written, read back and compared with the run. GateError when it is not the run."""
    live_outputs = compute_live_outputs(job)
    try:
        reloaded = export_format.reload(job)
    except InputError as error:
        message = f"the export cannot be read back: {error.message}"
        raise GateError(
            message, where=str(job.run.path), fix="nothing was written; please report this"
        ) from error
    parity = compare_outputs(job, live_outputs, compute_export_outputs(job, reloaded), reloaded)
    refuse_mismatch(export_format.tolerance, parity, job, reloaded)
    return parity


def build_manifest(run: SourceRun) -> Json:
    """What the manifest of an export says: where its weights come from."""
    origin = f"{run.model_spec.name}, trained by tunesmith {__version__} in the run {run.name}"
    scale = {"scale": run.scale} if run.loras else {}
    return {
        "tunesmith": __version__,
        "origin": origin,
        "renderer": run.renderer.fingerprint,
        **scale,
    }


def estimate_export_bytes(run: SourceRun, export_format: ExportFormat) -> int:
    spec = run.model_spec
    bytes_per_weight = (
        DTYPE_BYTES[spec.dtype]
        if export_format.bytes_per_weight is None
        else export_format.bytes_per_weight
    )
    return int(bytes_per_weight * spec.parameters) + sum(
        file.stat().st_size for file in run.saved_dir.rglob("*")
    )


def describe_export(
    path: Path, target: str, export_type: str, parity: Parity, base: MergeBase
) -> ExportResult:
    manifest = read_manifest(path)
    files = tuple(
        ExportedFile(name, entry["bytes"], entry["sha256"])
        for name, entry in manifest["files"].items()
    )
    return ExportResult(
        target, export_type, str(path), files, parity, base, manifest.get("scale", 1.0)
    )


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

EXACT_TOLERANCE = Tolerance(mean_kl=1e-6, max_kl=1e-4)
FP16_TOLERANCE = Tolerance(mean_kl=1e-4, max_kl=1e-2)
Q8_TOLERANCE = Tolerance(mean_kl=1e-2, max_kl=0.5)
# BF16 keeps eight significant bits of a weight, no more than Q8_0 does
BF16_TOLERANCE = Q8_TOLERANCE

GGUF_TYPES = {
    "f16": (FP16_TOLERANCE, 2),
    "q8_0": (Q8_TOLERANCE, 34 / 32),
    "bf16": (BF16_TOLERANCE, 2),
    "f32": (EXACT_TOLERANCE, 4),
}

TARGETS: dict[str, dict[str, ExportFormat]] = {
    "peft": {"": ExportFormat(write_peft, reload_peft, EXACT_TOLERANCE)},
    "merged": {"": ExportFormat(write_merged_folder, reload_merged, BF16_TOLERANCE, None)},
    "gguf": {
        **{
            kind: ExportFormat(write_gguf, reload_gguf, allowed, width)
            for kind, (allowed, width) in GGUF_TYPES.items()
        },
        "lora": ExportFormat(write_lora, reload_lora, EXACT_TOLERANCE),
    },
    "ollama": {
        kind: ExportFormat(write_ollama, reload_ollama, tolerance, width)
        for kind, (tolerance, width) in GGUF_TYPES.items()
    },
}
