"""What a run has to know of the model that its training starts from, taken once, before any weight has changed.

    before.json         its measures, item by item
    base-states/        its final hidden states on the texts and answers that are measured, where nothing brings the
                        base back afterwards: all weights are trained, or an adapter goes on; gone with the run's end

Left out: what is measured (measure.py), how far a model is from its base (evaluate/divergence.py).
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.atomic import new_folder, remove_folder
from tunesmith.core.events import GENERAL
from tunesmith.core.json_io import from_json, read_json
from tunesmith.core.run_dir import BEFORE, RunFolder
from tunesmith.core.types import Document, Json, Plan
from tunesmith.evaluate.answer_cache import ANSWERS, Store, state_of
from tunesmith.evaluate.general_text import pieces_of
from tunesmith.evaluate.kl_divergence import Kept, Switched, keep
from tunesmith.evaluate.measure import Bases, Items, answers_of, measure, text_window
from tunesmith.evaluate.results import Measured
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.model.hub.provenance import hashes_of
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench

STATES = "base-states"
SWITCHED: Bases = {GENERAL: Switched(), "test": Switched()}  # an adapter that began with nothing is switched off


def before(folder: RunFolder, bench: Workbench, items: Items, identity: Json) -> Measured:
    """The measures of the model before training."""
    if not (folder.path / BEFORE).exists():
        store = store_of(folder.path, identity, bench.facts.adapter)
        folder.write_json(BEFORE, measure(bench, items, step=0, store=store))
    return from_json(Measured, read_json(folder.path / BEFORE))


def store_of(path: Path, identity: Json, weights: AdapterFolder | Path | None) -> Store:
    """Where a run keeps the answers of its base, of the adapter that it began with, or of what a folder holds."""
    hashes = hashes_of(weights) if isinstance(weights, Path) else {"start": weights.sha256} if weights else {}
    return Store(path / ANSWERS, state_of(identity, hashes))


def bases(folder: RunFolder, bench: Workbench, items: Items) -> Bases:
    """What the trained model will be compared with."""
    if is_switched(bench.plan, bench.facts):
        return SWITCHED
    if not (folder.path / STATES).exists():
        _keep(folder, bench, items)
    return dict(zip(NAMES, Kept.read(folder.path / STATES, NAMES.values(), bench.model.device), strict=True))


def is_switched(plan: Plan, facts: Facts) -> bool:
    return plan["method"] != "full" and facts.adapter is None


def forget(folder: RunFolder) -> None:
    """The states, once the run is measured."""
    if (folder.path / STATES).exists():
        remove_folder(folder.path / STATES)


NAMES = {GENERAL: "general", "test": "answers"}


def _keep(folder: RunFolder, bench: Workbench, items: Items) -> None:
    bench.model.network.eval()
    plan, window = bench.plan, text_window(bench)
    documents: dict[str, list[Document]] = {
        GENERAL: pieces_of(items.texts, bench.renderer.text_tokens, window)[0],
        "test": answers_of(items.test_documents),
    }
    packing = {GENERAL: (window, False), "test": (plan["pack_length"], plan["share_prefixes"])}
    tokens = sum(int((document.weights_L > 0).sum()) for found in documents.values() for document in found)
    needed = tokens * plan.model.hidden_size * bench.model.dtype.itemsize
    with new_folder(folder.path / STATES, facts={}, needed_bytes=needed) as scratch:
        for task, (length, share) in packing.items():
            keep(bench.model, documents[task], length, share=share).write(scratch, NAMES[task])
