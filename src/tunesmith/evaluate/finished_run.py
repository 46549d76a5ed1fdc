"""What can be done with a finished run: measure it again, talk to it, hand it out in another form.

    RUN -> reopen -> Workbench, its adapter loaded -> Comparisons, answers, an export

Left out: how a run comes to be (run.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith.core.atomic import new_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Comparison, Json, Request
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.measure import answered, general_texts, items_of, measure, recovery_measurements, untrained
from tunesmith.evaluate.results import compare_all
from tunesmith.export.merge_base import choose_base
from tunesmith.export.parity import Job, witnesses_of
from tunesmith.export.source_run import open_finished
from tunesmith.export.targets import (
    Exported,
    at_scale,
    bytes_needed,
    exported,
    facts_of,
    format_of,
    place_of,
    proven,
    refuse_what_it_lacks,
)
from tunesmith.model.generation.engine import stream
from tunesmith.session import inputs
from tunesmith.session.fingerprint import identity_of
from tunesmith.session.reopen import before_training, left, reopen
from tunesmith.train import base_reference


def evaluate(path: Path, *, allow_code: bool = False) -> tuple[Comparison, ...]:
    """The before/after of a finished run with an adapter, measured again."""
    bench = reopen(path)
    items, step = items_of(bench.plan, bench.facts, allow_code=allow_code), bench.plan.steps
    identity = identity_of(bench.plan, bench.facts, bench.plan.recipe)
    after = measure(bench, items, step=step, store=base_reference.store_of(path, identity, path / "adapter"))
    start = inputs.start_of(bench.plan, bench.facts.model.path)
    with before_training(bench, bench.plan):
        before = measure(bench, items, step=0, store=base_reference.store_of(path, identity, start))
    return compare_all(before, after, step=step)


def baselines(path: Path, *, allow_code: bool = False) -> dict[str, tuple[Comparison, ...]]:
    """What a finished run made of its constraints, beside what costs no training: each baseline, and how the trained
    model differs from it on the same items. Raises InputError for a run without constraints or questions."""
    bench = reopen(path)
    items, step = items_of(bench.plan, bench.facts, allow_code=allow_code), bench.plan.steps
    if not bench.facts.recipe.never or not items.questions:
        what = "baselines are of what no answer may say, on prompts of `test_data`"
        raise InputError(what, where=str(path), fix="give the recipe `never` and `test_data`, and train again")
    trained = answered(bench, items)
    with before_training(bench, bench.plan):
        found = untrained(bench, items)
    return {name: compare_all(measured, trained, step=step) for name, measured in found.items()}


def recovery(path: Path) -> tuple[Comparison, ...]:
    """Of each domain of general text, two: how it changed by itself, and after other texts of it. Raises InputError for
    a run without general text."""
    bench = reopen(path)
    texts = general_texts(bench.facts)
    if not texts:
        what = "recovery is of general text, and the run has none"
        raise InputError(what, where=str(path), fix="give the recipe `retention_data`, and train again")
    after = recovery_measurements(bench, texts)
    with before_training(bench, bench.plan):
        before = recovery_measurements(bench, texts)
    return compare_all(before, after, step=bench.plan.steps)


def chat(path: Path, questions: Iterable[str]) -> Iterator[str]:
    """Answers of the trained model, one conversation; each answer comes whole."""
    bench = left(path)
    bench.model.network.eval()
    messages: list[Json] = list(_system(bench.rows))
    for question in questions:
        messages.append({"role": "user", "content": question})
        request = Request(bench.renderer.prompt(messages), max_new_tokens=512)
        pieces = stream(bench.model, request, decode=bench.renderer.decode, end_ids=bench.renderer.end_ids)
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        yield answer


def export(
    path: Path, target: str, *, kind: str | None = None, base: str = "auto", scale: float = 1.0, out: Path | None = None
) -> Exported:
    """A finished run in another form. It gets its name once it is proven: read back as others read it, it must answer
    as the run does. `base`: what an adapter trained on 4-bit weights is merged into. `scale`: of the adapter. Raises
    InputError for what cannot be exported, GateError when the export is not the run."""
    kind, form = format_of(target, kind)
    finished = at_scale(open_finished(path), scale)
    place = place_of(finished, target, kind, out)
    refuse_what_it_lacks(finished, form)
    needed, witnesses = bytes_needed(finished, form), witnesses_of(finished)
    chosen = choose_base(finished, witnesses, base, merges=form.width != 0)
    with new_folder(place, facts=facts_of(finished), needed_bytes=needed, key="--out") as folder:
        job = Job(finished, folder, kind, witnesses, chosen.base)
        form.write(job)
        parity = proven(job, form)
    return exported(place, target, kind, parity, chosen)


def _system(rows: Dataset) -> tuple[Json, ...]:
    """The system message that training rows begin with: served the same way."""
    messages = rows.example(0).messages if len(rows) else ()
    return messages[:1] if messages and messages[0]["role"] == "system" else ()
