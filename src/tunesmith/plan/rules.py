"""One function for each value that a recipe may leave open: the rule, its source and its number.

In: `Known` (facts and the values decided so far). Out: a Choice. `RULES` is in the order of
deciding: a rule may look at those above it. Values are start values, not best values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.core.types import DataReport, Machine, ModelSpec, PlanValue
from tunesmith.plan.memory import count_lora_parameters

MIN_SAVED_SHARE = 0.05  # of the tokens, for which sharing prefixes is worth its segments
SavedShareFn = Callable[
    [int, int], float
]  # of the tokens of a step, from batch_size and pack_length


def assume_no_savings(batch_size: int, pack_length: int) -> float:
    del batch_size, pack_length
    return 0.0


@dataclass(frozen=True)
class RuleContext:
    """What a rule may look at."""

    machine: Machine
    model: ModelSpec
    data: DataReport
    settings: dict[str, PlanValue]  # decided so far
    has_schema: bool
    max_steps: int | None
    stage: str = "sft"
    saved_share: SavedShareFn = assume_no_savings
    num_eval_prompts: int = 0  # of test_data: answers are written side by side
    has_evaluation: bool = False  # on held-out rows or general text, before and after

    def __getitem__(self, key: str) -> Any:
        """Return the value of a setting that is already decided."""
        return self.settings[key].value

    def __contains__(self, key: str) -> bool:
        return key in self.settings

    @property
    def steps(self) -> int:
        """The same count as data/schedule.py's: a fraction of an epoch is rounded to whole rows. Or
        corpus.py's."""
        if self.stage == "cpt":
            steps = math.ceil(self.data.tokens * self["num_train_epochs"] / self["batch_tokens"])
            return max(1, steps if self.max_steps is None else min(steps, self.max_steps))
        rows = max(1, round(self.data.rows * self["num_train_epochs"]))
        steps = math.ceil(rows / self["batch_size"])
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def extend_epochs(self) -> PlanValue | None:
        """So many epochs that max_steps are reached, where fewer were decided."""
        if self.max_steps is None or self.steps >= self.max_steps:
            return None
        is_pretraining = self.stage == "cpt"
        data_size, batch = (
            (self.data.tokens, self["batch_tokens"])
            if is_pretraining
            else (self.data.rows, self["batch_size"])
        )
        epochs = self.max_steps * batch / max(1, data_size)
        return PlanValue(epochs, "user", f"max_steps: {self.max_steps:,} steps take so many")

    @property
    def prefix_savings(self) -> float:
        """The share of this run's tokens that sharing prefixes saves."""
        return self.saved_share(self["batch_size"], self["pack_length"])


def rule_value(value: Any, reason: str, source: str = "") -> PlanValue:
    return PlanValue(value, "rule", reason, source)


def round_up_power_of_two(value: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(1.0, value))))


def method(context: RuleContext) -> PlanValue:
    """An adapter: the base stays frozen. On 4-bit weights where those in 16 bits leave less than a
    fifth of their size (rules.md 4.3). Full fine-tuning only when asked for."""
    weight_bytes, free_bytes = 2 * context.model.parameters, context.machine.available_bytes
    if 1.2 * weight_bytes > free_bytes and "bitsandbytes" in context.machine.versions:
        reason = f"weights in 16 bits take {weight_bytes / 1e9:.1f} GB of {free_bytes / 1e9:.1f} free: 4 bits, and an adapter beside"
        return rule_value("qlora", reason, "Dettmers 2023")
    return rule_value(
        "lora",
        "the base stays as it is, and one base serves many adapters",
        "Hu 2021, Biderman 2024",
    )


def optim(context: RuleContext) -> PlanValue:
    """Moments in 8 bits where those of all weights in fp32 leave less than a fifth of their size
    (as in `method`)."""
    fp32_bytes, free_bytes = 16 * context.model.parameters, context.machine.available_bytes
    if (
        context["method"] == "full"
        and 1.2 * fp32_bytes > free_bytes
        and "bitsandbytes" in context.machine.versions
    ):
        reason = f"weights, gradients and moments in fp32 take {fp32_bytes / 1e9:.1f} GB of {free_bytes / 1e9:.1f} free"
        return rule_value("adamw_8bit", reason, "Dettmers 2022")
    return rule_value("adamw", "moments in fp32")


def dtype(context: RuleContext) -> PlanValue:
    """bf16 where products run in it: twice the rate and half the bytes of fp32 on the machines
    measured."""
    if context.machine.has_bf16_matmul:
        return rule_value(
            "bf16", "this machine multiplies bf16 in hardware; masters of trained weights stay fp32"
        )
    return rule_value(
        "fp32", "this machine has no bf16 products; fp32 is faster here and more precise"
    )


