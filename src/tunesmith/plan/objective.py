"""Settings of the objective that a recipe may ask for: trained text, smoothing, noise, schedule.

In: the recipe and the RuleContext. Out: a PlanValue for each that differs from the default; a
setting that is off is not in the plan. Left out: beta, rates and the other rules (rules.py)."""

from __future__ import annotations

import math

from tunesmith.core.errors import InputError
from tunesmith.core.types import PlanValue
from tunesmith.plan.rules import RuleContext, make_rule_value, make_user_value
from tunesmith.recipe.objectives import SchedulerKwargs
from tunesmith.recipe.schema import Recipe

DECAY_SHARE = 0.1  # of the steps
DEFAULT_TIMESCALE = 10_000  # without warm-up, as in transformers


def decide_objective(recipe: Recipe, context: RuleContext) -> dict[str, PlanValue]:
    """Return the settings of the objective, before any rule. Raises InputError for those that
    contradict the data."""
    settings: dict[str, PlanValue] = {}
    if recipe.train_on != "answers":
        settings["train_on"] = _describe_trained_text(recipe)
    if recipe.label_smoothing:
        settings["label_smoothing"] = _describe_smoothing(recipe, context)
    if recipe.neftune_noise_alpha:
        reason = "uniform noise of alpha / sqrt(tokens * hidden size) per document (NEFTune)"
        settings["neftune_noise_alpha"] = make_user_value(recipe.neftune_noise_alpha, reason)
    return settings


def _describe_trained_text(recipe: Recipe) -> PlanValue:
    reason = "each message of these roles is trained through its end token"
    if recipe.train_on == "all":
        reason = "prompts, answers and the text of the template are trained"
    return make_user_value(recipe.train_on, reason)


def _describe_smoothing(recipe: Recipe, context: RuleContext) -> PlanValue:
    if context.data.banned:
        raise InputError(
            "label_smoothing cannot be combined with `never`: it also raises the probability of "
            "the banned tokens",
            where="label_smoothing",
            fix="leave it out, or use `never` with mode: filter",
        )
    reason = "of each label is spread evenly over the vocabulary"
    if context.stage == "preference":
        reason = "of the pairs are taken to be labeled the other way round (cDPO)"
    return make_user_value(recipe.label_smoothing, f"{recipe.label_smoothing:.0%} {reason}")


def refuse_single_answers(context: RuleContext) -> None:
    """Raise InputError for KTO with one row per step: its KL term pairs a prompt with the answer of
    another row."""
    if context.stage == "preference" and context["loss"] == "kto" and context["batch_size"] < 2:
        raise InputError(
            "KTO measures its KL term on the answers of other rows of a step, but a step has one",
            where="batch_size",
            fix="set batch_size to at least 2, better 8",
        )


def decide_scheduler_kwargs(kwargs: SchedulerKwargs, context: RuleContext) -> dict[str, PlanValue]:
    """Return the arguments of the schedule, if it takes any. Raises InputError for a decay that
    does not fit in the run."""
    schedule = context["lr_scheduler_type"]
    warmup_steps = math.ceil(context.steps * context["warmup_ratio"])
    if schedule == "inverse_sqrt":
        timescale = kwargs.timescale
        if timescale == "auto":
            timescale = warmup_steps or DEFAULT_TIMESCALE
        reason = "the rate falls with 1 / sqrt(1 + steps after warm-up / timescale)"
        value = make_rule_value({"timescale": timescale}, reason, "as in transformers")
        return {"lr_scheduler_kwargs": value}
    if schedule != "warmup_stable_decay":
        return {}
    steps_after_warmup = max(0, context.steps - warmup_steps)
    decay_steps = kwargs.num_decay_steps
    if decay_steps == "auto":
        decay_steps = min(math.ceil(DECAY_SHARE * context.steps), steps_after_warmup)
    if decay_steps > steps_after_warmup:
        raise InputError(
            f"num_decay_steps {decay_steps:,} is more than the {steps_after_warmup:,} "
            "steps after warm-up",
            where="lr_scheduler_kwargs",
            fix="lower num_decay_steps or warmup_ratio",
        )
    values = {
        "num_decay_steps": decay_steps,
        "decay_type": kwargs.decay_type,
        "min_lr_ratio": kwargs.min_lr_ratio,
    }
    reason = f"constant until the last {decay_steps:,} of {context.steps:,} steps"
    if not decay_steps:
        reason = f"no decay: all {context.steps:,} steps are warm-up"
    value = make_rule_value(values, reason, "Hu 2024 (MiniCPM): a tenth of the run decays")
    return {"lr_scheduler_kwargs": value}
