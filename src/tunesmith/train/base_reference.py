"""Measurements of the model before training, taken once, before any weight changes.

    eval_before.json  its metrics, item by item
    base_states/      its final hidden states on the measured texts and answers, where nothing
                      brings the base model back later: full fine-tuning, continuing
                      an adapter; deleted when the run ends
    reference.json    log-probabilities of preference rows, for DPO and KTO, in the same cases;
                      for KTO also mismatched.json, those of the KL term

In: a run folder and an open Session. Out: metrics, references for KL and DPO.
Left out: what is measured (evaluate/items.py), the KL divergence (evaluate/kl_divergence.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tunesmith.core.atomic import atomic_dir, remove_folder, verify_dir
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.run_dir import EVAL_BEFORE_FILE, RunFolder
from tunesmith.core.sealed_json import read_sealed_as
from tunesmith.core.types import Document, Plan
from tunesmith.data.sampler import StepSampler
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
from tunesmith.train.kto import measure_logps, split_mismatched
from tunesmith.train.losses import REFERENCE_LOSSES

REFERENCE_FILE = "reference.json"  # row -> log-probabilities of its documents before training
MISMATCHED_FILE = "mismatched.json"  # step -> those of KTO's mismatched documents
BATCH_ROWS = 64
STATES_DIR = "base_states"
_Logps = dict[int, tuple[float, ...]]  # of documents, by row or step
STATE_NAMES = {GENERAL_TASK: "general", "test": "answers"}
# A fresh adapter that is switched off leaves the base model.
ADAPTER_DISABLED: BaseReferences = {GENERAL_TASK: AdapterDisabled(), "test": AdapterDisabled()}


def measure_before_training(folder: RunFolder, session: Session, items: EvalItems) -> EvalResults:
    """Return the metrics before training, measured once per run."""
    if not (folder.path / EVAL_BEFORE_FILE).exists():
        results = measure_items(session, items, step=0)
        folder.write_json(EVAL_BEFORE_FILE, results)
    return read_sealed_as(EvalResults, folder.path / EVAL_BEFORE_FILE)


def load_base_references(folder: RunFolder, session: Session, items: EvalItems) -> BaseReferences:
    """Return what the KL divergence of the trained model is computed against."""
    if can_disable_adapter(session.plan, session.inputs):
        return ADAPTER_DISABLED
    states_dir = folder.path / STATES_DIR
    if verify_dir(states_dir):  # missing, or damaged: they are computed again
        _cache_base_states(states_dir, session, items)
    states = CachedStates.load_files(states_dir, STATE_NAMES.values(), session.model.device)
    return dict(zip(STATE_NAMES, states, strict=True))


def can_disable_adapter(plan: Plan, inputs: RunInputs) -> bool:
    """Return whether switching the adapter off brings back the model before training."""
    return plan.config.method != "full" and inputs.adapter is None


def delete_base_states(folder: RunFolder) -> None:
    """Delete the cached hidden states of a run that is measured."""
    if (folder.path / STATES_DIR).exists():
        remove_folder(folder.path / STATES_DIR)


def _cache_base_states(states_dir: Path, session: Session, items: EvalItems) -> None:
    session.model.network.eval()
    config = session.plan.config
    window = compute_text_window(session)
    texts, _ = split_texts(items.general_texts, session.renderer.encode_text, window)
    answers = select_answers(items.test_documents)
    num_targets = 0
    for document in (*texts, *answers):
        num_targets += int((document.weights_L > 0).sum())
    state_bytes = session.plan.model.hidden_size * session.model.dtype.itemsize
    with atomic_dir(states_dir, metadata={}, needed_bytes=num_targets * state_bytes) as scratch:
        states = cache_states(session.model, texts, window, share=False)
        states.save_files(scratch, STATE_NAMES[GENERAL_TASK])
        states = cache_states(
            session.model, answers, config.pack_length, share=config.share_prefixes
        )
        states.save_files(scratch, STATE_NAMES["test"])


# ---------------------------------------------------------------- DPO and KTO


def add_references(session: Session, folder: RunFolder) -> Session:
    """Return the session with the log-probabilities that DPO and KTO compare with.

    They are computed once, before any weight changes, and every later attempt reads them from the
    run folder. A fresh adapter needs none: switched off, it leaves the base model.
    """
    if not _needs_references(session.plan):
        return session
    if not (folder.path / REFERENCE_FILE).exists():
        folder.write_json(REFERENCE_FILE, _compute_reference_logps(session))
    is_kto = session.plan.config.loss == "kto"
    if is_kto and not (folder.path / MISMATCHED_FILE).exists():
        folder.write_json(MISMATCHED_FILE, _compute_mismatched_logps(session))
    return read_references(session, folder.path)


def read_references(session: Session, path: Path) -> Session:
    """Return the session with the log-probabilities that `add_references` wrote."""
    if not _needs_references(session.plan):
        return session
    logps = read_sealed_as(_Logps, path / REFERENCE_FILE)
    session = dataclasses.replace(session, reference_logps=logps)
    if session.plan.config.loss != "kto":
        return session
    mismatched_logps = read_sealed_as(_Logps, path / MISMATCHED_FILE)
    return dataclasses.replace(session, mismatched_logps=mismatched_logps)


def _needs_references(plan: Plan) -> bool:
    is_fresh = plan.config.method != "full" and plan.config.adapter_from is None
    return not is_fresh and plan.config.loss is not None and plan.config.loss in REFERENCE_LOSSES


def _compute_mismatched_logps(session: Session) -> dict[int, list[float]]:
    """Return the log-probabilities of the mismatched documents of each step."""
    session.model.network.eval()
    computed: dict[int, list[float]] = {}
    for step in range(1, session.plan.steps + 1):
        _, mismatched = split_mismatched(session.load_documents(step))
        pack_length = session.plan.config.pack_length
        computed[step] = measure_logps(session.model, mismatched, pack_length)
    return computed


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