def max_length(context: RuleContext) -> PlanValue:
    """The longest document, unless the model reads less."""
    longest_tokens, context_length = (
        context.data.length_percentiles.get("max", 1),
        context.model.context_length,
    )
    if longest_tokens <= context_length:
        return rule_value(longest_tokens, "the longest document of the data: nothing is cut")
    return PlanValue(
        context_length,
        "checkpoint",
        f"the model's context; the longest document has {longest_tokens:,} tokens",
    )


def pack_length(context: RuleContext) -> PlanValue:
    """4k tokens on a CPU: about 8% faster than 2k, whose products have half the rows. 8k on a
    GPU."""
    target = 4096 if context.machine.device == "cpu" else 8192
    value = max(target, context["max_length"])
    return rule_value(
        value,
        "speed only, never results: documents of a step are laid side by side, blind to each other",
    )


def num_train_epochs(context: RuleContext) -> PlanValue:
    """3 below 2,000 rows, 2 below 50,000, 1 above. rules.md 4.3: 3-5, 2-3, 1-2. Pairs: 2 below
    50,000, 1 above."""
    rows = context.data.rows
    if context.stage == "preference":
        source = "alignment handbook: SmolLM2 2, Zephyr 1 epochs of 61,000 pairs"
        return rule_value(
            2 if rows < 50_000 else 1, f"{rows:,} pairs: 2 epochs below 50,000, else 1", source
        )
    epochs = 3 if rows < 2000 else 2 if rows < 50_000 else 1
    return rule_value(
        epochs,
        f"{rows:,} rows: 3 below 2,000, 2 below 50,000, else 1",
        "LIMA 15, Tulu 3 2, NEFTune table 3-5 epochs",
    )


def batch_size(context: RuleContext) -> PlanValue:
    """16 rows, halved (to 4 at least) until the run has 100 steps. LoRA loses more than full at
    large batches."""
    size = 32 if context["method"] == "full" else 16
    rows = context.data.rows * context["num_train_epochs"]
    while size > 4 and rows / size < 100:
        size //= 2
    return rule_value(
        size, "16-32 rows for LoRA, fewer so that at least 100 steps remain", "Schulman 2025"
    )


def lora_r(context: RuleContext) -> PlanValue:
    """Rank follows the trained tokens: 2 bits a parameter hold 1 bit a token, so r = tokens / (2 *
    parameters per rank); floor 16, for instructions."""
    parameters_per_rank = count_lora_parameters(context.model, 1)
    needed_rank = context.data.supervised_tokens / (2 * parameters_per_rank)
    value = min(256, max(16, round_up_power_of_two(needed_rank)))
    reason = f"{context.data.supervised_tokens:,} trained tokens need rank {math.ceil(needed_rank)}; 16 is the floor"
    return rule_value(
        value,
        reason,
        "Schulman 2025; the usual advice is 8 for style, 64-256 for complex reasoning",
    )


def lora_alpha(context: RuleContext) -> PlanValue:
    """32: with scale alpha / r the best learning rate hardly depends on the rank."""
    del context
    return rule_value(
        32, "with scale alpha / r the learning rate holds for any rank", "Schulman 2025"
    )


def use_rslora(context: RuleContext) -> PlanValue:
    """Only above rank 64, where alpha / r gets small."""
    return rule_value(
        context["lora_r"] > 64, "alpha / sqrt(r) only above rank 64", "Kalajdzievski 2023"
    )


def learning_rate(context: RuleContext) -> PlanValue:
    """5e-5 * (2000 / h)^p * sqrt(batch / 128), times 10 for LoRA (15 below 100 steps); p .781
    Llama, .0775 Qwen, .4 others; at most 3e-3 below 0.5B parameters and 1e-3 above. Fitted at h >=
    2000: below that an extrapolation."""
    if context.stage == "preference":
        return decide_preference_rate(context)
    h, family = context.model.hidden_size, context.model.model_type
    power = get_width_power(family)
    full_rate = 5e-5 * (2000 / h) ** power * math.sqrt(context["batch_size"] / 128)
    if context["method"] == "full":
        value, reason = (
            full_rate,
            "the usual 1e-5 to 5e-5 holds for full fine-tuning from about 3B parameters",
        )
    else:
        factor = 10 if context.steps >= 100 else 15
        max_rate = 3e-3 if context.model.parameters < 5e8 else 1e-3
        value, reason = (
            min(max_rate, factor * full_rate),
            f"LoRA wants about {factor} times the rate of full fine-tuning",
        )
    if h < 2000:
        reason += f"; extrapolated: the formula was fitted for hidden sizes of 2000 and more, this one is {h}"
    return rule_value(
        float(f"{value:.2g}"), reason, "Schulman 2025 and the tinker cookbook's sweep"
    )


