"""The values of continued pretraining that differ from those of fine-tuning on rows: it counts tokens, not rows.

`CPT_RULES` takes the place of `RULES` with stage: cpt.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.core.types import Choice, ModelSpec
from tunesmith.plan import rules
from tunesmith.plan.memory import activation_bytes
from tunesmith.plan.rules import RULES, Known, rule

WINDOW = 2048
LITTLE = 10**7  # tokens
MUCH = 10**10

# (family, hidden size, layers, vocabulary) -> (peak learning rate of its pretraining, where that is published)
PEAKS: dict[tuple[str, int, int, int], tuple[float, str]] = {
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


def method(known: Known) -> Choice:
    """All weights from 10M tokens on, where they fit: adapters learn less there at any rank."""
    needed = 20 * known.model.parameters  # fp32 masters, gradients and moments, and narrow copies
    if known.data.tokens >= LITTLE and 1.5 * needed < known.machine.available_bytes:
        why = f"{known.data.tokens:,} tokens, and all weights fit: an adapter learns less from so much text"
        return rule("full", why, "Biderman 2024: LoRA below full at every rank")
    return rules.method(known)


def window_of(model: ModelSpec) -> int:
    return min(model.context_length, WINDOW)


def max_length(known: Known) -> Choice:
    """2,048 tokens, or the model's context: longer windows spend a growing share of a step on attention."""
    value = window_of(known.model)
    return rule(value, "of a window: longer texts are cut into even windows, which overlap by one token")


def pack_length(known: Known) -> Choice:
    """8k tokens on a GPU whose activations take at most half of the free memory, else 4k."""
    width = 2 if known["dtype"] == "bf16" else 4
    large = known.machine.device != "cpu" and 2 * activation_bytes(known.model, 8192, width) < (
        known.machine.available_bytes
    )
    why = "8k where memory allows on a GPU, else 4k; windows are laid side by side, blind to each other"
    return rule(max(8192 if large else 4096, known["max_length"]), why)


def num_train_epochs(known: Known) -> Choice:
    """3 below 1M tokens, 2 below 10M, 1 above. Up to 4 passes are nearly as good as new text."""
    tokens = known.data.tokens
    value = 3 if tokens < 10**6 else 2 if tokens < LITTLE else 1
    return rule(value, f"{tokens:,} tokens: 3 below 1M, 2 below 10M, else 1", "Muennighoff 2023: up to 4 passes")


def batch_tokens(known: Known) -> Choice:
    """32k tokens, halved (to two windows at least) until the run has 100 steps."""
    size = 32_768
    tokens = known.data.tokens * known["num_train_epochs"]
    while size // 2 >= 2 * known["max_length"] and tokens / size < 100:
        size //= 2
    return rule(max(size, known["max_length"]), "32k tokens a step, fewer so that at least 100 steps remain")


def learning_rate(known: Known) -> Choice:
    """A tenth of the peak of pretraining; from 10B tokens on the whole peak. Where that is not published: 3e-4 below
    0.5B parameters, 1e-4 below 5B, else 2e-5. Ibrahim 2024, 405M parameters: a constant tenth forgets least and learns
    least; a higher rate forgets and learns more, and rehearsal is against the first."""
    shape = known.model.model_type, known.model.hidden_size, known.model.num_layers, known.model.vocab_size
    small = f"; published runs on few tokens took a 30th to a 60th, this one has {known.data.tokens:,}"
    more = small if known.data.tokens < LITTLE else ""
    if shape in PEAKS:
        peak, source = PEAKS[shape]
        if known.data.tokens >= MUCH:
            why = f"{known.data.tokens:,} tokens: re-warmed to the whole peak of pretraining, with rehearsal beside"
            return rule(peak, why, f"{source}; Ibrahim 2024")
        why = f"a tenth of {peak:g}, the peak of its pretraining{more}"
        return rule(float(f"{peak / 10:.2g}"), why, f"{source}; Ibrahim 2024: least forgetting at a tenth")
    parameters = known.model.parameters
    value = 3e-4 if parameters < 5e8 else 1e-4 if parameters < 5e9 else 2e-5
    why = f"a tenth of the usual peak at {parameters / 1e9:.2g}B parameters; this model's own is not known{more}"
    return rule(value, why, "Ibrahim 2024")


def warmup_ratio(known: Known) -> Choice:
    """As in fine-tuning. Ibrahim 2024: how long it rises, 0 to 2% of the run, makes no difference."""
    steps = rules.warmup_ratio(known)
    return rule(steps.value, f"re-warmed: {steps.why}; its length hardly matters", "Ibrahim 2024")


def metrics(known: Known) -> Choice:
    del known
    return rule((), "texts are measured in bits per byte")


OWN: dict[str, Callable[[Known], Choice]] = {
    "method": method,
    "max_length": max_length,
    "pack_length": pack_length,
    "num_train_epochs": num_train_epochs,
    "batch_tokens": batch_tokens,
    "learning_rate": learning_rate,
    "share_prefixes": rules.constant(False, "windows of texts do not begin alike"),
    "metrics": metrics,
    "warmup_ratio": warmup_ratio,
    "lr_scheduler_type": rules.constant(
        "linear",
        "re-decayed, to zero over the run; constant, at a tenth of the peak, forgets least and learns least",
        "Ibrahim 2024",
    ),
}
_NAMES = {"batch_size": "batch_tokens"}
CPT_RULES = {_NAMES.get(key, key): OWN.get(_NAMES.get(key, key), theirs) for key, theirs in RULES.items()}
