"""The export gate by its numbers alone: what is counted, each limit, and what the message says."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from toy_chat import write_model_folder
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Document
from tunesmith.export.parity import (
    ExportJob,
    LiveOutputs,
    Parity,
    ParityExample,
    ParityOutputs,
    ReloadedExport,
    Tolerance,
    _build_example,
    _take_enough,
    compare_outputs,
    compute_mean_kl,
    refuse_mismatch,
    select_examples,
)

TOLERANCE = Tolerance(mean_kl=1e-4, max_kl=1e-2)
FINE = Parity(
    prompts=4,
    rendered_prompts=3,
    same_prompts=3,
    same_answers=4,
    positions=20,
    mean_kl=0.0,
    max_kl=0.0,
    trained_kl=1.0,
    top1_agreement=1.0,
    max_logit_difference=0.0,
)


def make_example(name: str, *, is_chat: bool) -> ParityExample:
    weights_L = np.array([0, 0, 1, 1], np.float32)
    messages = ({"role": "user", "content": name},) if is_chat else ()
    document = Document(name, np.arange(4, dtype=np.int32), weights_L)
    return ParityExample(document, (1, 2), messages, rendered_ids=(1, 2) if is_chat else ())


def make_job() -> ExportJob:
    """A job whose run is only what the gate reads of it."""
    run: Any = SimpleNamespace(
        renderer=SimpleNamespace(end_ids=(7, 8), has_date=False),
        path=Path("runs/a"),
    )
    examples = [make_example("a", is_chat=True), make_example("b", is_chat=False)]
    return ExportJob(run, Path("out"), "", examples)


def reload_as(*rendered: tuple[int, ...], end_ids: tuple[int, ...] = (7,)) -> ReloadedExport:
    network: Any = None
    return ReloadedExport(network, rendered, end_ids)


def find_problems(parity: Parity, job: ExportJob | None = None, **changed: Any) -> list[str]:
    with contextlib.suppress(GateError):
        refuse_mismatch(TOLERANCE, parity, job or make_job(), reload_as(**changed))
        return []
    with pytest.raises(GateError) as caught:
        refuse_mismatch(TOLERANCE, parity, job or make_job(), reload_as(**changed))
    assert caught.value.where == "runs/a"
    headline, _, problems = caught.value.message.partition(": ")
    assert headline == "the export does not behave as the run"
    return problems.split("; ")


# ---------------------------------------------------------------- what is counted


def test_outputs_are_compared_position_by_position() -> None:
    logits = (torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0]]))
    other = (torch.tensor([[2.0, 0.0, 0.5], [1.5, 1.0, 0.0]]), torch.tensor([[0.0, -0.25, 3.0]]))
    live = LiveOutputs(logits, ((1,), (2, 3)), trained_kl=0.5)
    export = LiveOutputs(other, ((1,), (2, 4)), trained_kl=0.0)
    parity = compare_outputs(make_job(), live, export, reload_as((1, 2)))
    kl: list[float] = []
    for ours, theirs in zip(torch.cat(logits), torch.cat(other), strict=True):
        p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
        kl.append(float((p * (p / q).log()).sum()))
    assert parity.mean_kl == pytest.approx(sum(kl) / 3)
    assert parity.max_kl == pytest.approx(max(kl))
    assert parity.max_logit_difference == 1.5
    assert parity.top1_agreement == pytest.approx(2 / 3)
    swapped = compare_outputs(make_job(), export, live, reload_as((1, 2)))
    assert swapped.top1_agreement == pytest.approx(2 / 3)
    assert (parity.prompts, parity.rendered_prompts, parity.same_prompts) == (2, 1, 1)
    assert (parity.same_answers, parity.positions, parity.trained_kl) == (1, 3, 0.5)
    assert compute_mean_kl(logits, other) == pytest.approx(sum(kl) / 3)
    assert compute_mean_kl(other, logits) != pytest.approx(sum(kl) / 3, rel=0.01)
    assert compare_outputs(make_job(), live, export, reload_as((1, 3))).same_prompts == 0


def test_rounding_makes_no_negative_kl() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    live = LiveOutputs((logits,), (), trained_kl=0.0)
    shifted = ParityOutputs((logits + 1000.0,), ())
    parity = compare_outputs(make_job(), live, shifted, reload_as((1, 2)))
    assert 0 <= parity.mean_kl <= parity.max_kl < 1e-6


def test_the_positions_are_those_that_predict_a_target() -> None:
    assert make_example("a", is_chat=True).positions == [1, 2]


def test_prompts_are_rendered_where_there_are_messages() -> None:
    assert [example.document.id for example in make_job().chat_examples] == ["a"]


# ---------------------------------------------------------------- examples


def make_rows(
    *documents: Document, messages: tuple[Any, ...] = (), turn_weights: tuple[float, ...] = ()
) -> Any:
    """A data set of one row, as far as an example reads it."""
    example = SimpleNamespace(messages=messages, turn_weights=turn_weights, tools=())
    prepared = SimpleNamespace(documents=documents, notes=())
    return SimpleNamespace(render_row=lambda _: (example, prepared))


def make_document(weights: list[float]) -> Document:
    tokens_L = np.arange(100, 100 + len(weights), dtype=np.int32)
    return Document("row:1", tokens_L, np.array(weights, np.float32))


def test_an_example_is_the_last_answer_of_the_last_document() -> None:
    first = make_document([0, 1, 1, 1])
    last = make_document([0, 0, 1, 0.5, 0, 0, 2, 1])
    example = _build_example(make_job().run, make_rows(first, last), 0)
    assert example is not None
    assert example.prompt == (100, 101, 102, 103, 104, 105)
    assert example.document.tokens_L.tolist() == last.tokens_L.tolist()
    assert example.document.weights_L.tolist() == [0, 0, 1, 0.5, 0, 0, 2, 1]
    assert (example.messages, example.rendered_ids) == ((), ())
    assert _build_example(make_job().run, make_rows(), 0) is None


@pytest.mark.parametrize(("count", "kept"), [(31, 31), (32, 32), (33, 32), (80, 32)])
def test_logits_are_compared_at_the_first_32_targets(count: int, kept: int) -> None:
    document = make_document([0, 0, *[1] * count])
    example = _build_example(make_job().run, make_rows(document), 0)
    assert example is not None
    assert example.positions == list(range(1, kept + 1))
    assert document.weights_L.tolist() == [0, 0, *[1] * count]  # of the row itself


class RowsOfLengths:
    """A data set of plain texts of these lengths, as far as examples read it."""

    path = "rows.jsonl"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def render_row(self, index: int) -> Any:
        weights = [0.0] * (self.lengths[index] - 1) + [1.0]
        return make_rows(make_document(weights)).render_row(0)


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([1025, 1024, 5], [1024, 5]),
        ([2000, 1025, 1026], [1025, 1026, 2000]),  # if all are longer
        ([9, 8, 7] * 8, [9, 8, 7] * 5 + [9]),
    ],
)
def test_examples_are_the_first_rows_that_are_short(
    lengths: list[int], chosen: list[int], tmp_path: Path
) -> None:
    job = make_job()
    job.run.open_held_out_rows = lambda _: RowsOfLengths(lengths)
    job.run.saved_dir = write_model_folder(tmp_path)
    job.run.recipe = SimpleNamespace(chat_template_kwargs={})
    examples = select_examples(job.run)
    assert [len(example.document) for example in examples] == chosen


@pytest.mark.parametrize(("targets", "chosen"), [(1, 16), (16, 16), (20, 13), (32, 8), (300, 1)])
def test_rows_are_compared_up_to_enough_positions(targets: int, chosen: int) -> None:
    tokens_L = np.arange(targets + 1, dtype=np.int32)
    weights_L = np.array([0, *[1] * targets], np.float32)
    example = ParityExample(Document("row", tokens_L, weights_L), (0,))
    assert len(_take_enough([example] * 40)) == chosen


def test_a_run_without_rows_is_refused() -> None:
    job = make_job()
    job.run.open_held_out_rows = lambda _: RowsOfLengths([])
    with pytest.raises(InputError, match="no row to compare the export on"):
        select_examples(job.run)


@pytest.mark.parametrize("has_date", [False, True])
def test_the_prompt_of_a_chat_is_what_precedes_the_last_trained_turn(has_date: bool) -> None:
    turns = tuple({"role": role, "content": str(number)} for number, role in enumerate("uauaua"))
    rows = make_rows(
        make_document([0, 0, 1, 0, 1]), messages=turns, turn_weights=(0, 1, 0, 1, 0, 0)
    )
    job = make_job()
    job.run.renderer.has_date = has_date
    job.run.renderer.normalize_messages = lambda messages, _: list(messages)
    example = _build_example(job.run, rows, 0)
    assert example is not None
    assert example.messages == turns[:3]
    assert example.prompt == (100, 101, 102, 103)
    # where a date is printed, other programs rightly render another one
    assert example.rendered_ids == (() if has_date else example.prompt)


# ---------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"mean_kl": 1e-4}, ""),
        ({"mean_kl": 1.1e-4}, "the mean KL to the run is 0.00011, above 0.0001"),
        ({"max_kl": 1e-2}, ""),
        ({"max_kl": 1.1e-2}, "the largest KL at a position is 0.011, above 0.01"),
        ({"same_prompts": 1}, "2 of 3 prompts are rendered to other tokens"),
        ({"same_answers": 0, "top1_agreement": 0.0}, ""),
        ({"trained_kl": 0.0, "mean_kl": 1e-6}, ""),
        ({"trained_kl": 0.0, "mean_kl": 1.1e-6}, "it loses what training changed: a mean KL of 1."),
        ({"trained_kl": 1e-4, "mean_kl": 2.5e-5}, ""),
        (
            {"trained_kl": 1e-4, "mean_kl": 2.6e-5},
            "it loses what training changed: a mean KL of 2.6e-05 of 0.0001",
        ),
        ({"trained_kl": 4.0, "mean_kl": 1e-4}, ""),
    ],
)
def test_each_limit(changed: dict[str, Any], problem: str) -> None:
    problems = find_problems(replace(FINE, **changed))
    assert len(problems) == bool(problem)
    assert not problem or problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("end_ids", "is_fine"),
    [((7,), True), ((8, 7), True), ((8,), False), ((7, 9), False), ((), False)],
)
def test_answers_end_as_they_were_trained_to(end_ids: tuple[int, ...], is_fine: bool) -> None:
    problems = find_problems(FINE, end_ids=end_ids)
    expected = f"answers end in {sorted(end_ids)}, they were trained to end in 7"
    assert problems == ([] if is_fine else [expected])


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({"mean_kl": 1.0}, "rounding weights to 16 bits loses small changes"),
        ({"mean_kl": 1.0, "same_prompts": 0}, "please report this"),
    ],
)
def test_the_fix_is_that_of_the_problem(changed: dict[str, Any], fix: str) -> None:
    job = make_job()
    with pytest.raises(GateError) as caught:
        refuse_mismatch(TOLERANCE, replace(FINE, **changed), job, reload_as())
    assert caught.value.fix.startswith(f"nothing was written; {fix}")


def test_all_problems_are_named_at_once() -> None:
    lossy = replace(FINE, same_prompts=0, mean_kl=1.0, max_kl=math.inf, trained_kl=1.0)
    assert len(find_problems(lossy, end_ids=(8,))) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"mean_kl": math.nan, "max_kl": math.nan},
        {"max_kl": math.nan},
        {"positions": 0},
        {"mean_kl": math.nan, "max_kl": math.nan, "trained_kl": math.nan},
    ],
)
def test_nothing_or_no_number_compared_is_refused(changed: dict[str, Any]) -> None:
    assert not find_problems(FINE)
    (problem,) = find_problems(replace(FINE, **changed))
    assert "logits cannot be compared at" in problem