def get_width_power(family: str) -> float:
    """How the best rate falls with the hidden size, from the tinker cookbook's fits; .4 is between
    them."""
    return 0.781 if family == "llama" else 0.0775 if family.startswith("qwen") else 0.4


# Full fine-tuning, from about 3B parameters: rules.md 4.3; SimPO's own runs used 3e-7 to 1e-6.
PREFERENCE_RATES = {"dpo": 1e-6, "orpo": 8e-6, "simpo": 1e-6}


def decide_preference_rate(context: RuleContext) -> PlanValue:
    """DPO and SimPO 1e-6, ORPO 8e-6, times 10 for an adapter. Below a hidden size of 2000 times
    (2000 / h)^p as in supervised fine-tuning: an extrapolation."""
    h = context.model.hidden_size
    factor = (10 if context["method"] != "full" else 1) * max(1.0, 2000 / h) ** get_width_power(
        context.model.model_type
    )
    reason = f"{context['loss']}: {PREFERENCE_RATES[context['loss']]:g} for full fine-tuning, times 10 for an adapter"
    if h < 2000:
        reason += f"; extrapolated below hidden sizes of 2000, this one is {h}"
    source = "alignment handbook: DPO 5e-7 to 1e-6 full, 5e-6 QLoRA; ORPO 5e-6 to 8e-6; Meng 2024"
    return rule_value(float(f"{PREFERENCE_RATES[context['loss']] * factor:.2g}"), reason, source)


def loss(context: RuleContext) -> PlanValue:
    del context
    return rule_value(
        "dpo", "compares with the model as it was, which keeps it near", "Rafailov 2023"
    )


def beta(context: RuleContext) -> PlanValue:
    """DPO .1, .5 below 0.5B parameters; ORPO .1 (its lambda); SimPO 2."""
    if context["loss"] == "simpo":
        return rule_value(2.0, "per nat a token", "Meng 2024: 2.0 to 2.5")
    if context["loss"] == "orpo":
        return rule_value(
            0.1,
            "its lambda, the weight of the odds ratio beside the plain loss",
            "Hong 2024: 0.1 to 0.2",
        )
    if context.model.parameters < 5e8:
        return rule_value(
            0.5,
            "per nat of the whole answer; higher keeps a small model nearer to itself",
            "SmolLM2's DPO",
        )
    return rule_value(0.1, "per nat of the whole answer", "Rafailov 2023")


def gamma(context: RuleContext) -> PlanValue:
    if context["loss"] != "simpo":
        return rule_value(0.0, f"{context['loss']} knows no margin")
    return rule_value(0.5 * context["beta"], "half of beta", "Meng 2024: start at gamma / beta 0.5")


def nll_coefficient(context: RuleContext) -> PlanValue:
    """ORPO 1, which is the loss as published; else .2, against chosen answers that become less
    likely."""
    if context["loss"] == "orpo":
        return rule_value(1.0, "part of ORPO: the plain loss of the chosen answer", "Hong 2024")
    return rule_value(
        0.2,
        "keeps the chosen answers from becoming less likely together with the rejected",
        "Llama 3 2024",
    )


SHORT_RUN_STEPS = 5  # steps, of which none is for warming up


def warmup_ratio(context: RuleContext) -> PlanValue:
    """10 steps or 3%, whichever is more; at most a tenth of the run. The first step of a warm-up
    has rate 0: of very few steps that would be a large part, of one all."""
    if context.steps < SHORT_RUN_STEPS:
        return rule_value(
            0.0, f"{context.steps} steps: the first one of a warm-up would train nothing"
        )
    ratio = min(0.1, max(0.03, 10 / context.steps))
    return rule_value(
        round(ratio, 4),
        "10 steps or 3% of them, at most a tenth",
        "Tulu 3 .03, alignment handbook .1",
    )


def make_constant_rule(
    value: Any, reason: str, source: str = ""
) -> Callable[[RuleContext], PlanValue]:
    def return_constant(context: RuleContext) -> PlanValue:
        del context
        return rule_value(value, reason, source)

    return return_constant


def step_in_backward(context: RuleContext) -> PlanValue:
    """Clipping needs the norm of all gradients before the first update, and several packs the sum
    of their gradients. An adapter's gradients are small anyway."""
    if context["method"] != "full":
        return rule_value(False, "gradients of an adapter take little room")
    if context["max_grad_norm"]:
        return rule_value(
            False,
            "gradients are clipped to their common norm; with max_grad_norm: 0 none would be kept",
        )
    documents_per_row = 2 if context.stage == "preference" else 1
    longest_tokens = documents_per_row * context.data.length_percentiles.get("max", 1)
    step_tokens = (
        context["batch_tokens"]
        if context.stage == "cpt"
        else context["batch_size"] * longest_tokens
    )
    if step_tokens > documents_per_row * context["pack_length"]:
        return rule_value(
            False,
            f"a step has up to {step_tokens:,} tokens, over pack_length: gradients of its packs are summed up",
        )
    return rule_value(
        True,
        "nothing is clipped: each weight is updated once its gradient is known, which is then let go",
    )


