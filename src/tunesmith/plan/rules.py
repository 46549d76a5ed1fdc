"""One rule for each setting that a recipe may leave open, with its source and its numbers.

In: a RuleContext (the facts, and the settings decided so far). Out: a PlanValue. `RULES` is in the
order of deciding: a rule may read the settings above its own. Values are starting points, not
optima.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.core.formatting import format_count
from tunesmith.core.mesh import SINGLE_GPU, Mesh
from tunesmith.core.types import DataReport, Machine, ModelSpec, PlanValue
from tunesmith.plan.memory import compute_frozen_bytes, count_lora_parameters

# fraction of the tokens from which prefix sharing pays for its segments
MIN_SAVED_SHARE = {"cpu": 0.05, "cuda": 0.25}
SHORT_RUN_STEPS = 5  # shorter runs have no warmup
# (batch_size, pack_length) -> fraction of the tokens of a step that prefix sharing saves
SavedShareFn = Callable[[int, int], float]
CountFn = Callable[[Sequence[str]], int]  # names of modules -> their parameters
EXACT_MATCH = PlanValue(("exact_match",), "rule", "right if equal to the expected answer")


def assume_no_savings(batch_size: int, pack_length: int) -> float:
    del batch_size, pack_length
    return 0.0


def count_nothing(modules: Sequence[str]) -> int:
    del modules
    return 0


@dataclass(frozen=True)
class Measures:
    """What the rows and the model are like, for rules and estimates."""

    saved_share: SavedShareFn = assume_no_savings
    count_parameters: CountFn = count_nothing
    metrics: PlanValue = EXACT_MATCH  # session/auto_metrics.py


NO_MEASURES = Measures()


@dataclass(frozen=True)
class RuleContext:
    """The inputs of a rule. `with_settings` returns those of the next one."""

    machine: Machine
    model: ModelSpec
    data: DataReport
    settings: Mapping[str, PlanValue]  # decided so far
    max_steps: int | None
    stage: str = "sft"
    measures: Measures = NO_MEASURES
    num_eval_prompts: int = 0  # prompts of test_data that are answered, in batches
    has_evaluation: bool = False  # on held-out rows or general text, before and after
    has_constraints: bool = False  # of `never`
    mesh: Mesh = SINGLE_GPU  # of a target with several GPUs

    def __getitem__(self, key: str) -> Any:
        """Return the value of a setting that is already decided."""
        return self.settings[key].value

    def __contains__(self, key: str) -> bool:
        return key in self.settings

    def with_settings(self, settings: Mapping[str, PlanValue]) -> RuleContext:
        """Return the context with more settings decided, or other ones."""
        return replace(self, settings={**self.settings, **settings})

    @property
    def steps(self) -> int:
        """Optimizer steps, as data/sampler.py counts them."""
        return min(self.steps_of_epochs, self.max_steps or self.steps_of_epochs)

    @property
    def steps_of_epochs(self) -> int:
        """Optimizer steps that all epochs take: part of an epoch is whole rows."""
        if self.stage == "cpt":
            tokens = self.data.tokens * self["num_train_epochs"]
            return max(1, math.ceil(tokens / self["batch_tokens"]))
        rows = max(1, round(self.data.rows * self["num_train_epochs"]))
        return math.ceil(rows / self["batch_size"])

    @property
    def documents_per_row(self) -> int:
        return 2 if self.stage == "preference" else 1

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row; the two documents of a pair together."""
        return self.documents_per_row * self.data.length_percentiles.get("max", 1)

    @property
    def prefix_savings(self) -> float:
        """Fraction of this run's tokens that prefix sharing saves."""
        return self.measures.saved_share(self["batch_size"], self["pack_length"])

    def extend_epochs(self) -> PlanValue | None:
        """Return as many epochs as max_steps takes, if the run has fewer."""
        if self.max_steps is None or self.steps >= self.max_steps:
            return None
        if self.stage == "cpt":
            epochs = self.max_steps * self["batch_tokens"] / max(1, self.data.tokens)
        else:
            epochs = self.max_steps * self["batch_size"] / max(1, self.data.rows)
        reason = f"max_steps: as many epochs as {self.max_steps:,} steps take"
        return make_user_value(epochs, reason)

    def explain_max_steps(self) -> PlanValue:
        """Return the epochs with what decides: max_steps, if the run ends before they do."""
        setting = self.settings["num_train_epochs"]
        if self.steps == self.steps_of_epochs:
            return setting
        epochs = setting.value * self.steps / self.steps_of_epochs
        reason = f"max_steps decides: {self.steps:,} steps are {epochs:.2g} epochs"
        return replace(setting, reason=reason, source="")


