"""What a run does beside its steps, and how long that takes: when it will be finished.

In: a plan whose training has a time (calibration.py), and its facts. Out: the plan with the seconds
from the start of `train` to its end. What is measured is known beforehand, item by item; it is
counted in tokens of a forward. Left out: rows that the model writes for itself, rollbacks, and how
much later a model that rambles ends its answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.adapter_scaling import ADAPTER_SCALES, MAX_TOKENS
from tunesmith.evaluate.general_text import GeneralText
from tunesmith.evaluate.generate_until import EvalPrompt, compute_max_new_tokens
from tunesmith.evaluate.items import build_eval_items
from tunesmith.model.generation.engine import MAX_BATCH_ROWS, find_common_prefix
from tunesmith.plan.flops import count_computed_tokens, estimate_run_flops
from tunesmith.plan.guard import count_probe_tokens, has_guard
from tunesmith.plan.memory import count_lora_parameters
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.session.inputs import RunInputs
from tunesmith.train.base_reference import can_disable_adapter
from tunesmith.train.guard.probes import MAX_TEXT_CHARS, MAX_TEXTS

# In tokens of a forward, fitted to runs on two cores of a CPU (docs/guides/plan.md): what a step of
# answers takes beside its rows, and what the proof takes, whose documents are few and cut.
DECODE_STEP_TOKENS, PREFLIGHT_TOKENS = 60, 6000
LOAD_SECONDS = 3.0  # imports, weights, the first products


def add_run_seconds(plan: Plan, eval_cost: EvalCostEstimate) -> Plan:
    (train_seconds,) = plan.seconds
    rank = plan.config.lora_r or 0
    token_flops = estimate_run_flops(plan) / count_computed_tokens(plan)
    forward_share = (
        2 * (plan.model.block_parameters + count_lora_parameters(plan.model, rank)) / token_flops
    )  # the share of a step's time
    overhead = eval_cost.count_tokens() / count_computed_tokens(plan) * forward_share
    return dataclasses.replace(plan, total_seconds=LOAD_SECONDS + train_seconds * (1 + overhead))


class EvalCostEstimate:
    """The parts of a run that are no steps, in tokens of a forward through all layers."""

    def __init__(self, plan: Plan, inputs: RunInputs) -> None:
        """Raises InputError, as a run does, for items that cannot be measured."""
        self.plan, self.text_tokens = plan, inputs.renderer.encode_text
        self.items, self.can_disable_adapter = (
            build_eval_items(_drop_custom_metrics(plan), inputs),
            can_disable_adapter(plan, inputs),
        )
        self.num_measured_scales = 1 if inputs.adapter else 2  # of the scales
        self.head_ratio = plan.model.head_parameters / max(1, plan.model.block_parameters)
        held_out = {
            role: self._count_text_tokens(texts)
            for role, texts in self.items.held_out_texts.items()
        }
        self.general_tokens = self._count_text_tokens(self.items.general_texts)
        self.eval_tokens = _count_tokens(self.items.eval_documents) + held_out.get("eval_data", 0.0)
        self.test_tokens = _count_tokens(self.items.test_documents) + held_out.get("test_data", 0.0)

    def _count_text_tokens(self, texts: Sequence[GeneralText]) -> float:
        """Every token of a text has a target, and costs the head too."""
        return sum(len(self.text_tokens(text.text)) for text in texts) * (1 + self.head_ratio)

    def count_tokens(self) -> float:
        num_evals = (
            math.ceil(self.plan.steps / self.plan.config.eval_steps)
            if self.items.has_training_eval
            else 0
        )
        return (
            PREFLIGHT_TOKENS
            + self.count_before()
            + num_evals * self.count_eval()
            + self.count_probes()
            + self.count_after()
            + self.count_scales()
        )

    def count_before(self) -> float:
        """The base often goes on to the end of its room."""
        read_tokens = self.test_tokens + self.general_tokens
        return self._count_answers(self._list_questions(), is_trained=False) + (
            read_tokens if self.can_disable_adapter else 2 * read_tokens
        )

    def count_after(self) -> float:
        """The answers end as they were taught to. What was expected, and general text, stand beside
        the base: read with the adapter off, or kept before."""
        read_tokens = self.test_tokens + self.general_tokens
        return self._count_answers(self._list_questions(), is_trained=True) + (
            2 * read_tokens if self.can_disable_adapter else read_tokens
        )

    def _list_questions(self) -> tuple[EvalPrompt, ...]:
        return (*self.items.prompts, *self.items.eliciting_prompts)

    def count_eval(self) -> float:
        short_tokens = MAX_TEXTS * MAX_TEXT_CHARS / 4 if self.items.general_texts else 0.0
        watched_tokens = self.general_tokens if self.items.should_track_general else 0.0
        return (
            self._count_answers(self.items.selection_prompts, is_trained=True)
            + self.eval_tokens
            + short_tokens
            + watched_tokens
        )

    def count_probes(self) -> float:
        """One before the first step, too."""
        plan, probe_steps = self.plan, self.plan.config.probe_steps
        num_probes = 1 + plan.steps // probe_steps if probe_steps and has_guard(plan) else 0
        tokens_per_probe = count_probe_tokens(
            plan.machine.device, plan.data["data"], plan.config.max_length, plan.config.probe_prompts
        )
        return num_probes * tokens_per_probe

    def count_scales(self) -> float:
        if self.plan.config.method == "full" or not self.eval_tokens:
            return 0.0
        general_tokens = min(MAX_TOKENS * (1 + self.head_ratio), self.general_tokens)
        return (
            len(ADAPTER_SCALES) * min(MAX_TOKENS, self.eval_tokens)
            + (len(ADAPTER_SCALES) - self.num_measured_scales) * general_tokens
        )

    def _count_answers(self, questions: Sequence[EvalPrompt], *, is_trained: bool) -> float:
        """The prompts, what they share once, and as many steps as the longest answer has tokens, of
        the rows that are written side by side."""
        if not questions:
            return 0.0
        prompts = [question.prompt_ids for question in questions]
        shared_tokens = len(find_common_prefix(prompts)) if len(prompts) > 1 else 0
        max_new_tokens = compute_max_new_tokens(questions)
        steps = (
            max(question.num_expected_tokens for question in questions)
            if is_trained
            else max_new_tokens
        )
        max_rows, remaining = MAX_BATCH_ROWS[self.plan.machine.device], len(questions)
        generated_tokens = 0.0
        while remaining > 0:
            generated_tokens += steps * (DECODE_STEP_TOKENS + min(max_rows, remaining))
            remaining -= max_rows
        return sum(map(len, prompts)) - shared_tokens * (len(prompts) - 1) + generated_tokens


def _drop_custom_metrics(plan: Plan) -> Plan:
    """The user's own metrics are tried on the expected answers before a run: not by a plan, which
    runs no code."""
    metrics = plan.config.metrics
    builtin_metrics = tuple(metric for metric in metrics if parse_custom_metric(metric) is None)
    if metrics and not builtin_metrics:
        builtin_metrics = ("exact_match",)
    config = dataclasses.replace(plan.config, metrics=builtin_metrics)
    return dataclasses.replace(plan, config=config)


def _count_tokens(documents: Sequence[Document]) -> float:
    return float(sum(map(len, documents)))