def eval_steps(context: RuleContext) -> PlanValue:
    return rule_value(
        max(1, math.ceil(context.steps / 4)), "four looks at the held-out loss in a run"
    )


def save_steps(context: RuleContext) -> PlanValue:
    return rule_value(
        max(1, math.ceil(context.steps / 4)), "four checkpoints in a run; the newest two are kept"
    )


def metrics(context: RuleContext) -> PlanValue:
    if context.stage == "preference" and not context.has_schema:
        return rule_value(
            (), "pairs are measured by likelihood; a preferred answer is not the only right one"
        )
    if context.has_schema:
        names = ("json_valid", "schema_valid", "field_f1", "exact_match")
        return rule_value(
            names, "the recipe has a schema: form, then fields, then the whole answer"
        )
    return rule_value(
        ("exact_match",), "no schema: the answer is right when it equals the expected one"
    )


def attention(context: RuleContext) -> PlanValue:
    value = "sdpa" if context.machine.device == "cpu" else "varlen"
    if context.machine.device == "cpu" and context["dtype"] == "bf16" and context.machine.compiler:
        value = "cpu_kernel"
    return rule_value(
        value, "the fastest here of those proven equal to the reference; preflight checks it again"
    )


def share_prefixes(context: RuleContext) -> PlanValue:
    """On from 5% of the tokens: below that, short segments cost what is saved. Dropout draws for
    every token of every document on its own, so a token that stands for several would be another
    training."""
    if context["method"] != "full" and context["lora_dropout"]:
        return rule_value(
            False,
            "lora_dropout draws for each document, and tokens that are computed once have one draw",
        )
    saved_share = context.prefix_savings
    reason = f"saves {saved_share:.1%} of the tokens: what documents of a step begin with alike is computed once"
    return rule_value(saved_share >= MIN_SAVED_SHARE, f"{reason}; on from {MIN_SAVED_SHARE:.0%}")


def weight_layout(context: RuleContext) -> PlanValue:
    """Blocked: the frozen matrices twice, in the layouts that a CPU's bf16 products read. Measured:
    steps 7% faster. Only where the second one takes at most an eighth of the free memory."""
    if (
        context.machine.device != "cpu"
        or context["dtype"] != "bf16"
        or context["method"] in ("qlora", "full")
    ):
        return rule_value("plain", "frozen weights as they are stored")
    extra_bytes = 2 * context.model.block_parameters
    if extra_bytes > context.machine.available_bytes / 8:
        return rule_value(
            "plain",
            f"faster layouts would take {extra_bytes / 1e9:.1f} GB more, over an eighth of the free memory",
        )
    return rule_value(
        "blocked", f"products read them faster so; takes {extra_bytes / 1e9:.1f} GB more"
    )


RULES: dict[str, Callable[[RuleContext], PlanValue]] = {
    "method": method,
    "optim": optim,
    "loss": loss,
    "beta": beta,
    "gamma": gamma,
    "nll_coefficient": nll_coefficient,
    "dtype": dtype,
    "max_length": max_length,
    "pack_length": pack_length,
    "num_train_epochs": num_train_epochs,
    "batch_size": batch_size,
    "lora_r": lora_r,
    "lora_alpha": lora_alpha,
    "lora_dropout": make_constant_rule(
        0.0, "no dropout: it helps little and forbids exact savings", "Biderman 2024"
    ),
    "lora_target_modules": make_constant_rule(
        "all-linear", "attention alone falls behind at equal size", "Schulman 2025"
    ),
    "use_rslora": use_rslora,
    "use_dora": make_constant_rule(
        False, "a little better at low ranks, for slower steps: ask for it", "Liu 2024"
    ),
    "learning_rate": learning_rate,
    "warmup_ratio": warmup_ratio,
    "lr_scheduler_type": make_constant_rule("linear", "falls to zero over the run", "Tulu 3"),
    "weight_decay": make_constant_rule(0.0, "does not reduce forgetting", "Biderman 2024"),
    "max_grad_norm": make_constant_rule(1.0, "the common bound"),
    "step_in_backward": step_in_backward,
    "attention": attention,
    "share_prefixes": share_prefixes,
    "weight_layout": weight_layout,
    "metrics": metrics,
    "eval_steps": eval_steps,
    "save_steps": save_steps,
}
