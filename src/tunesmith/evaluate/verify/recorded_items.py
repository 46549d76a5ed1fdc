"""The items of a finished run as a server is asked them, with what the run recorded.

In: a run folder, with the data that its recipe names. Out: RecordedRun: for some of the run's test
rows the messages, the prompt's tokens, the answers before and after training, and the loss of the
expected answer. Neither the base model nor torch is needed: tokenizer and chat template are those
beside the trained weights. Left out: asking a server (server_client.py), comparing
(verification.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.run_dir import (
    ADAPTER_DIR,
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    MODEL_DIR,
    SELF_REHEARSAL_FILE,
    find_weights_dir,
    read_failure,
    read_run_plan,
    require_run,
)
from tunesmith.core.types import Document, Example, Json, Plan
from tunesmith.data.chat_template.conversation import REASONING_KEYS
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts, compute_max_new_tokens
from tunesmith.evaluate.metrics import METRICS, split_metric
from tunesmith.evaluate.model_ref import load_results
from tunesmith.evaluate.results import EvalResults, MetricValues
from tunesmith.plan.memory import needs_complete_answers
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session.datasets import open_datasets, read_response_schema
from tunesmith.session.identity import read_provenance
from tunesmith.session.inputs import build_renderer

LOSS = "loss"
TEST = "test"
API_KEYS = ("role", "content", "tool_calls", "tool_call_id")  # of a message
WRITTEN_KEYS = ("name", *REASONING_KEYS)  # by some templates


@dataclass(frozen=True, eq=False)
class RecordedItem:
    """A test row. `loss` is that of its expected answers, nats per token; None if not recorded."""

    id: str
    messages: tuple[Json, ...]  # empty for a row with a plain prompt
    tools: tuple[Json, ...]
    prompt_text: str
    prompt_ids: tuple[int, ...]
    expected: str
    before: str
    after: str
    is_cut: bool  # the answer after training reached the limit of new tokens
    documents: tuple[Document, ...]  # with its expected answers
    loss_before: float | None
    loss: float | None


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A run as it was measured. `measurements` are its graded metrics after training."""

    path: Path
    items: tuple[RecordedItem, ...]
    max_new_tokens: int
    measurements: tuple[MetricValues, ...]
    schema: Json | None
    template_variables: Json
    renderer: Renderer
    end_texts: tuple[str, ...]  # of the tokens that end an answer
    notes: tuple[str, ...] = ()


def load_recorded_run(path: Path, num_items: int) -> RecordedRun:
    """Load up to `num_items` test rows, evenly spread over all; of a staged run its last stage's.

    Raises InputError for a run that is not finished, was not evaluated, or whose files or rows have
    changed since; GateError for a run that failed."""
    if num_items < 1:
        raise InputError("there is nothing to ask", where="--items", fix="use at least 1")
    path = find_weights_dir(path)
    require_run(path)
    if problem := read_failure(path):
        raise GateError(f"this run failed: {problem}", where=str(path))
    after = load_results(path, EVAL_AFTER_FILE)
    before = load_results(path, EVAL_BEFORE_FILE)
    if not after.samples:
        message = "this run recorded no answers, so there is nothing to compare with"
        raise InputError(message, where=str(path), fix="train with test_data")
    plan = read_run_plan(path)
    recipe = rebuild_recipe(plan.recipe)
    renderer = _build_renderer(path, plan, recipe)
    rows = _open_test_rows(path, recipe, renderer)
    examples = _read_examples(rows, after)
    prompts = build_prompts([example for example, _ in examples], renderer)
    needs_end = needs_complete_answers(plan.config.metrics, has_constraints=bool(recipe.never))
    items = tuple(_build_items(examples, prompts, before, after, renderer))
    notes: list[str] = []
    if renderer.has_date:
        notes.append("the chat template prints the date: prompts are those of today")
    return RecordedRun(
        path=path,
        items=_select_evenly(items, num_items),
        max_new_tokens=compute_max_new_tokens(prompts, needs_end=needs_end),
        measurements=tuple(_select_graded(after)),
        schema=read_response_schema(recipe.response_schema),
        template_variables=dict(recipe.chat_template_kwargs),
        renderer=renderer,
        end_texts=tuple(renderer.decode([token]) for token in renderer.end_ids),
        notes=tuple(notes),
    )


def _build_renderer(path: Path, plan: Plan, recipe: Recipe) -> Renderer:
    """Load the tokenizer and template beside the trained weights, as they are served today.

    Raises InputError if they are not those of the run."""
    folder = path / (MODEL_DIR if plan.config.method == "full" else ADAPTER_DIR)
    if not folder.is_dir():
        fix = f"finish it: tunesmith resume {path}"
        raise InputError("this run is not finished", where=str(path), fix=fix)
    update = {} if recipe.chat_template == "none" else {"chat_template": "auto"}
    beside = recipe.model_copy(update={**update, "add_tokens": ()})
    renderer = build_renderer(beside, folder, datetime.now())
    provenance = read_provenance(folder)
    # Tokens that the run added are part of the tokenizer there, and were not part of the base's.
    is_same = provenance is None or provenance.renderer == renderer.fingerprint
    if not is_same and not recipe.add_tokens:
        message = "the tokenizer or chat template is not the one that the run was trained with"
        raise InputError(message, where=str(folder), fix="restore the files")
    return renderer


