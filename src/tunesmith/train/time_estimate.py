"""What a run does beside its steps, and how long that takes: when it will be finished.

In: a plan whose training has a time (calibration.py), and its facts. Out: the plan with the seconds from the start of
`train` to its end. What is measured is known beforehand, item by item; it is counted in tokens of a forward. Left out:
rows that the model writes for itself, rollbacks, and how much later a model that rambles ends its answers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.adapter_scaling import SCALES, TOKENS
from tunesmith.evaluate.general_text import GeneralText
from tunesmith.evaluate.generate_until import Question, answer_length
from tunesmith.evaluate.measure import items_of
from tunesmith.model.generation.engine import MOST_ROWS, common_start
from tunesmith.plan.flops import run_flops, tokens_computed
from tunesmith.plan.guard import guards, probe_tokens
from tunesmith.plan.memory import lora_parameters
from tunesmith.recipe.fields import own_metric
from tunesmith.session.inputs import Facts
from tunesmith.train.base_reference import is_switched
from tunesmith.train.guard.probes import TEXT_CHARACTERS, TEXTS

# In tokens of a forward, fitted to runs on two cores of a CPU (docs/plan.md): what a step of answers takes beside its
# rows, and what the proof takes, whose documents are few and cut.
STEP_TOKENS, PROOF_TOKENS = 60, 6000
LOAD_SECONDS = 3.0  # imports, weights, the first products


def with_finish(plan: Plan, beside: Beside) -> Plan:
    (training,) = plan.seconds
    rank = plan.choices["lora_r"].value if "lora_r" in plan.choices else 0
    step = run_flops(plan) / tokens_computed(plan)
    forward = 2 * (plan.model.block_parameters + lora_parameters(plan.model, rank)) / step  # the share of a step's time
    more = beside.tokens() / tokens_computed(plan) * forward
    return dataclasses.replace(plan, whole_seconds=LOAD_SECONDS + training * (1 + more))


class Beside:
    """The parts of a run that are no steps, in tokens of a forward through all layers."""

    def __init__(self, plan: Plan, facts: Facts) -> None:
        """Raises InputError, as a run does, for items that cannot be measured."""
        self.plan, self.text_tokens = plan, facts.renderer.text_tokens
        self.items, self.switched = items_of(_without_code(plan), facts), is_switched(plan, facts)
        self.known_ends = 1 if facts.adapter else 2  # of the scales
        self.head = plan.model.head_parameters / max(1, plan.model.block_parameters)
        held_out = {role: self._read(texts) for role, texts in self.items.held_out.items()}
        self.general = self._read(self.items.texts)
        self.eval_tokens = _length(self.items.eval_documents) + held_out.get("eval_data", 0.0)
        self.test_tokens = _length(self.items.test_documents) + held_out.get("test_data", 0.0)

    def _read(self, texts: Sequence[GeneralText]) -> float:
        """Every token of a text has a target, and costs the head too."""
        return sum(len(self.text_tokens(text.text)) for text in texts) * (1 + self.head)

    def tokens(self) -> float:
        looks = math.ceil(self.plan.steps / self.plan["eval_steps"]) if self.items.selecting else 0
        return PROOF_TOKENS + self.before() + looks * self.look() + self.probes() + self.after() + self.scales()

    def before(self) -> float:
        """The base often goes on to the end of its room."""
        read = self.test_tokens + self.general
        return self._answers(self._asked(), trained=False) + (read if self.switched else 2 * read)

    def after(self) -> float:
        """The answers end as they were taught to. What was expected, and general text, stand beside the base: read with
        the adapter off, or kept before."""
        read = self.test_tokens + self.general
        return self._answers(self._asked(), trained=True) + (2 * read if self.switched else read)

    def _asked(self) -> tuple[Question, ...]:
        return (*self.items.questions, *self.items.eliciting)

    def look(self) -> float:
        short = TEXTS * TEXT_CHARACTERS / 4 if self.items.texts else 0.0
        watched = self.general if self.items.watched else 0.0
        return self._answers(self.items.selecting_questions, trained=True) + self.eval_tokens + short + watched

    def probes(self) -> float:
        """One before the first step, too."""
        plan, every = self.plan, self.plan["probe_steps"]
        count = 1 + plan.steps // every if every and guards(plan) else 0
        each = probe_tokens(plan.machine.device, plan.data["data"], plan["max_length"], plan["probe_prompts"])
        return count * each

    def scales(self) -> float:
        if self.plan["method"] == "full" or not self.eval_tokens:
            return 0.0
        general = min(TOKENS * (1 + self.head), self.general)
        return len(SCALES) * min(TOKENS, self.eval_tokens) + (len(SCALES) - self.known_ends) * general

    def _answers(self, questions: Sequence[Question], *, trained: bool) -> float:
        """The prompts, what they share once, and as many steps as the longest answer has tokens, of the rows that are
        written side by side."""
        if not questions:
            return 0.0
        prompts = [question.prompt for question in questions]
        shared = len(common_start(prompts)) if len(prompts) > 1 else 0
        room = answer_length(questions)
        steps = max(question.expected_tokens for question in questions) if trained else room
        most, left = MOST_ROWS[self.plan.machine.device], len(questions)
        written = 0.0
        while left > 0:
            written += steps * (STEP_TOKENS + min(most, left))
            left -= most
        return sum(map(len, prompts)) - shared * (len(prompts) - 1) + written


def _without_code(plan: Plan) -> Plan:
    """The user's own metrics are tried on the expected answers before a run: not by a plan, which runs no code."""
    metrics = plan.choices["metrics"]
    safe = tuple(metric for metric in metrics.value if own_metric(metric) is None)
    value = safe if safe or not metrics.value else ("exact_match",)
    return dataclasses.replace(plan, choices=plan.choices | {"metrics": dataclasses.replace(metrics, value=value)})


def _length(documents: Sequence[Document]) -> float:
    return float(sum(map(len, documents)))
