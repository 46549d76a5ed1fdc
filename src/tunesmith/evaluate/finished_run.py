"""What can be done with a finished run: measure it again, talk to it, hand it out in another form.

    RUN -> reopen -> Workbench, its adapter loaded -> Comparisons, answers, an export

Left out: how a run comes to be (run.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.core.types import Comparison, GenerationRequest, Json
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.measure import (
    build_eval_items,
    load_general_texts,
    measure_answers,
    measure_baselines,
    measure_items,
    measure_relearning,
)
from tunesmith.evaluate.results import compare_results
from tunesmith.export.merge_base import choose_base
from tunesmith.export.parity import ExportJob, select_examples
from tunesmith.export.source_run import open_source_run
from tunesmith.export.targets import (
    ExportResult,
    build_manifest,
    choose_output_path,
    describe_export,
    estimate_export_bytes,
    find_format,
    refuse_unsupported,
    scale_run,
    verify_export,
)
from tunesmith.model.generation.engine import stream_answer
from tunesmith.session import inputs
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.reopen import load_trained_session, reopen_session, starting_model
from tunesmith.train import base_reference


def evaluate_run(path: Path, *, allow_code: bool = False) -> tuple[Comparison, ...]:
    """The before/after of a finished run with an adapter, measured again."""
    session = reopen_session(path)
    items, step = (
        build_eval_items(session.plan, session.inputs, allow_code=allow_code),
        session.plan.steps,
    )
    fingerprint = build_fingerprint(session.plan, session.inputs, session.plan.recipe)
    after = measure_items(
        session,
        items,
        step=step,
        cache=base_reference.open_answer_cache(path, fingerprint, path / "adapter"),
    )
    start = inputs.load_starting_adapter(session.plan, session.inputs.model.path)
    with starting_model(session, session.plan):
        before = measure_items(
            session, items, step=0, cache=base_reference.open_answer_cache(path, fingerprint, start)
        )
    return compare_results(before, after, step=step)


def compare_baselines(path: Path, *, allow_code: bool = False) -> dict[str, tuple[Comparison, ...]]:
    """What a finished run made of its constraints, beside what costs no training: each baseline,
    and how the trained model differs from it on the same items. Raises InputError for a run without
    constraints or questions."""
    session = reopen_session(path)
    items, step = (
        build_eval_items(session.plan, session.inputs, allow_code=allow_code),
        session.plan.steps,
    )
    if not session.inputs.recipe.never or not items.prompts:
        message = "baselines are of what no answer may say, on prompts of `test_data`"
        raise InputError(
            message, where=str(path), fix="give the recipe `never` and `test_data`, and train again"
        )
    trained_results = measure_answers(session, items)
    with starting_model(session, session.plan):
        baseline_results = measure_baselines(session, items)
    return {
        name: compare_results(results, trained_results, step=step)
        for name, results in baseline_results.items()
    }


def compare_relearning(path: Path) -> tuple[Comparison, ...]:
    """Of each domain of general text, two: how it changed by itself, and after other texts of it.
    Raises InputError for a run without general text."""
    session = reopen_session(path)
    texts = load_general_texts(session.inputs)
    if not texts:
        message = "recovery is of general text, and the run has none"
        raise InputError(
            message, where=str(path), fix="give the recipe `retention_data`, and train again"
        )
    after = measure_relearning(session, texts)
    with starting_model(session, session.plan):
        before = measure_relearning(session, texts)
    return compare_results(before, after, step=session.plan.steps)


def chat(path: Path, questions: Iterable[str]) -> Iterator[str]:
    """Answers of the trained model, one conversation; each answer comes whole."""
    session = load_trained_session(path)
    session.model.network.eval()
    messages: list[Json] = list(_find_system_message(session.rows))
    for question in questions:
        messages.append({"role": "user", "content": question})
        request = GenerationRequest(session.renderer.encode_prompt(messages), max_new_tokens=512)
        pieces = stream_answer(
            session.model, request, decode=session.renderer.decode, end_ids=session.renderer.end_ids
        )
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        yield answer


def export_run(
    path: Path,
    target: str,
    *,
    kind: str | None = None,
    base: str = "auto",
    scale: float = 1.0,
    out: Path | None = None,
) -> ExportResult:
    """A finished run in another form. It gets its name once it is proven: read back as others read
    it, it must answer as the run does. `base`: what an adapter trained on 4-bit weights is merged
    into. `scale`: of the adapter. Raises InputError for what cannot be exported, GateError when the
    export is not the run."""
    kind, export_format = find_format(target, kind)
    source_run = scale_run(open_source_run(path), scale)
    target_path = choose_output_path(source_run, target, kind, out)
    refuse_unsupported(source_run, export_format)
    needed_bytes, examples = (
        estimate_export_bytes(source_run, export_format),
        select_examples(source_run),
    )
    base_choice = choose_base(
        source_run, examples, base, is_merged=export_format.bytes_per_weight != 0
    )
    with atomic_dir(
        target_path, metadata=build_manifest(source_run), needed_bytes=needed_bytes, key="--out"
    ) as folder:
        job = ExportJob(source_run, folder, kind, examples, base_choice.base)
        export_format.write(job)
        parity = verify_export(job, export_format)
    return describe_export(target_path, target, kind, parity, base_choice)


def _find_system_message(rows: Dataset) -> tuple[Json, ...]:
    """The system message that training rows begin with: served the same way."""
    messages = rows.read_example(0).messages if len(rows) else ()
    return messages[:1] if messages and messages[0]["role"] == "system" else ()
