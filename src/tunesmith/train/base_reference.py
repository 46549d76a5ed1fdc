"""What a run has to know of the model that its training starts from, taken once, before any weight
has changed.

    before.json         its measures, item by item
    base-states/        its final hidden states on the texts and answers that are measured, where nothing brings the
                        base back afterwards: all weights are trained, or an adapter goes on; gone with the run's end

Left out: what is measured (measure.py), how far a model is from its base (evaluate/divergence.py).
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.atomic import atomic_dir, remove_folder
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import EVAL_BEFORE_FILE, RunFolder
from tunesmith.core.types import Document, Json, Plan
from tunesmith.evaluate.answer_cache import ANSWERS_FILE, AnswerCache, hash_weights
from tunesmith.evaluate.general_text import split_texts
from tunesmith.evaluate.kl_divergence import AdapterDisabled, CachedStates, cache_states
from tunesmith.evaluate.measure import (
    BaseReferences,
    EvalItems,
    compute_text_window,
    measure_items,
    select_answers,
)
from tunesmith.evaluate.results import EvalResults
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.model.hub.provenance import hash_weight_files
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session

STATES_DIR = "base-states"
ADAPTER_DISABLED: BaseReferences = {
    GENERAL_TASK: AdapterDisabled(),
    "test": AdapterDisabled(),
}  # an adapter that began with nothing is switched off


def measure_before_training(
    folder: RunFolder, session: Session, items: EvalItems, fingerprint: Json
) -> EvalResults:
    """The measures of the model before training."""
    if not (folder.path / EVAL_BEFORE_FILE).exists():
        answer_cache = open_answer_cache(folder.path, fingerprint, session.inputs.adapter)
        folder.write_json(
            EVAL_BEFORE_FILE, measure_items(session, items, step=0, cache=answer_cache)
        )
    return parse_as(EvalResults, read_json(folder.path / EVAL_BEFORE_FILE))


def open_answer_cache(
    path: Path, fingerprint: Json, weights: AdapterFolder | Path | None
) -> AnswerCache:
    """Where a run keeps the answers of its base, of the adapter that it began with, or of what a
    folder holds."""
    hashes = (
        hash_weight_files(weights)
        if isinstance(weights, Path)
        else {"start": weights.sha256}
        if weights
        else {}
    )
    return AnswerCache(path / ANSWERS_FILE, hash_weights(fingerprint, hashes))


def load_base_references(folder: RunFolder, session: Session, items: EvalItems) -> BaseReferences:
    """What the trained model will be compared with."""
    if can_disable_adapter(session.plan, session.inputs):
        return ADAPTER_DISABLED
    if not (folder.path / STATES_DIR).exists():
        _cache_base_states(folder, session, items)
    return dict(
        zip(
            STATE_NAMES,
            CachedStates.load_files(
                folder.path / STATES_DIR, STATE_NAMES.values(), session.model.device
            ),
            strict=True,
        )
    )


def can_disable_adapter(plan: Plan, inputs: RunInputs) -> bool:
    return plan["method"] != "full" and inputs.adapter is None


def delete_base_states(folder: RunFolder) -> None:
    """The states, once the run is measured."""
    if (folder.path / STATES_DIR).exists():
        remove_folder(folder.path / STATES_DIR)


STATE_NAMES = {GENERAL_TASK: "general", "test": "answers"}


def _cache_base_states(folder: RunFolder, session: Session, items: EvalItems) -> None:
    session.model.network.eval()
    plan, window = session.plan, compute_text_window(session)
    documents: dict[str, list[Document]] = {
        GENERAL_TASK: split_texts(items.general_texts, session.renderer.encode_text, window)[0],
        "test": select_answers(items.test_documents),
    }
    packing = {GENERAL_TASK: (window, False), "test": (plan["pack_length"], plan["share_prefixes"])}
    tokens = sum(
        int((document.weights_L > 0).sum())
        for task_documents in documents.values()
        for document in task_documents
    )
    needed = tokens * plan.model.hidden_size * session.model.dtype.itemsize
    with atomic_dir(folder.path / STATES_DIR, metadata={}, needed_bytes=needed) as scratch:
        for task, (length, share_prefixes) in packing.items():
            cache_states(session.model, documents[task], length, share=share_prefixes).save_files(
                scratch, STATE_NAMES[task]
            )
