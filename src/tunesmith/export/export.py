"""Export a finished run to another format, verified against the run before the folder appears.

In: a run folder and a target of TARGETS. Out: ExportResult. A new target is two functions, a line
in TARGETS and one in request.py. The tolerances follow from measurements (docs/guides/export.md).
Left out: writing the formats (hf.py, gguf.py, ollama.py) and comparing outputs (parity.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import atomic_dir, read_sealed_files
from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.hardware import measure_machine
from tunesmith.core.types import Json, __version__
from tunesmith.evaluate.scale_choice import MAX_SCALE
from tunesmith.export.gguf import reload_gguf, write_gguf
from tunesmith.export.hf import (
    reload_merged,
    reload_peft,
    write_merged_folder,
    write_peft,
)
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
    select_examples,
)
from tunesmith.export.request import choose_output_path, choose_type
from tunesmith.export.source_run import SourceRun, open_source_run


@dataclass(frozen=True)
class ExportFormat:
    """How to write an export and read it back as another program would.

    bytes_per_weight: size of a model weight; 0 for the adapter alone, None for the base's dtype.
    """

    write: Callable[[ExportJob], None]
    reload: Callable[[ExportJob], ReloadedExport]
    tolerance: Tolerance
    bytes_per_weight: float | None = 0


EXACT_TOLERANCE = Tolerance(mean_kl=1e-6, max_kl=1e-4)
FP16_TOLERANCE = Tolerance(mean_kl=1e-4, max_kl=1e-2)
Q8_TOLERANCE = Tolerance(mean_kl=1e-2, max_kl=0.5)
# bf16 keeps eight significant bits of a weight, no more than Q8_0 does.
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
        kind: ExportFormat(write_gguf, reload_gguf, tolerance, width)
        for kind, (tolerance, width) in GGUF_TYPES.items()
    },
    "ollama": {
        kind: ExportFormat(write_ollama, reload_ollama, tolerance, width)
        for kind, (tolerance, width) in GGUF_TYPES.items()
    },
}


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class ExportedFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportResult:
    """An export and its parity with the run. `type` is empty for a target with a single form."""

    target: str
    type: str
    path: str
    files: tuple[ExportedFile, ...]
    parity: Parity
    scale: float = 1.0  # factor on the adapter


def export_run(
    path: Path,
    target: str,
    *,
    kind: str | None = None,
    scale: float = 1.0,
    out: Path | None = None,
) -> ExportResult:
    """Export a run, read the result back as other programs do, and compare its answers.

    Args:
        kind: the type of a GGUF; None for the target's first.
        scale: factor on the adapter.
        out: the new folder; None for RUN/export/TARGET.

    Raises:
        InputError: the run cannot be exported to this target.
        MachineError: verifying the export does not fit in memory.
        GateError: the export does not behave as the run does; nothing is written.
    """
    kind = choose_type(target, kind)
    export_format = TARGETS[target][kind]
    run = _scale_run(open_source_run(path), scale)
    output_path = choose_output_path(path, target, kind, scale=run.scale, out=out)
    _refuse_missing_adapter(run, export_format)
    _refuse_too_large(run, export_format)
    needed_bytes = _estimate_bytes(run, export_format)
    examples = select_examples(run)
    manifest = _build_manifest(run)
    with atomic_dir(
        output_path, metadata=manifest, needed_bytes=needed_bytes, key="--out"
    ) as folder:
        job = ExportJob(run, folder, kind, examples)
        export_format.write(job)
        parity = _verify_export(job, export_format)
    files = tuple(
        ExportedFile(name, file.num_bytes, file.sha256)
        for name, file in read_sealed_files(output_path).items()
    )
    return ExportResult(target, kind, str(output_path), files, parity, run.scale)


def merge_stage(path: Path, model_dir: Path) -> str:
    """Merge the adapter of a finished stage into a new model folder; return the evidence."""
    parity = export_run(path, "merged", out=model_dir).parity
    same = f"{parity.same_answers} of {parity.prompts} answers identical to the run's"
    return f"{same}, mean KL {parity.mean_kl:.1e} nats/token"


def _scale_run(run: SourceRun, scale: float) -> SourceRun:
    """Return the run with its adapter scaled. Raises InputError for a scale that does not apply."""
    where = "--scale"
    fix = f"use a number above 0 and at most {MAX_SCALE:g}, or leave --scale out"
    if scale == 0:
        raise InputError("the adapter at scale 0 is the base model", where=where, fix=fix)
    if not 0 < scale <= MAX_SCALE:
        raise InputError(f"scale {scale:g} is out of range", where=where, fix=fix)
    if scale != 1 and not run.loras:
        message = f"{run.path} trained all weights: there is no adapter to scale"
        raise InputError(message, where=where, fix="leave --scale out")
    return run.with_scale(scale)


def _refuse_missing_adapter(run: SourceRun, export_format: ExportFormat) -> None:
    """Raise InputError for an adapter that does not exist."""
    if export_format.bytes_per_weight == 0 and not run.loras:
        message = "this run trained all weights: there is no adapter"
        raise InputError(message, where=str(run.path), fix="export to merged or gguf")


def _refuse_too_large(run: SourceRun, export_format: ExportFormat) -> None:
    """Raise MachineError when verification, one model in fp32, does not fit in memory."""
    # transformers reads a GGUF through a second copy of the model.
    copies = 2 if export_format.reload in (reload_gguf, reload_ollama) else 1
    needed_bytes = run.model_spec.parameters * 4 * copies
    free_bytes = measure_machine(run.path).available_bytes
    if needed_bytes > free_bytes:
        needed = f"about {format_bytes(needed_bytes)} of memory"
        message = f"verifying the export needs {needed}, {format_bytes(free_bytes)} are free"
        fix = "close other programs, or export on a machine with more memory"
        raise MachineError(message, where=str(run.path), fix=fix)


def _estimate_bytes(run: SourceRun, export_format: ExportFormat) -> int:
    """Return the disk space that the export needs: the weights and the saved files."""
    spec = run.model_spec
    width = export_format.bytes_per_weight
    if width is None:
        width = DTYPE_BYTES[spec.dtype]
    saved_bytes = sum(file.stat().st_size for file in run.saved_dir.rglob("*"))
    return int(width * spec.parameters) + saved_bytes


def _build_manifest(run: SourceRun) -> Json:
    """Return the metadata that say where the exported weights come from."""
    manifest: Json = {
        "tunesmith": __version__,
        "origin": f"{run.model_spec.name}, trained by tunesmith {__version__} in run {run.name}",
        "renderer": run.renderer.fingerprint,
    }
    if run.loras:
        manifest["scale"] = run.scale
    return manifest


def _verify_export(job: ExportJob, export_format: ExportFormat) -> Parity:
    """Read the export back and compare it with the run. Raises GateError when they differ."""
    # The live model first: its memory is free again before the export is loaded.
    live_outputs = compute_live_outputs(job)
    try:
        reloaded = export_format.reload(job)
    except InputError as error:
        message = f"the export cannot be read back: {error.message}"
        fix = "nothing was written; please report this"
        raise GateError(message, where=str(job.run.path), fix=fix) from error
    export_outputs = compute_export_outputs(job, reloaded)
    parity = compare_outputs(job, live_outputs, export_outputs, reloaded)
    refuse_mismatch(export_format.tolerance, parity, job, reloaded)
    return parity
