"""Running one arm: the items asked its way, after its training if it has one.

    Subject.of(plan, facts, ...) -> Subject; outcome_of(subject, arm) -> Outcome (the answers, and what they cost)

Held-out items come from `eval_data`; `test_data` is not looked at. Examples that are shown or
trained are training rows, the same for the same seed. Every training starts from the same weights
and leaves them as they were. Seconds a request are those of a few requests answered alone, since
that is what one user waits. Left out: grades (decide.py)."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.prompting import add_passages, add_shots, get_question
from tunesmith.advise.measured.retrieval import PassageIndex
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import (
    Document,
    Example,
    GenerationOutput,
    GenerationRequest,
    Plan,
    require,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import StepSampler, permutation
from tunesmith.evaluate.answer_cache import AnswerCache, generate_cached
from tunesmith.evaluate.generate_until import (
    EvalPrompt,
    build_prompts,
    compute_max_new_tokens,
    iter_answers,
)
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import AllowedTokensFn
from tunesmith.model.generation.grammar import Grammar
from tunesmith.plan.build import build_plan
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import load_starting_model
from tunesmith.train.loop import TrainingLoop

TIMED_REQUESTS = 3  # requests answered alone
MAX_ITEMS = 1000  # more narrow an interval little


@dataclass(frozen=True)
class ArmResult:
    """`answers` by item; tokens are the mean of a prompt, seconds the median of a request answered
    alone."""

    arm: Arm
    answers: dict[str, str]
    prompt_tokens: float
    request_seconds: float
    train_seconds: float
    total_seconds: float  # all in all, asking and training


@dataclass(frozen=True, eq=False)
class ArmRunner:
    """A model and the rows that it is tried on. `items`: held-out rows that ask something; `store`:
    where answers of the untrained model are kept."""

    plan: Plan
    inputs: RunInputs
    model: PackedCausalLM
    rows: Dataset
    items: tuple[Example, ...]
    passages: PassageIndex | None
    answer_cache: AnswerCache | None = None

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        inputs: RunInputs,
        items: Sequence[Example],
        passages: PassageIndex | None,
        answer_cache: AnswerCache | None = None,
    ) -> ArmRunner:
        rows = inputs.datasets["data"].with_max_length(plan.config.max_length, plan.config.on_overlong)
        return cls(
            plan,
            inputs,
            load_starting_model(plan, inputs),
            rows,
            tuple(items),
            passages,
            answer_cache,
        )

    @cached_property
    def start_weights(self) -> dict:
        return copy_weights(self.model.network)

    @cached_property
    def max_answer_tokens(self) -> int:
        """Tokens for an answer."""
        return compute_max_new_tokens(build_prompts(self.items, self.inputs.renderer))

    @cached_property
    def grammar(self) -> Grammar:
        assert self.inputs.response_schema is not None
        vocab_size, end_ids = self.model.head.weight.shape[0], self.inputs.renderer.end_ids
        return Grammar(
            self.inputs.response_schema,
            self.inputs.model.path,
            vocab_size=vocab_size,
            end_ids=end_ids,
        )

    def build_questions(self, arm: Arm) -> tuple[EvalPrompt, ...]:
        shots = [
            self._add_passages(example, arm)
            for example in sample_examples(self.rows, arm.seed, arm.shots)
        ]
        prompted_items = [
            add_shots(self._add_passages(example, arm), shots, arm.shot_layout)
            for example in self.items
        ]
        return build_prompts(prompted_items, self.inputs.renderer)

    def build_documents(self, arm: Arm) -> list[tuple[Document, ...]]:
        """What is trained, by row: asked as the items are."""
        return [
            self.inputs.renderer.render(self._add_passages(example, arm)).documents
            for example in sample_examples(self.rows, arm.seed, arm.examples)
        ]

    def _add_passages(self, example: Example, arm: Arm) -> Example:
        passages = (
            self.passages.search(get_question(example), arm.passages)
            if self.passages and arm.passages
            else ()
        )
        return add_passages(example, passages)


def select_items(inputs: RunInputs) -> list[Example]:
    """Rows of `eval_data` that ask something and have a right answer, in an order by chance, at
    most MOST_ITEMS. Raises InputError if there are none."""
    if "eval_data" not in inputs.datasets:
        message = "no held-out items to ask; test_data is for the end"
        raise InputError(message, where="eval_data", fix="give eval_data, or --eval-split 0.1")
    rows = inputs.datasets["eval_data"]
    items = select_usable(rows, permutation(0, 0, len(rows)).tolist(), MAX_ITEMS)
    if len(items) < 2:
        message = (
            f"{len(items)} rows of eval_data ask something: at least two are needed for an interval"
        )
        raise InputError(
            message,
            where=f"eval_data: {rows.path}",
            fix="give rows with questions and answers, 20 at least",
        )
    return items


def sample_examples(rows: Dataset, seed: int, count: int) -> list[Example]:
    """The first `count` usable rows of an order that depends on the seed alone: more are the same
    and others."""
    return select_usable(rows, permutation(seed, 0, len(rows)).tolist(), count) if count else []


def select_usable(rows: Dataset, indices: Sequence[int], limit: int) -> list[Example]:
    """Examples that ask something, and whose answer is right."""
    examples: list[Example] = []
    for index in indices:
        if len(examples) == limit:
            break
        example, prepared = rows.render_row(index)
        if (
            prepared.documents
            and (example.messages or example.prompt)
            and not (example.negative or example.banned_spans)
        ):
            examples.append(example)
    return examples


# ---------------------------------------------------------------- one arm


def run_arm(runner: ArmRunner, arm: Arm) -> ArmResult:
    """Raises InputError when a prompt and its answer have no room in the model's context, GateError
    for numbers that are not finite."""
    started = time.perf_counter()
    questions = runner.build_questions(arm)
    _check_context(runner, questions)
    runner.start_weights  # noqa: B018 - taken before anything is trained
    try:
        train_seconds = _train_arm(runner, arm) if arm.examples else 0.0
        seconds = _time_single_requests(
            runner, questions, runner.grammar if arm.is_constrained else None
        )
        answers = _generate_answers(runner, questions, arm)
    finally:
        if arm.examples:
            restore_weights(runner.model.network, runner.start_weights)
    answers_by_id = dict(zip((question.id for question in questions), answers, strict=True))
    prompt_tokens = statistics.fmean(len(question.prompt_ids) for question in questions)
    return ArmResult(
        arm, answers_by_id, prompt_tokens, seconds, train_seconds, time.perf_counter() - started
    )


def _check_context(runner: ArmRunner, questions: Sequence[EvalPrompt]) -> None:
    longest_prompt, context_length = (
        max(len(question.prompt_ids) for question in questions),
        runner.model.context_length,
    )
    if longest_prompt + runner.max_answer_tokens > context_length:
        message = f"a prompt of {longest_prompt:,} tokens and an answer of {runner.max_answer_tokens} exceed the context of {context_length:,}"
        raise InputError(
            message, where="advise", fix="shorter items, or fewer examples in the prompt"
        )


def _time_single_requests(
    runner: ArmRunner, questions: Sequence[EvalPrompt], allowed: AllowedTokensFn | None
) -> float:
    """Of one request, with nothing beside it."""
    timings: list[float] = []
    runner.model.network.eval()
    for question in questions[:TIMED_REQUESTS]:
        started = time.perf_counter()
        list(
            iter_answers(
                runner.model,
                [question],
                runner.inputs.renderer,
                max_new_tokens=runner.max_answer_tokens,
                allowed_tokens_fn=allowed,
            )
        )
        timings.append(time.perf_counter() - started)
    return statistics.median(timings)


def _generate_answers(runner: ArmRunner, questions: Sequence[EvalPrompt], arm: Arm) -> list[str]:
    if arm.is_constrained:
        renderer, allowed = runner.inputs.renderer, runner.grammar
        answer_pairs = iter_answers(
            runner.model,
            questions,
            renderer,
            max_new_tokens=runner.max_answer_tokens,
            allowed_tokens_fn=allowed,
        )
        return [answer.text for _, answer in sorted(answer_pairs)]
    requests = [
        GenerationRequest(question.prompt_ids, runner.max_answer_tokens) for question in questions
    ]
    return [
        answer.text for answer in answer_requests(runner, requests, is_trained=bool(arm.examples))
    ]


def answer_requests(
    runner: ArmRunner, requests: Sequence[GenerationRequest], *, is_trained: bool = False
) -> list[GenerationOutput]:
    """The answers of the model as it is now; those of the untrained one are kept."""
    renderer, answer_cache = runner.inputs.renderer, None if is_trained else runner.answer_cache
    return generate_cached(
        runner.model, requests, decode=renderer.decode, end_ids=renderer.end_ids, cache=answer_cache
    )


def _train_arm(runner: ArmRunner, arm: Arm) -> float:
    """Trains on so many rows as a run on them would be planned; returns the seconds of its
    steps."""
    rows, plan = runner.build_documents(arm), plan_for_size(runner, arm.examples)
    config = dataclasses.replace(plan.config, share_prefixes=runner.plan.config.share_prefixes)
    batch_size = require(config.batch_size)
    sampler = StepSampler(len(rows), batch_size, config.num_train_epochs, arm.seed, plan.steps)
    training = TrainingLoop(
        runner.model,
        _make_document_loader(sampler, rows),
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


def _make_document_loader(
    sampler: StepSampler, rows: Sequence[tuple[Document, ...]]
) -> Callable[..., Sequence[Document]]:
    return lambda step: [document for row in sampler.get_rows(step) for document in rows[row]]


def plan_for_size(runner: ArmRunner, examples: int) -> Plan:
    """What the rules decide for so many rows; the adapter is that of the whole."""
    plan, report = runner.plan, runner.plan.data["data"]
    share = examples / max(1, report.rows)
    tokens = {
        name: max(1, round(getattr(report, name) * share))
        for name in ("documents", "tokens", "supervised_tokens")
    }
    fixed = {
        key: value
        for key, value in plan.settings.items()
        if value.decided_by == "checkpoint" or key in FIXED_SETTINGS
    }
    return build_plan(
        runner.inputs.recipe,
        machine=plan.machine,
        model=plan.model,
        data={**plan.data, "data": dataclasses.replace(report, rows=examples, **tokens)},
        output_dir=runner.inputs.output_dir,
        now=plan.config.now,
        fixed=fixed,
    )


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