def make_rule_value(value: Any, reason: str, source: str = "") -> PlanValue:
    return PlanValue(value, "rule", reason, source)


def make_user_value(value: Any, reason: str = "set in the recipe") -> PlanValue:
    return PlanValue(value, "user", reason)


def make_constant_rule(
    value: Any, reason: str, source: str = ""
) -> Callable[[RuleContext], PlanValue]:
    def return_constant(context: RuleContext) -> PlanValue:
        del context
        return make_rule_value(value, reason, source)

    return return_constant


# ---------------------------------------------------------------- method and precision


def method(context: RuleContext) -> PlanValue:
    """LoRA; QLoRA if 16-bit weights leave less than a fifth of their size free (ours).

    Full fine-tuning only on request."""
    weight_bytes = compute_frozen_bytes(context.model, "lora", 2)
    free_bytes = context.machine.available_bytes
    if 1.2 * weight_bytes > free_bytes and "bitsandbytes" in context.machine.versions:
        reason = (
            f"16-bit weights take {weight_bytes / 1e9:.1f} GB of {free_bytes / 1e9:.1f} GB free: "
            "an adapter on 4-bit weights"
        )
        return make_rule_value("qlora", reason, "Dettmers 2023")
    reason = "the base stays as it is, and one base serves many adapters"
    return make_rule_value("lora", reason, "Hu 2021, Biderman 2024; experiments/peft_and_full")


def optim(context: RuleContext) -> PlanValue:
    """AdamW; 8-bit moments if all weights with fp32 moments leave less than a fifth of their size
    free (as in `method`)."""
    fp32_bytes = 16 * context.model.parameters
    free_bytes = context.machine.available_bytes
    is_short = context["method"] == "full" and 1.2 * fp32_bytes > free_bytes
    if is_short and "bitsandbytes" in context.machine.versions:
        reason = (
            f"fp32 weights, gradients and moments take {fp32_bytes / 1e9:.1f} GB of "
            f"{free_bytes / 1e9:.1f} GB free"
        )
        return make_rule_value("adamw_8bit", reason, "Dettmers 2022")
    return make_rule_value("adamw", "moments in fp32")


def dtype(context: RuleContext) -> PlanValue:
    """bf16 if the hardware multiplies it: twice the speed and half the bytes of fp32 where
    measured. Older GPUs multiply fp16, whose numbers end at 65,504: Gemma's hidden states are
    larger."""
    if context.machine.has_bf16_matmul:
        reason = "this machine has bf16 matmuls; trained weights keep fp32 master copies"
        return make_rule_value("bf16", reason)
    if context.machine.device == "cuda":
        name = context.machine.device_name
        if context.model.model_type.startswith("gemma"):
            reason = f"{name} has no bf16, and Gemma overflows in fp16: fp32, which is slow there"
            return make_rule_value("fp32", reason)
        reason = f"{name} has no bf16: fp16, with the loss scaled so that gradients do not vanish"
        return make_rule_value("fp16", reason, "Micikevicius 2018")
    reason = "this machine has no bf16 matmuls: fp32 is faster on it, and more precise"
    return make_rule_value("fp32", reason)


# ---------------------------------------------------------------- lengths and batches


def max_length(context: RuleContext) -> PlanValue:
    """The longest document, up to the model's context length."""
    longest = context.data.length_percentiles.get("max", 1)
    context_length = context.model.context_length
    if longest <= context_length:
        return make_rule_value(longest, "the longest document of the data: nothing is cut")
    reason = f"the model's context length; the longest document has {longest:,} tokens"
    return PlanValue(context_length, "checkpoint", reason)


def pack_length(context: RuleContext) -> PlanValue:
    """4k tokens on a CPU (8% faster than 2k, whose matmuls have half the rows), 8k on a GPU."""
    target = 4096 if context.machine.device == "cpu" else 8192
    reason = "affects speed, never results: documents of a pack do not see each other"
    value = max(target, context["max_length"])
    return make_rule_value(value, reason, "experiments/gradient_accumulation")


