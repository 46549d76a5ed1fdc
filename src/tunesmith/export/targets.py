"""What a run can be exported to, and how near to the run each has to be.

In: the words of the user. Out: a `Format` with its two halves, and where the result goes. A new target is two
functions and a line in TARGETS. The tolerances were chosen from what was measured (docs/export.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tunesmith.core.atomic import read_manifest, size
from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.core.hardware import measure_machine
from tunesmith.core.types import Json, __version__
from tunesmith.evaluate.scale_choice import LARGEST
from tunesmith.export.gguf.write import reread_gguf, reread_lora, write_gguf, write_lora
from tunesmith.export.hf import reread_merged, reread_peft, write_merged_folder, write_peft
from tunesmith.export.merge_base import BaseChoice
from tunesmith.export.ollama import reread_ollama, write_ollama
from tunesmith.export.parity import (
    Job,
    Parity,
    Reread,
    Tolerance,
    compare,
    export_answers,
    live_answers,
    refuse_beyond,
)
from tunesmith.export.source_run import Finished


@dataclass(frozen=True)
class Format:
    """`write` fills the job's folder, `reread` reads it as another program would. `width`: bytes for each weight of
    the model; 0 for the adapter alone, None for the base's own."""

    write: Callable[[Job], None]
    reread: Callable[[Job], Reread]
    tolerance: Tolerance
    width: float | None = 0


@dataclass(frozen=True)
class ExportedFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Exported:
    """What `tunesmith export` made, and how near it is to the run. `type` is empty where a target has one form; `base`:
    what the adapter was merged into."""

    target: str
    type: str
    path: str
    files: tuple[ExportedFile, ...]
    parity: Parity
    base: BaseChoice
    scale: float = 1.0  # of the adapter


def format_of(target: str, kind: str | None) -> tuple[str, Format]:
    """(type, format) that was asked for; without a type, the first of the target. InputError for what there is not."""
    if target not in TARGETS:
        near = get_close_matches(target, TARGETS, n=1)
        fix = f"{f'did you mean {near[0]}? ' if near else ''}use one of {', '.join(TARGETS)}"
        raise InputError(f"there is no export target {target!r}", where="--to", fix=fix)
    formats = TARGETS[target]
    chosen = next(iter(formats)) if kind is None else kind
    if chosen not in formats:
        fix = f"use one of {', '.join(formats)}" if len(formats) > 1 else "leave --type out"
        raise InputError(f"{target} has no type {chosen!r}", where="--type", fix=fix)
    return chosen, formats[chosen]


def at_scale(run: Finished, scale: float) -> Finished:
    """The run with its adapter scaled. InputError for a scale that is none, and for a run without an adapter."""
    where, fix = "--scale", f"a scale is a number above 0, at most {LARGEST:g}; as trained, leave it out"
    if scale == 0:
        raise InputError("the adapter times 0 is the base itself", where=where, fix=fix)
    if not 0 < scale <= LARGEST:
        raise InputError(f"{scale:g} is no scale to export", where=where, fix=fix)
    if scale != 1 and not run.loras:
        what = f"this run trained all weights: there is no adapter to scale ({run.path})"
        raise InputError(what, where=where, fix="leave --scale out")
    return run.scaled(scale)


def place_of(run: Finished, target: str, kind: str, out: Path | None) -> Path:
    """Where the export goes. InputError if there is something already."""
    name = "-".join(part for part in (target, kind) if part) + ("" if run.scale == 1 else f"@{run.scale:g}")
    place = out or run.path / "export" / name
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError("there is something already", where=str(place), fix="remove it, or choose another with --out")
    return place


def refuse_what_it_lacks(run: Finished, form: Format) -> None:
    """InputError for an adapter of a run that has none, or one that the format cannot hold, MachineError for a
    proof that does not fit in memory: one model in fp32, which transformers reads from a GGUF through a copy of it."""
    if form.width == 0 and not run.loras:
        what = "this run trained all weights: there is no adapter"
        raise InputError(what, where=str(run.path), fix="export to merged or gguf")
    if form.write is write_lora and run.rows:
        what = "a GGUF adapter has no place for the rows of new tokens"
        raise InputError(what, where=str(run.path), fix="export to merged or gguf, with the rows in the weights")
    if form.write is write_lora and any(lora.magnitude_O is not None for lora in run.loras.values()):
        what = "a GGUF adapter has no place for DoRA's magnitudes"
        raise InputError(what, where=str(run.path), fix="export to merged or gguf, with the adapter in the weights")
    needed = run.weights.parameters * 4 * (2 if form.reread in (reread_gguf, reread_ollama) else 1)
    free = measure_machine(run.path).available_bytes
    if needed > free:
        what = f"the proof of the export needs about {size(needed)} of memory, {size(free)} are free"
        raise MachineError(what, where=str(run.path), fix="end other programs, or export on a machine with more memory")


def proven(job: Job, form: Format) -> Parity:
    """What was written, read back and compared with the run. GateError when it is not the run."""
    live = live_answers(job)
    try:
        reread = form.reread(job)
    except InputError as error:
        what = f"the export cannot be read back: {error.what}"
        raise GateError(what, where=str(job.run.path), fix="nothing was written; please report this") from error
    parity = compare(job, live, export_answers(job, reread), reread)
    refuse_beyond(form.tolerance, parity, job, reread)
    return parity


def facts_of(run: Finished) -> Json:
    """What the manifest of an export says: where its weights come from."""
    origin = f"{run.weights.name}, trained by tunesmith {__version__} in the run {run.name}"
    scale = {"scale": run.scale} if run.loras else {}
    return {"tunesmith": __version__, "origin": origin, "renderer": run.renderer.fingerprint, **scale}


def bytes_needed(run: Finished, form: Format) -> int:
    spec = run.weights
    width = WIDTHS[spec.dtype] if form.width is None else form.width
    return int(width * spec.parameters) + sum(file.stat().st_size for file in run.saved.rglob("*"))


def exported(place: Path, target: str, kind: str, parity: Parity, base: BaseChoice) -> Exported:
    sealed = read_manifest(place)
    found = tuple(ExportedFile(name, entry["bytes"], entry["sha256"]) for name, entry in sealed["files"].items())
    return Exported(target, kind, str(place), found, parity, base, sealed.get("scale", 1.0))


WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}

EXACT = Tolerance(mean_kl=1e-6, max_kl=1e-4)
HALF = Tolerance(mean_kl=1e-4, max_kl=1e-2)
EIGHT_BITS = Tolerance(mean_kl=1e-2, max_kl=0.5)
BRAIN = EIGHT_BITS  # BF16 keeps eight significant bits of a weight, no more than Q8_0 does

GGUF = {"f16": (HALF, 2), "q8_0": (EIGHT_BITS, 34 / 32), "bf16": (BRAIN, 2), "f32": (EXACT, 4)}

TARGETS: dict[str, dict[str, Format]] = {
    "peft": {"": Format(write_peft, reread_peft, EXACT)},
    "merged": {"": Format(write_merged_folder, reread_merged, BRAIN, None)},
    "gguf": {
        **{kind: Format(write_gguf, reread_gguf, allowed, width) for kind, (allowed, width) in GGUF.items()},
        "lora": Format(write_lora, reread_lora, EXACT),
    },
    "ollama": {
        kind: Format(write_ollama, reread_ollama, tolerance, width) for kind, (tolerance, width) in GGUF.items()
    },
}
