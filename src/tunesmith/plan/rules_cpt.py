"""The values of continued pretraining that differ from those of fine-tuning on rows: it counts
tokens, not rows.

`CPT_RULES` takes the place of `RULES` with stage: cpt.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.core.types import ModelSpec, PlanValue
from tunesmith.plan import rules
from tunesmith.plan.memory import estimate_activation_bytes
from tunesmith.plan.rules import RULES, RuleContext, rule_value

DEFAULT_WINDOW = 2048
SMALL_CORPUS_TOKENS = 10**7  # tokens
LARGE_CORPUS_TOKENS = 10**10

# (family, hidden size, layers, vocabulary) -> (peak learning rate of its pretraining, where that is
# published)
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
    """All weights from 10M tokens on, where they fit: adapters learn less there at any rank."""
    needed_bytes = (
        20 * context.model.parameters
    )  # fp32 masters, gradients and moments, and narrow copies
    if (
        context.data.tokens >= SMALL_CORPUS_TOKENS
        and 1.5 * needed_bytes < context.machine.available_bytes
    ):
        reason = f"{context.data.tokens:,} tokens, and all weights fit: an adapter learns less from so much text"
        return rule_value("full", reason, "Biderman 2024: LoRA below full at every rank")
    return rules.method(context)


def choose_window(model: ModelSpec) -> int:
    return min(model.context_length, DEFAULT_WINDOW)


def max_length(context: RuleContext) -> PlanValue:
    """2,048 tokens, or the model's context: longer windows spend a growing share of a step on
    attention."""
    value = choose_window(context.model)
    return rule_value(
        value, "of a window: longer texts are cut into even windows, which overlap by one token"
    )


def pack_length(context: RuleContext) -> PlanValue:
    """8k tokens on a GPU whose activations take at most half of the free memory, else 4k."""
    dtype_bytes = 2 if context["dtype"] == "bf16" else 4
    has_room_for_8k = context.machine.device != "cpu" and 2 * estimate_activation_bytes(
        context.model, 8192, dtype_bytes
    ) < (context.machine.available_bytes)
    reason = "8k where memory allows on a GPU, else 4k; windows are laid side by side, blind to each other"
    return rule_value(max(8192 if has_room_for_8k else 4096, context["max_length"]), reason)


def num_train_epochs(context: RuleContext) -> PlanValue:
    """3 below 1M tokens, 2 below 10M, 1 above. Up to 4 passes are nearly as good as new text."""
    tokens = context.data.tokens
    value = 3 if tokens < 10**6 else 2 if tokens < SMALL_CORPUS_TOKENS else 1
    return rule_value(
        value,
        f"{tokens:,} tokens: 3 below 1M, 2 below 10M, else 1",
        "Muennighoff 2023: up to 4 passes",
    )


def batch_tokens(context: RuleContext) -> PlanValue:
    """32k tokens, halved (to two windows at least) until the run has 100 steps."""
    size = 32_768
    tokens = context.data.tokens * context["num_train_epochs"]
    while size // 2 >= 2 * context["max_length"] and tokens / size < 100:
        size //= 2
    return rule_value(
        max(size, context["max_length"]),
        "32k tokens a step, fewer so that at least 100 steps remain",
    )


def learning_rate(context: RuleContext) -> PlanValue:
    """A tenth of the peak of pretraining; from 10B tokens on the whole peak. Where that is not
    published: 3e-4 below 0.5B parameters, 1e-4 below 5B, else 2e-5. Ibrahim 2024, 405M parameters:
    a constant tenth forgets least and learns least; a higher rate forgets and learns more, and
    rehearsal is against the first."""
    shape = (
        context.model.model_type,
        context.model.hidden_size,
        context.model.num_layers,
        context.model.vocab_size,
    )
    small_corpus_note = f"; published runs on few tokens took a 30th to a 60th, this one has {context.data.tokens:,}"
    note = small_corpus_note if context.data.tokens < SMALL_CORPUS_TOKENS else ""
    if shape in PEAK_LEARNING_RATES:
        peak, source = PEAK_LEARNING_RATES[shape]
        if context.data.tokens >= LARGE_CORPUS_TOKENS:
            reason = f"{context.data.tokens:,} tokens: re-warmed to the whole peak of pretraining, with rehearsal beside"
            return rule_value(peak, reason, f"{source}; Ibrahim 2024")
        reason = f"a tenth of {peak:g}, the peak of its pretraining{note}"
        return rule_value(
            float(f"{peak / 10:.2g}"),
            reason,
            f"{source}; Ibrahim 2024: least forgetting at a tenth",
        )
    parameters = context.model.parameters
    value = 3e-4 if parameters < 5e8 else 1e-4 if parameters < 5e9 else 2e-5
    reason = f"a tenth of the usual peak at {parameters / 1e9:.2g}B parameters; this model's own is not known{note}"
    return rule_value(value, reason, "Ibrahim 2024")


def warmup_ratio(context: RuleContext) -> PlanValue:
    """As in fine-tuning. Ibrahim 2024: how long it rises, 0 to 2% of the run, makes no
    difference."""
    plan_value = rules.warmup_ratio(context)
    return rule_value(
        plan_value.value,
        f"re-warmed: {plan_value.reason}; its length hardly matters",
        "Ibrahim 2024",
    )


def metrics(context: RuleContext) -> PlanValue:
    del context
    return rule_value((), "texts are measured in bits per byte")


CPT_OVERRIDES: dict[str, Callable[[RuleContext], PlanValue]] = {
    "method": method,
    "max_length": max_length,
    "pack_length": pack_length,
    "num_train_epochs": num_train_epochs,
    "batch_tokens": batch_tokens,
    "learning_rate": learning_rate,
    "share_prefixes": rules.make_constant_rule(False, "windows of texts do not begin alike"),
    "metrics": metrics,
    "warmup_ratio": warmup_ratio,
    "lr_scheduler_type": rules.make_constant_rule(
        "linear",
        "re-decayed, to zero over the run; constant, at a tenth of the peak, forgets least and learns least",
        "Ibrahim 2024",
    ),
}
_RENAMED_KEYS = {"batch_size": "batch_tokens"}
CPT_RULES = {
    _RENAMED_KEYS.get(key, key): CPT_OVERRIDES.get(_RENAMED_KEYS.get(key, key), sft_rule)
    for key, sft_rule in RULES.items()
}