def num_train_epochs(context: RuleContext) -> PlanValue:
    """3 below 2,000 rows, 2 below 50,000, else 1; pairs: 2 below 50,000, else 1.

    Ours; common advice is 3-5, 2-3, 1-2."""
    rows = context.data.rows
    epochs = 1 if rows >= 50_000 else 2
    if context.stage == "preference":
        reason = f"{format_count(rows, 'pair')}: 2 below 50,000, else 1"
        source = "alignment handbook: SmolLM2 2, Zephyr 1 epochs of 61,000 pairs"
        return make_rule_value(epochs, reason, source)
    if rows < 2000:
        epochs = 3
    reason = f"{format_count(rows, 'row')}: 3 below 2,000, 2 below 50,000, else 1"
    return make_rule_value(epochs, reason, "LIMA 15, Tulu 3 2, NEFTune table 3-5 epochs")


def batch_size(context: RuleContext) -> PlanValue:
    """16 rows (32 in full fine-tuning), halved down to 4 until the run has 100 steps.

    LoRA loses more than full fine-tuning at large batches."""
    size = 32 if context["method"] == "full" else 16
    rows = context.data.rows * context["num_train_epochs"]
    while size > 4 and rows / size < 100:
        size //= 2
    reason = "16 (32 in full fine-tuning), halved down to 4 until the run has 100 steps"
    source = "Schulman 2025; experiments/packing_mask: a quarter of the steps cost 0.16 nats"
    return make_rule_value(size, reason, source)


# ---------------------------------------------------------------- adapter


def lora_target_modules(context: RuleContext) -> PlanValue:
    """All linears; attention and MLPs where recurrent layers alternate with attention or experts
    are routed.

    arXiv 2604.22127: in Qwen3.5-0.8B, whose layers alternate, adapting the recurrent ones costs
    14.8 points of GSM8K; in Falcon-H1, whose layers run both side by side, it gains 8.6. An adapter
    of 128 experts is larger than that of all other layers, and each expert sees few tokens."""
    model = context.model
    words = tuple(word for word in ("attention", "mlp") if word in model.parts)
    is_parallel = any("+" in mixer for mixer in model.layer_mixers)
    if "recurrent" in model.parts and not is_parallel:
        reason = "recurrent layers that alternate with attention are better left frozen"
        return make_rule_value(words, reason, "arXiv 2604.22127: -14.8 points with them")
    if model.num_experts:
        reason = f"each of the {model.num_experts} experts of a layer sees few tokens"
        return make_rule_value(words, reason, "ours; list `experts` too to adapt them")
    reason = "attention layers alone learn less at equal size"
    return make_rule_value("all-linear", reason, "Schulman 2025")


def lora_r(context: RuleContext) -> PlanValue:
    """The rank that holds the supervised tokens: a parameter stores 2 bits, and a token has 1 bit,
    so r = tokens / (2 * parameters per rank), at least 16."""
    tokens = context.data.supervised_tokens
    targets = context["lora_target_modules"]
    needed_rank = tokens / (2 * max(1, count_lora_parameters(context.model, 1, targets)))
    power_of_two = 1 << max(0, math.ceil(math.log2(max(1.0, needed_rank))))
    fitting = f"{tokens:,} supervised tokens fit into rank {math.ceil(needed_rank)}"
    reason = f"{fitting}; 16 is the least that we use"
    source = "Schulman 2025; experiments/rank"
    return make_rule_value(min(256, max(16, power_of_two)), reason, source)


def lora_alpha(context: RuleContext) -> PlanValue:
    """32: with scale alpha / r the best learning rate hardly depends on the rank."""
    del context
    reason = "with scale alpha / r the best learning rate is the same for any rank"
    return make_rule_value(32, reason, "Schulman 2025")


def use_rslora(context: RuleContext) -> PlanValue:
    """Above rank 64, where alpha / r becomes small."""
    reason = "scale alpha / sqrt(r) above rank 64 only"
    return make_rule_value(context["lora_r"] > 64, reason, "Kalajdzievski 2023")


# ---------------------------------------------------------------- optimization


SMALLEST_SCALED_BATCH = 16  # rows, below which the rate falls no further


