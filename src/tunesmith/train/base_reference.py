"""What a run has to know of the model that its training starts from, taken once, before any weight
has changed.

    before.json         its measures, item by item
    base-states/        its final hidden states on the texts and answers that are measured, where nothing brings the
                        base back afterwards: all weights are trained, or an adapter goes on; gone with the run's end

Left out: what is measured (measure.py), how far a model is from its base (evaluate/divergence.py).
"""

from __future__ import annotations

import dataclasses

from tunesmith.core.atomic import atomic_dir, remove_folder
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import EVAL_BEFORE_FILE, RunFolder
from tunesmith.core.types import Document, Json, Plan
from tunesmith.data.sampler import StepSampler
from tunesmith.evaluate.answer_cache import open_answer_cache
from tunesmith.evaluate.general_text import split_texts
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.kl_divergence import AdapterDisabled, CachedStates, cache_states
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.measure import (
    BaseReferences,
    compute_text_window,
    measure_items,
    select_answers,
)
from tunesmith.evaluate.results import EvalResults
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session
from tunesmith.train.losses import REFERENCE_LOSSES

REFERENCE_FILE = "reference.json"  # row -> log-probabilities of its documents before training
BATCH_ROWS = 64
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
    return plan.config.method != "full" and inputs.adapter is None


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
    packing = {GENERAL_TASK: (window, False), "test": (plan.config.pack_length, plan.config.share_prefixes)}
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


# ---------------------------------------------------------------- DPO


def add_references(session: Session, folder: RunFolder) -> Session:
    """Return the session with the log-probabilities that DPO compares with.

    They are computed once, before any weight changes, and every later attempt reads them from the
    run folder. A fresh adapter needs none: switched off, it leaves the base model.
    """
    plan = session.plan
    is_fresh = plan.config.method != "full" and plan.config.adapter_from is None
    if is_fresh or plan.config.loss is None or plan.config.loss not in REFERENCE_LOSSES:
        return session
    if not (folder.path / REFERENCE_FILE).exists():
        folder.write_json(REFERENCE_FILE, _compute_reference_logps(session))
    references = read_json(folder.path / REFERENCE_FILE)
    logps = {int(row): values for row, values in references.items()}
    return dataclasses.replace(session, reference_logps=logps)


def _compute_reference_logps(session: Session) -> dict[int, list[float]]:
    session.model.network.eval()
    plan = session.plan
    sampler = session.sampler
    assert isinstance(sampler, StepSampler), "pairs are rows"
    trained_rows: set[int] = set()
    for step in range(1, plan.steps + 1):
        trained_rows.update(sampler.get_rows(step))
    rows = sorted(trained_rows)
    logps: dict[int, list[float]] = {}
    for start in range(0, len(rows), BATCH_ROWS):
        document_rows: list[int] = []
        documents: list[Document] = []
        for row in rows[start : start + BATCH_ROWS]:
            for document in session.rows.render_documents(row):
                document_rows.append(row)
                documents.append(document)
        nlls = compute_nll(
            session.model, documents, plan.config.pack_length, share=plan.config.share_prefixes
        )
        for index, nats, _ in sorted(nlls):
            logps.setdefault(document_rows[index], []).append(-nats)
    return logps
