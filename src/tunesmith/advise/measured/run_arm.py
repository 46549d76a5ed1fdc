"""Run one arm: train if it says so, then answer the items its way.

    ArmRunner.from_plan(plan, inputs, ...) -> runner; run_arm(runner, arm) -> ArmResult

Items come from `eval_data`; `test_data` is not read. Shots and training examples are training rows,
the same for the same seed. Every training starts from the same weights and restores them. Seconds
per request are measured one request at a time, which is what a user waits. Left out: grading
(verdict.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.prompting import add_passages, add_shots, get_question
from tunesmith.advise.measured.retrieval import PassageIndex
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import (
    Document,
    Example,
    GenerationOutput,
    Plan,
    PlanValue,
    require,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.golden_set import refuse_test_leakage
from tunesmith.data.sampler import StepSampler, permute_rows
from tunesmith.evaluate.generate_until import (
    EvalPrompt,
    build_prompts,
    compute_max_new_tokens,
    iter_answers,
)
from tunesmith.evaluate.statistics import MIN_ITEMS
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.grammar import Grammar
from tunesmith.plan.build import build_plan
from tunesmith.plan.memory import needs_complete_answers
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import load_starting_model
from tunesmith.train.follow_measuring import send_weights
from tunesmith.train.loop import TrainingLoop

TIMED_REQUESTS = 3
FEWEST_ITEMS = MIN_ITEMS * 3 // 2
MAX_ITEMS = 1000  # more items hardly narrow an interval
# settings of the full plan that a training on fewer rows takes over
FIXED_SETTINGS = (
    "method",
    "optim",
    "dtype",
    "max_length",
    "pack_length",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "attention",
)


@dataclass(frozen=True)
class ArmResult:
    arm: Arm
    answers: dict[str, str]  # by item
    prompt_tokens: float  # mean
    request_seconds: float  # median of single requests
    train_seconds: float
    total_seconds: float  # training and answering


@dataclass(frozen=True, eq=False)
class ArmRunner:
    """A model, its training rows, and the held-out items to answer."""

    plan: Plan
    inputs: RunInputs
    model: PackedCausalLM
    rows: Dataset
    items: tuple[Example, ...]
    passages: PassageIndex | None

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        inputs: RunInputs,
        items: Sequence[Example],
        passages: PassageIndex | None,
    ) -> ArmRunner:
        config = plan.config
        rows = inputs.datasets["data"].with_max_length(config.max_length, config.on_overlong)
        model = load_starting_model(plan, inputs)
        return cls(plan, inputs, model, rows, tuple(items), passages)

    @cached_property
    def start_weights(self) -> dict:
        return copy_weights(self.model.network)

    @cached_property
    def max_answer_tokens(self) -> int:
        needs_end = needs_complete_answers(self.plan.config.metrics, has_constraints=False)
        prompts = build_prompts(self.items, self.inputs.renderer)
        return compute_max_new_tokens(prompts, needs_end=needs_end)

    @cached_property
    def grammar(self) -> Grammar:
        assert self.inputs.response_schema is not None
        return Grammar(
            self.inputs.response_schema,
            self.inputs.model.path,
            vocab_size=self.model.head.weight.shape[0],
            end_ids=self.inputs.renderer.end_ids,
        )

    def build_questions(self, arm: Arm) -> tuple[EvalPrompt, ...]:
        examples = sample_examples(self.rows, arm.seed, arm.shots)
        shots = [self._add_passages(example, arm) for example in examples]
        prompts: list[Example] = []
        for item in self.items:
            prompts.append(add_shots(self._add_passages(item, arm), shots, arm.shot_layout))
        return build_prompts(prompts, self.inputs.renderer)

    def build_documents(self, arm: Arm) -> list[tuple[Document, ...]]:
        """Return the documents of each training row, prompted as the items are."""
        documents: list[tuple[Document, ...]] = []
        for example in sample_examples(self.rows, arm.seed, arm.examples):
            rendered = self.inputs.renderer.render(self._add_passages(example, arm))
            documents.append(rendered.documents)
        return documents

    def _add_passages(self, example: Example, arm: Arm) -> Example:
        if self.passages is None or not arm.passages:
            return example
        return add_passages(example, self.passages.search(get_question(example), arm.passages))


def select_items(inputs: RunInputs) -> list[Example]:
    """Return rows of `eval_data` with a question and a correct answer, shuffled, at most MAX_ITEMS.

    Raises InputError for too few, and for items that are training rows.
    """
    if "eval_data" not in inputs.datasets:
        message = "no held-out items: test_data is reserved for the final result"
        raise InputError(message, where="eval_data", fix="set eval_data, or --eval-split 0.1")
    rows = inputs.datasets["eval_data"]
    items = select_usable(rows, permute_rows(0, 0, len(rows)).tolist(), MAX_ITEMS)
    refuse_test_leakage(inputs.datasets, "eval_data")
    if len(items) < FEWEST_ITEMS:
        message = (
            f"{len(items)} rows have a question and an answer; at least {FEWEST_ITEMS} are needed: "
            f"a third to choose wordings, and {MIN_ITEMS} others to judge them"
        )
        raise InputError(message, where=f"eval_data: {rows.path}", fix="add rows, better 100")
    return items


def sample_examples(rows: Dataset, seed: int, count: int) -> list[Example]:
    """Return the first `count` usable rows in the order of a seed; a larger sample contains it."""
    return select_usable(rows, permute_rows(seed, 0, len(rows)).tolist(), count) if count else []


def select_usable(rows: Dataset, indices: Sequence[int], limit: int) -> list[Example]:
    """Return examples with a question and a correct answer, in the order of `indices`."""
    examples: list[Example] = []
    for index in indices:
        if len(examples) == limit:
            break
        example, prepared = rows.render_row(index)
        has_question = bool(example.messages or example.prompt)
        is_wrong = bool(example.negative or example.banned_spans)
        if prepared.documents and has_question and not is_wrong:
            examples.append(example)
    return examples


# ---------------------------------------------------------------- one arm


def run_arm(runner: ArmRunner, arm: Arm) -> ArmResult:
    """Raises InputError for a prompt that exceeds the context, GateError for a non-finite loss."""
    start = time.perf_counter()
    questions = runner.build_questions(arm)
    _check_context(runner, questions)
    runner.start_weights  # noqa: B018 - copied before anything is trained
    grammar = runner.grammar if arm.is_constrained else None
    try:
        train_seconds = 0.0
        if arm.examples:
            train_seconds = _train_arm(runner, arm)
            send_weights(runner.model)
        seconds = _time_single_requests(runner, questions, grammar)
        answers = _generate_answers(runner, questions, grammar)
    finally:
        if arm.examples:
            restore_weights(runner.model.network, runner.start_weights)
            send_weights(runner.model)
    return ArmResult(
        arm=arm,
        answers=dict(zip((question.id for question in questions), answers, strict=True)),
        prompt_tokens=statistics.fmean(len(question.prompt_ids) for question in questions),
        request_seconds=seconds,
        train_seconds=train_seconds,
        total_seconds=time.perf_counter() - start,
    )


def _check_context(runner: ArmRunner, questions: Sequence[EvalPrompt]) -> None:
    prompt_tokens = max(len(question.prompt_ids) for question in questions)
    answer_tokens = runner.max_answer_tokens
    context_length = runner.model.context_length
    if prompt_tokens + answer_tokens > context_length:
        message = (
            f"a prompt of {prompt_tokens:,} tokens and an answer of {answer_tokens} exceed the "
            f"context of {context_length:,}"
        )
        raise InputError(message, where="advise", fix="use shorter items, or fewer shots")


def _time_single_requests(
    runner: ArmRunner, questions: Sequence[EvalPrompt], grammar: Grammar | None
) -> float:
    """Return the median seconds of a single request."""
    timings: list[float] = []
    runner.model.network.eval()
    for question in questions[:TIMED_REQUESTS]:
        start = time.perf_counter()
        list(_iter_answers(runner, [question], grammar))
        timings.append(time.perf_counter() - start)
    return statistics.median(timings)


def _iter_answers(
    runner: ArmRunner, questions: Sequence[EvalPrompt], grammar: Grammar | None
) -> Iterator[tuple[int, GenerationOutput]]:
    return iter_answers(
        runner.model,
        questions,
        runner.inputs.renderer,
        max_new_tokens=runner.max_answer_tokens,
        grammar=grammar,
    )


def _generate_answers(
    runner: ArmRunner, questions: Sequence[EvalPrompt], grammar: Grammar | None
) -> list[str]:
    answers = _iter_answers(runner, questions, grammar)
    outputs = dict(log_progress(answers, len(questions), "answers"))
    return [outputs[index].text for index in range(len(questions))]


def _train_arm(runner: ArmRunner, arm: Arm) -> float:
    """Train as a run on these rows would be planned; return the seconds of its steps."""
    rows = runner.build_documents(arm)
    plan = plan_for_size(runner, arm.examples)
    config = dataclasses.replace(plan.config, share_prefixes=runner.plan.config.share_prefixes)
    batch_size = require(config.batch_size)
    sampler = StepSampler(len(rows), batch_size, config.num_train_epochs, arm.seed, plan.steps)

    def load_documents(step: int) -> list[Document]:
        return [document for row in sampler.get_rows(step) for document in rows[row]]

    training = TrainingLoop(
        runner.model,
        load_documents,
        config,
        steps=sampler.total_steps,
        warmup_steps=math.ceil(plan.steps * config.warmup_ratio),
    )
    try:
        for _ in training:
            pass
    except GateError as error:
        raise GateError(f"{arm.name}: {error.message}", fix=error.fix) from error
    return training.seconds


def plan_for_size(runner: ArmRunner, examples: int) -> Plan:
    """Plan a run on so many rows, with the adapter and precision of the full plan."""
    plan = runner.plan
    report = plan.data["data"]
    fraction = examples / max(1, report.rows)
    counts: dict[str, int] = {}
    for name in ("documents", "tokens", "supervised_tokens"):
        counts[name] = max(1, round(getattr(report, name) * fraction))
    fixed: dict[str, PlanValue] = {}
    for key, setting in plan.settings.items():
        if setting.decided_by == "checkpoint" or key in FIXED_SETTINGS:
            fixed[key] = setting
    return build_plan(
        runner.inputs.recipe,
        machine=plan.machine,
        model=plan.model,
        data={**plan.data, "data": dataclasses.replace(report, rows=examples, **counts)},
        output_dir=runner.inputs.output_dir,
        now=plan.config.now,
        fixed=fixed,
    )
