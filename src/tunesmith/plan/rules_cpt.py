"""The rules of continued pretraining, which counts tokens in place of rows.

`CPT_RULES` takes the place of `RULES` with stage: cpt.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.core.types import ModelSpec, PlanValue
from tunesmith.plan import rules
from tunesmith.plan.activations import ActivationSettings, estimate_activation_bytes
from tunesmith.plan.memory import get_dtype_bytes
from tunesmith.plan.rules import RULES, RuleContext, make_rule_value

DEFAULT_WINDOW = 2048  # tokens
SMALL_CORPUS_TOKENS = 10**7
LARGE_CORPUS_TOKENS = 10**10

# (family, hidden size, layers, vocabulary) -> published peak learning rate of its pretraining
PEAK_LEARNING_RATES: dict[tuple[str, int, int, int], tuple[float, str]] = {
    ("llama", 576, 30, 49152): (3e-3, "SmolLM2 paper, 135M"),
    ("llama", 960, 32, 49152): (3e-3, "SmolLM2 paper, 360M"),
    ("llama", 2048, 24, 49152): (5e-4, "SmolLM2 paper, 1.7B"),
    ("llama", 2048, 22, 32000): (4e-4, "TinyLlama paper"),
    ("llama", 4096, 32, 32000): (3e-4, "Llama 2 paper, 7B"),
    ("llama", 5120, 40, 32000): (3e-4, "Llama 2 paper, 13B"),
    ("llama", 8192, 80, 32000): (1.5e-4, "Llama 2 paper, 70B"),
    ("llama", 4096, 32, 128256): (3e-4, "Llama 3 paper, 8B"),
    ("llama", 8192, 80, 128256): (1.5e-4, "Llama 3 paper, 70B"),
}


def method(context: RuleContext) -> PlanValue:
    """Full fine-tuning from 10M tokens on if it fits: adapters of any rank learn less there."""
    # fp32 master weights, gradients and moments, and low-precision copies
    needed_bytes = 20 * context.model.parameters
    fits = 1.5 * needed_bytes < context.machine.available_bytes
    if context.data.tokens >= SMALL_CORPUS_TOKENS and fits:
        reason = f"{context.data.tokens:,} tokens, and all weights fit: an adapter would learn less"
        return make_rule_value("full", reason, "Biderman 2024: LoRA below full at every rank")
    return rules.method(context)


def choose_window(model: ModelSpec) -> int:
    """Return the tokens of a window."""
    return min(model.context_length, DEFAULT_WINDOW)


def max_length(context: RuleContext) -> PlanValue:
    """2,048 tokens or the model's context length: longer windows spend more of a step on
    attention."""
    reason = "window length: longer texts are cut into even windows that overlap by one token"
    return make_rule_value(choose_window(context.model), reason)


def pack_length(context: RuleContext) -> PlanValue:
    """8k tokens on a GPU if their activations take at most half of the free memory, else 4k."""
    length = 4096
    if context.machine.device != "cpu":
        dtype_bytes = get_dtype_bytes(context["dtype"])
        settings = ActivationSettings(dtype_bytes, is_gpu=True)
        activation_bytes = estimate_activation_bytes(context.model, 8192, settings)
        if 2 * activation_bytes < context.machine.available_bytes:
            length = 8192
    reason = "8k on a GPU with enough memory, else 4k; windows of a pack do not see each other"
    return make_rule_value(max(length, context["max_length"]), reason)


def num_train_epochs(context: RuleContext) -> PlanValue:
    """3 below 1M tokens, 2 below 10M, else 1. Up to 4 passes are nearly as good as new text."""
    tokens = context.data.tokens
    epochs = 1
    if tokens < 10**6:
        epochs = 3
    elif tokens < SMALL_CORPUS_TOKENS:
        epochs = 2
    reason = f"{tokens:,} tokens: 3 below 1M, 2 below 10M, else 1"
    return make_rule_value(epochs, reason, "Muennighoff 2023: up to 4 passes")


def batch_tokens(context: RuleContext) -> PlanValue:
    """32k tokens, halved down to two windows until the run has 100 steps."""
    size = 32_768
    tokens = context.data.tokens * context["num_train_epochs"]
    while size // 2 >= 2 * context["max_length"] and tokens / size < 100:
        size //= 2
    reason = "32k tokens per step, fewer if the run has under 100 steps"
    return make_rule_value(max(size, context["max_length"]), reason)


def learning_rate(context: RuleContext) -> PlanValue:
    """A tenth of the peak of pretraining, and the peak itself from 10B tokens on.

    Where the peak is not published: 3e-4 below 0.5B parameters, 1e-4 below 5B, else 2e-5. Ibrahim
    2024, 405M parameters: a constant tenth forgets least and learns least; a higher rate forgets
    and learns more, and rehearsal limits the forgetting."""
    model = context.model
    tokens = context.data.tokens
    note = ""
    if tokens < SMALL_CORPUS_TOKENS:
        note = f"; published runs on few tokens used a 30th to a 60th, this one has {tokens:,}"
    shape = (model.model_type, model.hidden_size, model.num_layers, model.vocab_size)
    if shape not in PEAK_LEARNING_RATES:
        reason = (
            f"a tenth of the usual peak at {model.parameters / 1e9:.2g}B parameters; {UNKNOWN_PEAK}"
        )
        return make_rule_value(_guess_rate(model.parameters), reason + note, "Ibrahim 2024")
    peak, source = PEAK_LEARNING_RATES[shape]
    if tokens >= LARGE_CORPUS_TOKENS:
        reason = f"{tokens:,} tokens: re-warmed to the peak of pretraining, with rehearsal"
        return make_rule_value(peak, reason, f"{source}; Ibrahim 2024")
    reason = f"a tenth of {peak:g}, the peak of its pretraining{note}"
    source = (
        f"{source}; Ibrahim 2024: least forgetting at a tenth; "
        "experiments/continued_pretraining_rate"
    )
    return make_rule_value(float(f"{peak / 10:.2g}"), reason, source)


UNKNOWN_PEAK = "the peak of this model is not published"


def _guess_rate(parameters: int) -> float:
    if parameters < 5e8:
        return 3e-4
    return 1e-4 if parameters < 5e9 else 2e-5


def warmup_ratio(context: RuleContext) -> PlanValue:
    """Warm up as in SFT. Ibrahim 2024: a warmup of 0 to 2% of the run makes no difference."""
    plan_value = rules.warmup_ratio(context)
    if context["lr_scheduler_type"] == "constant":
        return plan_value
    reason = f"re-warmed: {plan_value.reason}; its length hardly matters"
    return make_rule_value(plan_value.value, reason, "Ibrahim 2024")


def metrics(context: RuleContext) -> PlanValue:
    del context
    return make_rule_value((), "texts are measured in bits per byte")


CPT_OVERRIDES: dict[str, Callable[[RuleContext], PlanValue]] = {
    "method": method,
    "max_length": max_length,
    "pack_length": pack_length,
    "num_train_epochs": num_train_epochs,
    "batch_tokens": batch_tokens,
    "learning_rate": learning_rate,
    "share_prefixes": rules.make_constant_rule(False, "windows of texts have no common prefixes"),
    "metrics": metrics,
    "warmup_ratio": warmup_ratio,
    "lr_scheduler_type": rules.make_constant_rule(
        "linear",
        "re-decayed to zero; a constant tenth of the peak forgets least and learns least",
        "Ibrahim 2024",
    ),
}
CPT_RULES: dict[str, Callable[[RuleContext], PlanValue]] = {}
for _key, _sft_rule in RULES.items():
    _key = "batch_tokens" if _key == "batch_size" else _key
    CPT_RULES[_key] = CPT_OVERRIDES.get(_key, _sft_rule)
