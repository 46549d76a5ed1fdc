"""Estimate the time of a run from start to end, given the time of its steps.

In: a plan with a measured training time (calibrate.py), and its inputs. Out: the plan with
`total_seconds`. Everything that will be measured is known beforehand, item by item; its cost is
counted in forward tokens. Left out: rehearsal rows that the model generates, rollbacks, and answers
that become longer than expected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.adapter_scaling import ADAPTER_SCALES, MAX_TOKENS
from tunesmith.evaluate.general_text import GeneralText
from tunesmith.evaluate.generate_until import EvalPrompt, compute_max_new_tokens
from tunesmith.evaluate.items import build_eval_items
from tunesmith.model.generation.engine import MAX_BATCH_ROWS, find_common_prefix
from tunesmith.model.paged_cache import BLOCK_TOKENS
from tunesmith.plan.activations import ALL_LINEAR
from tunesmith.plan.flops import (
    count_active_lora_parameters,
    count_computed_tokens,
    estimate_run_flops,
)
from tunesmith.plan.guard import count_probe_tokens, has_guard
from tunesmith.plan.memory import needs_complete_answers
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.session.inputs import RunInputs
from tunesmith.train.base_reference import can_disable_adapter
from tunesmith.train.guard.probes import MAX_TEXT_CHARS, MAX_TEXTS

# Fitted to runs on two CPU cores (docs/guides/plan.md): the cost of a decoding step next to that of
# its rows, and of preflight, in forward tokens.
DECODE_STEP_TOKENS = 60
PREFLIGHT_TOKENS = 6000
LOAD_SECONDS = 3.0  # imports, weights, first matrix products


def add_run_seconds(plan: Plan, eval_cost: EvalCostEstimate) -> Plan:
    """Return the plan with the time of the run, given that of its steps."""
    (train_seconds,) = plan.seconds
    num_tokens = count_computed_tokens(plan)
    num_parameters = plan.model.active_parameters
    targets = plan.config.lora_target_modules or ALL_LINEAR
    num_parameters += count_active_lora_parameters(plan.model, plan.config.lora_r or 0, targets)
    step_flops_per_token = estimate_run_flops(plan) / num_tokens
    forward_share = 2 * num_parameters / step_flops_per_token
    overhead = eval_cost.count_tokens() / num_tokens * forward_share
    return dataclasses.replace(plan, total_seconds=LOAD_SECONDS + train_seconds * (1 + overhead))


class EvalCostEstimate:
    """The cost of everything in a run but its steps, in tokens of a forward through all layers."""

    def __init__(self, plan: Plan, inputs: RunInputs) -> None:
        """Raise InputError, as the run would, for items that cannot be measured."""
        self.plan = plan
        self.encode_text = inputs.renderer.encode_text
        self.items = build_eval_items(_drop_custom_metrics(plan), inputs)
        self.has_constraints = bool(inputs.recipe.never)
        self.can_disable_adapter = can_disable_adapter(plan, inputs)
        self.num_measured_scales = 1 if inputs.adapter else 2  # by the metrics before and after
        self.head_ratio = plan.model.head_parameters / max(1, plan.model.active_parameters)
        self.choice_tokens = _count_choice_tokens(self.items.choices.values())
        texts = self.items.held_out_texts
        self.general_tokens = self._count_text_tokens(self.items.general_texts)
        self.eval_tokens = sum(map(len, self.items.eval_documents)) + self._count_text_tokens(
            texts.get("eval_data", ())
        )
        self.test_tokens = sum(map(len, self.items.test_documents)) + self._count_text_tokens(
            texts.get("test_data", ())
        )

    def _count_text_tokens(self, texts: Sequence[GeneralText]) -> float:
        """Count the tokens of texts; each is a target, so it costs the head too."""
        return sum(len(self.encode_text(text.text)) for text in texts) * (1 + self.head_ratio)

    def count_tokens(self) -> float:
        num_evals = 0
        if self.items.has_training_eval:
            num_evals = math.ceil(self.plan.steps / self.plan.config.eval_steps)
        return (
            PREFLIGHT_TOKENS
            + self.count_before()
            + num_evals * self.count_eval()
            + self.count_probes()
            + self.count_after()
            + self.count_scales()
        )

    def count_before(self) -> float:
        """Count the evaluation before training; base models often write answers to the limit.

        Texts are read twice when the base model's hidden states must be cached."""
        read_tokens = self.test_tokens + self.general_tokens
        if not self.can_disable_adapter:
            read_tokens *= 2
        answer_tokens = self._count_answers(self._list_prompts(), is_trained=False)
        return answer_tokens + self.choice_tokens + read_tokens

    def count_after(self) -> float:
        """Count the evaluation after training; answers end as they were taught to.

        Texts are read twice when the base model is the one with the adapter off."""
        read_tokens = self.test_tokens + self.general_tokens
        if self.can_disable_adapter:
            read_tokens *= 2
        answer_tokens = self._count_answers(self._list_prompts(), is_trained=True)
        return answer_tokens + self.choice_tokens + read_tokens

    def _list_prompts(self) -> tuple[EvalPrompt, ...]:
        return (*self.items.prompts, *self.items.eliciting_prompts)

    def count_eval(self) -> float:
        """Count one evaluation during training."""
        tokens = self._count_answers(self.items.selection_prompts, is_trained=True)
        tokens += self.eval_tokens
        if self.items.general_texts:
            tokens += MAX_TEXTS * MAX_TEXT_CHARS / 4
        if self.items.should_track_general:
            tokens += self.general_tokens
        return tokens

    def count_probes(self) -> float:
        """Count all generation probes, the one before the first step included."""
        config = self.plan.config
        if not config.probe_steps or not has_guard(self.plan):
            return 0.0
        num_probes = 1 + self.plan.steps // config.probe_steps
        tokens_per_probe = count_probe_tokens(
            self.plan.machine.device,
            self.plan.data["data"],
            config.max_length,
            config.probe_prompts,
        )
        return num_probes * tokens_per_probe

    def count_scales(self) -> float:
        """Count the sweep of adapter scales."""
        if self.plan.config.method == "full" or not self.eval_tokens:
            return 0.0
        num_scales = len(ADAPTER_SCALES)
        eval_tokens = min(MAX_TOKENS, self.eval_tokens)
        general_tokens = min(MAX_TOKENS * (1 + self.head_ratio), self.general_tokens)
        num_general = num_scales - self.num_measured_scales
        return num_scales * eval_tokens + num_general * general_tokens

    def _count_answers(self, prompts: Sequence[EvalPrompt], *, is_trained: bool) -> float:
        """Count prompts, with their common prefix once, and the decoding of answers in batches.

        A batch takes as many steps as its longest answer has tokens."""
        if not prompts:
            return 0.0
        prompt_ids = [prompt.prompt_ids for prompt in prompts]
        shared_tokens = len(find_common_prefix(prompt_ids)) if len(prompts) > 1 else 0
        shared_tokens -= shared_tokens % BLOCK_TOKENS
        tokens: float = sum(map(len, prompt_ids)) - shared_tokens * (len(prompts) - 1)
        needs_end = needs_complete_answers(
            self.plan.config.metrics, has_constraints=self.has_constraints
        )
        num_steps = compute_max_new_tokens(prompts, needs_end=needs_end)
        if is_trained:
            num_steps = max(prompt.num_expected_tokens for prompt in prompts)
        batch_rows = MAX_BATCH_ROWS[self.plan.machine.device]
        for start in range(0, len(prompts), batch_rows):
            num_rows = min(batch_rows, len(prompts) - start)
            tokens += num_steps * (DECODE_STEP_TOKENS + num_rows)
        return tokens


def _count_choice_tokens(choices: Collection[Sequence[Document]]) -> int:
    """Count the tokens of choices by likelihood: the prompt of a row is read once."""
    answers = sum(int((each.weights_L > 0).sum()) for row in choices for each in row[1:])
    return answers + sum(len(row[0]) for row in choices)


def _drop_custom_metrics(plan: Plan) -> Plan:
    """Return the plan without custom metrics: a run tries them, a plan runs no code of the user."""
    metrics = plan.config.metrics
    builtin_metrics = tuple(metric for metric in metrics if parse_custom_metric(metric) is None)
    if metrics and not builtin_metrics:
        builtin_metrics = ("exact_match",)
    config = dataclasses.replace(plan.config, metrics=builtin_metrics)
    return dataclasses.replace(plan, config=config)