def learning_rate(context: RuleContext) -> PlanValue:
    """5e-5 * (2000 / h)^p * sqrt(batch / 128), times 10 for LoRA (15 below 100 steps).

    p is .781 for Llama, .0775 for Qwen, .4 for others; LoRA is limited to 3e-3 below 0.5B
    parameters and 1e-3 above. Fitted for h >= 2000, extrapolated below. A batch below 16 rows
    counts as 16: with 2 rows, the root was 4 times too low (experiments/learning_rate)."""
    if context.stage == "preference":
        return decide_preference_rate(context)
    hidden_size = context.model.hidden_size
    power = get_width_power(context.model.model_type)
    batch_factor = compute_batch_factor(context["batch_size"])
    rate = 5e-5 * (2000 / hidden_size) ** power * batch_factor
    reason = (
        "5e-5 at a hidden size of 2000 and 128 rows per step; higher for narrower models, lower "
        "for fewer rows"
    )
    if context["method"] != "full":
        factor = 10 if context.steps >= 100 else 15
        max_rate = 3e-3 if context.model.parameters < 5e8 else 1e-3
        rate = min(max_rate, factor * rate)
        reason = f"LoRA needs about {factor} times the rate of full fine-tuning"
    if hidden_size < 2000:
        reason += f"; extrapolated: fitted for hidden sizes from 2000, this one is {hidden_size}"
    if context["batch_size"] < SMALLEST_SCALED_BATCH:
        rows = format_count(context["batch_size"], "row")
        reason += f"; a batch of {rows} counts as one of {SMALLEST_SCALED_BATCH}"
    source = "Schulman 2025, the tinker cookbook's sweep; experiments/learning_rate"
    return make_rule_value(float(f"{rate:.2g}"), reason, source)


def compute_batch_factor(rows: int) -> float:
    """Return how the best rate grows with the rows of a step, 1 at 128."""
    return math.sqrt(max(SMALLEST_SCALED_BATCH, rows) / 128)


def get_width_power(family: str) -> float:
    """Return how the best rate falls with the hidden size; .4 lies between the two fits of the
    tinker cookbook."""
    if family == "llama":
        return 0.781
    return 0.0775 if family.startswith("qwen") else 0.4


# Full fine-tuning, from about 3B parameters: ours; SimPO's own runs used 3e-7 to 1e-6.
PREFERENCE_RATES = {"dpo": 1e-6, "orpo": 8e-6, "simpo": 1e-6, "kto": 1e-6}


def decide_preference_rate(context: RuleContext) -> PlanValue:
    """1e-6 for DPO, SimPO and KTO, 8e-6 for ORPO, times 10 for an adapter.

    Times (2000 / h)^p below a hidden size of 2000, as in `learning_rate`: an extrapolation."""
    hidden_size = context.model.hidden_size
    full_rate = PREFERENCE_RATES[context["loss"]]
    factor = max(1.0, 2000 / hidden_size) ** get_width_power(context.model.model_type)
    if context["method"] != "full":
        factor *= 10
    reason = f"{context['loss']}: {full_rate:g} in full fine-tuning, times 10 for an adapter"
    if hidden_size < 2000:
        reason += f"; extrapolated below hidden sizes of 2000, this one is {hidden_size}"
    source = "alignment handbook: DPO 5e-7 to 1e-6 full, 5e-6 QLoRA; ORPO 5e-6 to 8e-6; Meng 2024"
    return make_rule_value(float(f"{full_rate * factor:.2g}"), reason, source)


def warmup_ratio(context: RuleContext) -> PlanValue:
    """10 steps or 3%, whichever is more, up to a tenth of the run.

    None in very short runs: the first step of a warmup has rate 0, so it trains nothing. None with
    a constant rate, as in transformers."""
    if context["lr_scheduler_type"] == "constant":
        return make_rule_value(0.0, "constant from the first step; or use constant_with_warmup")
    if context.steps < SHORT_RUN_STEPS:
        unit = "step" if context.steps == 1 else "steps"
        reason = f"{context.steps} {unit}: the first step of a warmup would train nothing"
        return make_rule_value(0.0, reason)
    ratio = min(0.1, max(0.03, 10 / context.steps))
    reason = "10 steps or 3% of the run, up to a tenth"
    return make_rule_value(round(ratio, 4), reason, "Tulu 3 .03, alignment handbook .1")