def _open_test_rows(path: Path, recipe: Recipe, renderer: Renderer) -> Dataset:
    generated_rows = path / SELF_REHEARSAL_FILE
    datasets = open_datasets(recipe, renderer, generated_rows if generated_rows.is_file() else None)
    return datasets["test_data"]


def _read_examples(rows: Dataset, after: EvalResults) -> list[tuple[Example, tuple[Document, ...]]]:
    """Return the row of each recorded answer. Raises InputError if one is gone or has changed."""
    index_by_id = {rows.get_id(index): index for index in range(len(rows))}
    digests = after.digests.get("test_data", {})
    examples: list[tuple[Example, tuple[Document, ...]]] = []
    for sample in after.samples:
        index = index_by_id.get(sample.id)
        digest = digests.get(sample.id)
        if index is None or (digest is not None and digest != f"{rows.contents_N[index]:016x}"):
            message = "the row is gone, or not what the run was evaluated on"
            fix = "restore the file of test_data"
            raise InputError(message, where=sample.id, fix=fix)
        example, prepared = rows.render_row(index)
        examples.append((example, prepared.documents))
    return examples


def _build_items(
    examples: Sequence[tuple[Example, tuple[Document, ...]]],
    prompts: Sequence[EvalPrompt],
    before: EvalResults,
    after: EvalResults,
    renderer: Renderer,
) -> Iterator[RecordedItem]:
    answers_before = {sample.id: sample.answer for sample in before.samples}
    losses_before = _map_values(before, LOSS)
    losses_after = _map_values(after, LOSS)
    cut_ids = _find_cut_ids(after)
    for (example, documents), prompt, sample in zip(examples, prompts, after.samples, strict=True):
        messages: tuple[Json, ...] = ()
        if example.messages:
            trained_turns = [i for i, weight in enumerate(example.turn_weights) if weight > 0]
            rest = example.messages[: max(trained_turns, default=0)]
            messages = tuple(_select_fields(rest, example.tools, renderer))
        yield RecordedItem(
            id=sample.id,
            messages=tuple(_convert_messages(messages)),
            tools=example.tools,
            prompt_text=example.prompt or "",
            prompt_ids=prompt.prompt_ids,
            expected=sample.expected,
            before=answers_before.get(sample.id, ""),
            after=sample.answer,
            is_cut=sample.id in cut_ids,
            documents=tuple(document for document in documents if document.is_correct),
            loss_before=losses_before.get(sample.id),
            loss=losses_after.get(sample.id),
        )


def _select_fields(
    messages: Sequence[Json], tools: Sequence[Json], renderer: Renderer
) -> Iterator[Json]:
    """Yield messages with the fields that the API has; thinking has one key. Names and thinking
    that the template does not write are left out: a strict server refuses them."""
    unused = {key: renderer.find_unused(key, messages, tools) for key in WRITTEN_KEYS}
    for index, message in enumerate(messages):
        selected = {key: message[key] for key in API_KEYS if key in message}
        for key in WRITTEN_KEYS:
            if key in message and index not in unused[key]:
                selected["name" if key == "name" else "reasoning_content"] = message[key]
        yield selected


def _convert_messages(messages: Sequence[Json]) -> Iterator[Json]:
    """Yield messages as the API takes them: calls have ids, which their results name, and arguments
    as text."""
    ids: Iterator[str] = iter(())
    for message in messages:
        if calls := message.get("tool_calls"):
            converted = [_convert_call(call, index) for index, call in enumerate(calls)]
            ids = iter([call["id"] for call in converted])
            yield {**message, "tool_calls": converted}
        elif message["role"] == "tool" and "tool_call_id" not in message:
            yield {**message, "tool_call_id": next(ids, "call_0")}
        else:
            yield message


def _convert_call(call: Json, index: int) -> Json:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id", f"call_{index}"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _select_evenly(items: tuple[RecordedItem, ...], count: int) -> tuple[RecordedItem, ...]:
    """Return `count` of the items, evenly spread."""
    count = min(count, len(items))
    return tuple(items[index * len(items) // count] for index in range(count))


def _is_test(measurement: MetricValues) -> bool:
    """Return whether it is of test rows and not a mean over tasks."""
    is_test = measurement.task == TEST or measurement.task.startswith(f"{TEST}:")
    return is_test and not measurement.strata


def _map_values(results: EvalResults, metric: str) -> dict[str, float]:
    """Return row id -> value."""
    values: dict[str, float] = {}
    for measurement in results.measurements:
        if measurement.metric == metric and _is_test(measurement):
            values.update(zip(measurement.ids, measurement.values, strict=True))
    return values


def _find_cut_ids(results: EvalResults) -> set[str]:
    cut_ids: set[str] = set()
    for measurement in results.measurements:
        if measurement.truncated and not measurement.strata:
            pairs = zip(measurement.ids, measurement.truncated, strict=True)
            cut_ids |= {item for item, is_cut in pairs if is_cut}
    return cut_ids


def _select_graded(results: EvalResults) -> Iterator[MetricValues]:
    """Yield the metrics that grade answers. A custom one is code, which does not run here."""
    for measurement in results.measurements:
        if _is_test(measurement) and split_metric(measurement.metric)[0] in METRICS:
            yield measurement
