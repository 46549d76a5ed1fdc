"""Export targets: how each one is written, read back, and how close to the run it must be.

In: the target and type that the user asked for. Out: an ExportFormat.
A new target is two functions, a line in TARGETS and one in request.py; those for servers of
other projects are in server_files.py. The tolerances follow from measurements
(docs/guides/export.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.export.gguf.write import reload_gguf, reload_lora, write_gguf, write_lora
from tunesmith.export.hf import (
    reload_merged,
    reload_peft,
    write_hub,
    write_merged_folder,
    write_peft,
)
from tunesmith.export.ollama import reload_ollama, write_ollama
from tunesmith.export.parity import ExportJob, ReloadedExport, Tolerance
from tunesmith.export.per_expert import reload_per_expert, write_per_expert
from tunesmith.export.request import PER_EXPERT, choose_type


@dataclass(frozen=True)
class ExportFormat:
    """How to write an export and read it back as another program would.

    bytes_per_weight: size of a model weight; 0 for the adapter alone, None for the base's dtype.
    """

    write: Callable[[ExportJob], None]
    reload: Callable[[ExportJob], ReloadedExport]
    tolerance: Tolerance
    bytes_per_weight: float | None = 0


def find_format(target: str, export_type: str | None) -> tuple[str, ExportFormat]:
    """Return the export type and its format; without a type, the target's first one.

    Raises InputError for an unknown target or type.
    """
    chosen = choose_type(target, export_type)
    return chosen, TARGETS[target][chosen]


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
    "peft": {
        "": ExportFormat(write_peft, reload_peft, EXACT_TOLERANCE),
        PER_EXPERT: ExportFormat(write_per_expert, reload_per_expert, EXACT_TOLERANCE),
    },
    "merged": {"": ExportFormat(write_merged_folder, reload_merged, BF16_TOLERANCE, None)},
    "gguf": {
        kind: ExportFormat(write_gguf, reload_gguf, tolerance, width)
        for kind, (tolerance, width) in GGUF_TYPES.items()
    }
    | {"lora": ExportFormat(write_lora, reload_lora, EXACT_TOLERANCE)},
    "ollama": {
        kind: ExportFormat(write_ollama, reload_ollama, tolerance, width)
        for kind, (tolerance, width) in GGUF_TYPES.items()
    },
    "hub": {"": ExportFormat(write_hub, reload_peft, EXACT_TOLERANCE)},
}