def step_in_backward(context: RuleContext) -> PlanValue:
    """Update each weight in the backward pass, so that gradients are not kept.

    Clipping needs the norm of all gradients first, and several packs the sum of their gradients.
    The gradients of an adapter are small anyway."""
    if context["method"] != "full":
        return make_rule_value(False, "the gradients of an adapter take little memory")
    if context["dtype"] == "fp16":
        return make_rule_value(False, "scaled gradients must all be finite before an update")
    if context["max_grad_norm"]:
        reason = "clipping needs all gradients; max_grad_norm: 0 would save their memory"
        return make_rule_value(False, reason)
    if context.stage == "cpt":
        step_tokens = context["batch_tokens"]
    else:
        step_tokens = context["batch_size"] * context.longest_row
    if step_tokens > context.documents_per_row * context["pack_length"]:
        reason = f"a step of up to {step_tokens:,} tokens has several packs, with summed gradients"
        return make_rule_value(False, reason)
    return make_rule_value(True, "no clipping: each gradient is freed once its weight is updated")


# ---------------------------------------------------------------- preference pairs


def loss(context: RuleContext) -> PlanValue:
    del context
    reason = "compares with the model before training, which keeps it close"
    return make_rule_value("dpo", reason, "Rafailov 2023")


def beta(context: RuleContext) -> PlanValue:
    """DPO .1, .5 below 0.5B parameters; KTO .1; ORPO .1 (its lambda); SimPO 2."""
    if context["loss"] == "kto":
        return make_rule_value(0.1, "per nat of the answer", "Ethayarajh 2024")
    if context["loss"] == "simpo":
        return make_rule_value(2.0, "per nat per token", "Meng 2024: 2.0 to 2.5")
    if context["loss"] == "orpo":
        return make_rule_value(0.1, "lambda, the weight of the odds ratio", "Hong 2024: 0.1 to 0.2")
    if context.model.parameters < 5e8:
        reason = "per nat of the answer; higher keeps a small model closer to the reference"
        return make_rule_value(0.5, reason, "SmolLM2's DPO")
    return make_rule_value(0.1, "per nat of the answer", "Rafailov 2023")


KTO_WEIGHT_REASON = "both kinds of answers count alike; the data check says if one is rare"


def gamma(context: RuleContext) -> PlanValue:
    if context["loss"] != "simpo":
        return make_rule_value(0.0, f"{context['loss']} has no margin")
    source = "Meng 2024: start at gamma / beta 0.5"
    return make_rule_value(0.5 * context["beta"], "half of beta", source)


def nll_coefficient(context: RuleContext) -> PlanValue:
    """1 in ORPO, which is the loss as published; 0 in KTO; else .2, so that chosen answers do not
    become less likely."""
    if context["loss"] == "orpo":
        return make_rule_value(1.0, "part of ORPO: the NLL of the chosen answer", "Hong 2024")
    if context["loss"] == "kto":
        return make_rule_value(0.0, "no pairs: desirable answers rise on their own")
    reason = "keeps chosen answers from becoming less likely along with the rejected ones"
    return make_rule_value(0.2, reason, "Llama 3 2024")


# ---------------------------------------------------------------- evaluation


def eval_steps(context: RuleContext) -> PlanValue:
    steps = max(1, math.ceil(context.steps / 4))
    return make_rule_value(steps, "four evaluations on eval_data per run")


def save_steps(context: RuleContext) -> PlanValue:
    steps = max(1, math.ceil(context.steps / 4))
    return make_rule_value(steps, "four checkpoints per run; the newest two are kept")


def metrics(context: RuleContext) -> PlanValue:
    if context.stage == "preference":
        reason = "pairs are measured by likelihood: the chosen answer is not the only right one"
        return make_rule_value((), reason)
    return context.measures.metrics


# ---------------------------------------------------------------- speed


def attention(context: RuleContext) -> PlanValue:
    if context.machine.device == "cuda":
        if context["dtype"] != "fp32" and context.machine.has_flash_attention:
            reason = "flash attention, one call for a pack; preflight compares it with transformers"
            return make_rule_value("varlen", reason)
        reason = "document by document: flash attention needs 16 bits and a GPU that has it"
        return make_rule_value("sdpa", reason)
    machine = context.machine
    has_kernel = context["dtype"] == "bf16" and machine.has_bf16_matmul and machine.compiler
    backend = "cpu_kernel" if has_kernel else "sdpa"
    reason = "the fastest backend here; preflight compares it with the reference"
    return make_rule_value(backend, reason)


def deterministic(context: RuleContext) -> PlanValue:
    """Off: a GPU is slower with it, and a CPU adds in the same order anyway."""
    if context.machine.device == "cpu":
        return make_rule_value(False, "not needed: on a CPU a resumed run has the same bits anyway")
    reason = "a resumed run differs in the last bits; true makes it equal, with slower backwards"
    return make_rule_value(False, reason)


def share_prefixes(context: RuleContext) -> PlanValue:
    """On from 5% of the tokens, 25% on a GPU: below that, short segments cost more than they save.
    On a GPU, where this was counted and not measured, each layer gathers the shared keys.

    Off with dropout and noise, which draw for every document, while a shared token has a single
    draw."""
    if "neftune_noise_alpha" in context:
        reason = "neftune_noise_alpha draws for each document, but shared tokens are computed once"
        return make_rule_value(False, reason)
    if context["method"] != "full" and context["lora_dropout"]:
        reason = "lora_dropout draws for each document, but shared tokens are computed once"
        return make_rule_value(False, reason)
    savings = context.prefix_savings
    min_share = MIN_SAVED_SHARE[context.machine.device]
    reason = (
        f"saves {savings:.1%} of the tokens: common prefixes of a step are computed once; "
        f"on from {min_share:.0%}"
    )
    return make_rule_value(savings >= min_share, reason)


def weight_layout(context: RuleContext) -> PlanValue:
    """Keep frozen matrices in the two layouts that bf16 matmuls of a CPU read: steps are 7% faster.

    Only if the second copy takes at most an eighth of the free memory."""
    machine = context.machine
    is_frozen_bf16 = context["dtype"] == "bf16" and context["method"] == "lora"
    if machine.device != "cpu" or not machine.has_bf16_matmul or not is_frozen_bf16:
        return make_rule_value("plain", "frozen weights as they are stored")
    extra_bytes = 2 * (context.model.block_parameters - context.model.expert_parameters)
    extra = f"{extra_bytes / 1e9:.1f} GB more"
    if extra_bytes > machine.available_bytes / 8:
        reason = f"blocked layouts would take {extra}, over an eighth of the free memory"
        return make_rule_value("plain", reason)
    return make_rule_value("blocked", f"matmuls read blocked weights faster; takes {extra}")


RULES: dict[str, Callable[[RuleContext], PlanValue]] = {
    "method": method,
    "optim": optim,
    "loss": loss,
    "beta": beta,
    "gamma": gamma,
    "nll_coefficient": nll_coefficient,
    "desirable_weight": make_constant_rule(1.0, KTO_WEIGHT_REASON, "Ethayarajh 2024"),
    "undesirable_weight": make_constant_rule(1.0, KTO_WEIGHT_REASON, "Ethayarajh 2024"),
    "dtype": dtype,
    "max_length": max_length,
    "pack_length": pack_length,
    "num_train_epochs": num_train_epochs,
    "batch_size": batch_size,
    "lora_target_modules": lora_target_modules,
    "lora_r": lora_r,
    "lora_alpha": lora_alpha,
    "lora_dropout": make_constant_rule(
        0.0, "no dropout: it helps little and rules out prefix sharing", "Biderman 2024"
    ),
    "use_rslora": use_rslora,
    "use_dora": make_constant_rule(
        False, "slightly better at low ranks, slower per step: on request", "Liu 2024"
    ),
    "modules_to_save": make_constant_rule((), "no module is trained in full: on request"),
    "learning_rate": learning_rate,
    "lr_scheduler_type": make_constant_rule("linear", "decays to zero over the run", "Tulu 3"),
    "warmup_ratio": warmup_ratio,
    "weight_decay": make_constant_rule(0.0, "does not reduce forgetting", "Biderman 2024"),
    "max_grad_norm": make_constant_rule(1.0, "the common limit"),
    "step_in_backward": step_in_backward,
    "attention": attention,
    "deterministic": deterministic,
    "share_prefixes": share_prefixes,
    "weight_layout": weight_layout,
    "metrics": metrics,
    "eval_steps": eval_steps,
    "save_steps": save_steps,
}
