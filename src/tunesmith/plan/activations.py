"""The bytes that a forward keeps for its backward.

In: the shape of a model (core/model_spec.py). Out: bytes per token, by part of the layers. The
modules of ours (model/layers.py) keep what their backward reads and no more; of transformers', the
sets below say what is different. Every family is compared with what autograd keeps
(tests/unit/plan/test_saved_bytes.py). Left out: values per head and per token of small width, such
as the scales of norms, and masks of windows, which torch's attention in fp32 keeps per document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tunesmith.core.model_spec import ModelSpec, PartShape

ALL_LINEAR = "all-linear"
ATTENTION = "attention"
RECURRENT = "recurrent"
MLP = "mlp"
EXPERTS = "experts"
NORMS = "norms"
OTHERS = ""  # linears of no part: those of Gemma 4's embeddings for each layer
NO_PART = PartShape({}, 0, 0, 0, 0)
Targets = str | Sequence[str]  # a value of lora_target_modules

HYBRID_TYPES = {
    *("lfm2", "lfm2_moe", "lfm3", "olmo_hybrid", "granitemoehybrid", "falcon_h1", "nemotron_h"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
}
# with MLPs of ours; those of transformers also keep the activation, and the input of the last
# linear if that has an adapter
REPLACED_MLP_TYPES = {
    *("llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3_text"),
    *("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe"),
    *("glm4_moe_lite", "hunyuan_v1_moe", "internlm3", "iquestcoder", "olmoe", "sarvam_mla"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"),
}
# with norms of ours, or torch's own, which keep their inputs as they are; those of transformers
# keep them in fp32, and the layer norm of Cohere also the difference from the mean
REPLACED_NORM_TYPES = {
    *(*REPLACED_MLP_TYPES, *HYBRID_TYPES),
    *("flex_olmo", "gpt_oss", "granitemoe", "granitemoeshared", "minimax_m2"),
}
TORCH_NORM_TYPES = {"gpt2", "gpt_neox", "jais2", "persimmon", "phi", "starcoder2"}
CENTERED_NORM_TYPES = {"cohere", "cohere2", "cohere2_moe"}
WEIGHTLESS_NORM_TYPES = {"nanochat", "olmo"}  # two per layer
WEIGHTLESS_HEAD_NORM_TYPES = {"nanochat"}  # norms of queries and keys
# attention and MLP read the same norm; or two norms of the same hidden states
SHARED_NORM_TYPES = {"cohere", "cohere2", "cohere2_moe", "phi"}
SHARED_INPUT_TYPES = {"gpt_neox"}
GATED_ATTENTION_TYPES = {"afmoe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm3"}
LATENT_ATTENTION_TYPES = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla"}
FUSED_ATTENTION_TYPES = {"gpt_neox", "phi3"}  # q, k and v are views of one product
PROPORTIONAL_TYPES = {"gemma4_text", "gemma4_unified_text"}
SOFTCAP_TYPES = {"gemma2", "vaultgemma"}
# shared experts have a gate of their own
GATED_EXPERT_TYPES = {"qwen2_moe", "qwen3_next", "qwen3_5_moe_text"}
INNER_NORM_TYPES = {"bitnet"}  # norms before o_proj and down_proj
# what an activation made of several operations keeps beside its input, relative to its width
ACTIVATION_VALUES = {"apertus": 2.25, "gpt2": 3.0, "phi": 3.0}


class ActivationSettings(NamedTuple):
    """The settings that decide how much is kept, apart from the model."""

    dtype_bytes: int
    targets: Targets = ALL_LINEAR  # of the adapter
    use_dora: bool = False
    norm_bytes: int = 0  # per value that our norms read; 0: those of the dtype
    is_gpu: bool = False
    checkpointing: str = "none"

    def is_adapted(self, part: str) -> bool:
        """Return whether linears of a part have adapters. Names of layers count as all linears."""
        words = {self.targets} if isinstance(self.targets, str) else set(self.targets)
        if words <= {ATTENTION, RECURRENT, MLP, EXPERTS}:
            return part in words
        return part != EXPERTS


def estimate_activation_bytes(spec: ModelSpec, tokens: int, settings: ActivationSettings) -> int:
    """Return the bytes saved for the backward pass of a pack, and the widest layer's
    temporaries."""
    temporary_bytes = compute_temporary_bytes(spec, settings.dtype_bytes)
    return tokens * (compute_saved_bytes(spec, settings) + temporary_bytes)


def compute_saved_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the bytes per token that are saved for the backward pass. Checkpointing `selective`
    recomputes gate and up; `full` saves the inputs of the layers from the first adapter on, and all
    of the last."""
    tables = 4 * spec.head_dim  # cosines and sines, which all layers share
    if settings.checkpointing != "full":
        saved = list_saved_bytes(spec, settings)
        return sum(saved.values()) + tables * (saved[ATTENTION] > 0)
    num_inputs = spec.num_layers - 1 - _find_first_layer(spec, settings)
    inputs = num_inputs * spec.hidden_size * settings.dtype_bytes
    return tables + inputs + _compute_last_layer_bytes(spec, settings)


def _compute_last_layer_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the bytes per token that the last layer and the norm after it save."""
    saved = _count_last_norm_bytes(spec, settings)
    for word, num_bytes in _list_part_bytes(spec, settings).items():
        saved += int(num_bytes * _compute_share(spec, word, spec.num_layers - 1))
    return saved


def list_saved_bytes(spec: ModelSpec, settings: ActivationSettings) -> dict[str, int]:
    """Return part of the layers -> the bytes per token that all layers save. What comes before the
    first adapter saves nothing."""
    saved = _list_part_bytes(spec, settings)
    words = _list_adapted_words(settings)
    first = _find_first_layer(spec, settings)
    has_mixers = not {ATTENTION, RECURRENT}.isdisjoint(words)
    for word in saved:
        # mixers come before what follows them in a layer, shared experts beside the routed ones
        is_before = word in (ATTENTION, RECURRENT) or (word == MLP and words == [EXPERTS])
        is_before |= word == NORMS and not has_mixers
        start = first + (is_before and word not in words)
        saved[word] = int(saved[word] * _compute_share(spec, word, start))
    if not has_mixers:  # else the norm after the layers stands in for the one before the adapter
        saved[NORMS] += _count_last_norm_bytes(spec, settings)
    return saved


def _list_adapted_words(settings: ActivationSettings) -> list[str]:
    return [word for word in (ATTENTION, RECURRENT, MLP, EXPERTS) if settings.is_adapted(word)]


def _find_first_layer(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the first layer that has an adapter."""
    words = [word for word in _list_adapted_words(settings) if word in spec.parts]
    return min((min(spec.parts[word].layer_values) for word in words), default=0)


def _count_last_norm_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    return spec.hidden_size * _get_norm_bytes(spec, settings)


def _list_part_bytes(spec: ModelSpec, settings: ActivationSettings) -> dict[str, int]:
    """Return part -> the bytes per token that it saves in all layers, with the hidden states that
    its linears read."""
    norm_bytes = _count_norm_inputs(spec, settings) * _get_norm_bytes(spec, settings)
    # DoRA also keeps the outputs of attention and MLP
    dora_values = 2 * spec.num_layers * spec.hidden_size * settings.use_dora
    return {
        NORMS: norm_bytes + dora_values * settings.dtype_bytes,
        ATTENTION: _count_attention_bytes(spec, settings),
        RECURRENT: _count_recurrent_bytes(spec, settings),
        MLP: _count_mlp_values(spec, settings) * settings.dtype_bytes,
        EXPERTS: _count_expert_bytes(spec, settings),
        OTHERS: _count_other_values(spec, settings) * settings.dtype_bytes,
    }


def _compute_share(spec: ModelSpec, word: str, first_layer: int) -> float:
    """Return which share of a part's values the layers from one on have; norms are in all."""
    values = spec.parts[word].layer_values if word in spec.parts else {}
    values = values or dict.fromkeys(range(spec.num_layers), 1)
    selected = sum(value for layer, value in values.items() if layer >= first_layer)
    return selected / max(1, sum(values.values()))


def _count_norm_inputs(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the values per token that the norms of all layers read."""
    num_norms = spec.norms.hidden
    if spec.model_type in PROPORTIONAL_TYPES:
        # MLP, experts and router norm the same hidden states, the router without a weight: each
        # keeps a copy in fp32, or all the same tensor
        num_copies = 1 if settings.dtype_bytes < 4 else -1
        num_norms += num_copies * spec.parts.get(EXPERTS, NO_PART).layers
    if spec.model_type in WEIGHTLESS_NORM_TYPES:
        num_norms += 2 * spec.num_layers
    if spec.model_type in SHARED_INPUT_TYPES:
        num_norms -= spec.num_layers
    inner_values = spec.norms.inner_values
    if spec.model_type in WEIGHTLESS_HEAD_NORM_TYPES:
        attention = spec.parts[ATTENTION]  # whose outputs are q, k and v
        inner_values += (attention.inner_outputs + attention.inner_inputs) // 2
    return num_norms * spec.hidden_size + inner_values


def _get_norm_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    if spec.model_type in CENTERED_NORM_TYPES:
        return 8
    if spec.model_type in REPLACED_NORM_TYPES:
        return settings.norm_bytes or settings.dtype_bytes
    return settings.dtype_bytes if spec.model_type in TORCH_NORM_TYPES else 4


def _count_attention_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the bytes of q, k, v and the output, and of the inputs of the linears."""
    part = spec.parts.get(ATTENTION, NO_PART)
    is_adapted = settings.is_adapted(ATTENTION)
    out = part.inner_inputs
    inputs = part.layers * spec.hidden_size * is_adapted
    values = part.inner_outputs + out  # q, k, v, out
    if spec.model_type in LATENT_ATTENTION_TYPES:
        values = 2 * part.layers * spec.num_heads * spec.head_dim + 2 * out
        inputs += spec.norms.inner_values * is_adapted
    if spec.model_type in PROPORTIONAL_TYPES:  # keys may be values, too
        values = spec.norms.inner_values + out
    if spec.model_type in GATED_ATTENTION_TYPES | INNER_NORM_TYPES:
        inputs += out * is_adapted
    if settings.is_gpu or _has_attention_kernel(spec, settings.dtype_bytes):
        return (inputs + values) * settings.dtype_bytes
    # torch's attention on a CPU, in fp32; what o_proj reads is a copy
    inputs += out * (is_adapted and spec.model_type not in GATED_ATTENTION_TYPES)
    if settings.dtype_bytes == 4 and spec.model_type in FUSED_ATTENTION_TYPES:
        inputs += (part.inner_outputs + out) // 2  # q and k, kept by the view that v is
    gate = out if spec.model_type in GATED_ATTENTION_TYPES else 0
    return (inputs + gate) * settings.dtype_bytes + (values - gate) * 4


def _has_attention_kernel(spec: ModelSpec, dtype_bytes: int) -> bool:
    """Return whether attention.c computes the scores; see has_kernel in model/attention.py."""
    part = spec.parts.get(ATTENTION, NO_PART)
    is_latent = spec.model_type in LATENT_ATTENTION_TYPES
    has_equal_heads = not is_latent or part.inner_inputs == (
        part.layers * spec.num_heads * spec.head_dim
    )
    is_supported = dtype_bytes == 2 and spec.head_dim % 64 == 0 and has_equal_heads
    return is_supported and spec.model_type not in SOFTCAP_TYPES


def _count_recurrent_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the bytes of what model_spec.py counts, and of the inputs of the linears."""
    part = spec.parts.get(RECURRENT, NO_PART)
    if spec.recurrent is None:
        return 0
    values = 0
    if settings.is_adapted(RECURRENT):
        values += part.layers * spec.hidden_size + part.inner_inputs
    if spec.model_type == "falcon_h1":  # has no norm of the output, whose gate is kept activated
        values += part.inner_inputs
    inner_bytes = spec.recurrent.compute_saved_bytes(settings.dtype_bytes)
    return values * settings.dtype_bytes + part.layers * inner_bytes


def _count_mlp_values(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the values of dense MLPs and shared experts, and the hidden states that they read."""
    part = spec.parts.get(MLP, NO_PART)
    is_ours = spec.model_type in REPLACED_MLP_TYPES
    is_recomputed = is_ours and settings.checkpointing == "selective"
    is_adapted = settings.is_adapted(MLP)
    num_inputs = part.layers
    if not is_adapted and not is_recomputed:
        num_inputs = 0
    if spec.model_type in SHARED_NORM_TYPES and settings.is_adapted(ATTENTION):
        num_inputs = 0
    values = num_inputs * spec.hidden_size + part.inner_outputs * (not is_recomputed)
    if not is_ours:
        gates = part.inner_outputs - part.inner_inputs
        activation = part.inner_inputs * ACTIVATION_VALUES.get(spec.model_type, 0)
        values += gates + part.inner_inputs * is_adapted + int(activation)
    return values


def _count_expert_bytes(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the bytes of routed experts and of their routers."""
    part = spec.parts.get(EXPERTS, NO_PART)
    values = 0 if settings.checkpointing == "selective" else part.inner_outputs
    # the hidden states, unless a shared expert keeps them, too
    feed_layers = spec.layer_mixers.count("") or spec.num_layers
    has_shared = spec.parts.get(MLP, NO_PART).layers > feed_layers - part.layers
    is_input_shared = has_shared and settings.is_adapted(MLP)
    is_input_shared |= spec.model_type in SHARED_NORM_TYPES and settings.is_adapted(ATTENTION)
    num_inputs = 0 if is_input_shared else part.layers
    if spec.model_type in GATED_EXPERT_TYPES | PROPORTIONAL_TYPES:
        # the output of the shared expert; the input of experts that have a norm of their own
        num_inputs += part.layers
    router_bytes = (settings.dtype_bytes + 4) * spec.num_experts + 32 * spec.num_experts_per_token
    values += num_inputs * spec.hidden_size
    return values * settings.dtype_bytes + part.layers * router_bytes


def _count_other_values(spec: ModelSpec, settings: ActivationSettings) -> int:
    """Return the values of Gemma 4's embeddings for each layer: gate, embedding, and with adapters
    what their linears read."""
    part = spec.parts.get(OTHERS, NO_PART)
    inputs = part.layers * spec.hidden_size + part.inner_inputs
    return 2 * part.inner_inputs + inputs * settings.is_adapted(OTHERS)


def count_recomputed_values(spec: ModelSpec) -> int:
    """Return the values per token that `gradient_checkpointing: selective` does not save: gate and
    up of our MLPs and of the experts that a token meets."""
    words = [MLP, EXPERTS] if spec.model_type in REPLACED_MLP_TYPES else [EXPERTS]
    return sum(spec.parts.get(word, NO_PART).inner_outputs for word in words)


def compute_temporary_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Return the bytes per token that the widest layer computes with in its backward pass: its
    MLP, or the copies of a token for its experts."""
    experts = spec.parts.get(EXPERTS, NO_PART)
    if not experts.layers:
        return 6 * spec.intermediate_size * dtype_bytes
    copies = spec.num_experts_per_token * 2 * spec.hidden_size
    return (copies + 3 * experts.inner_outputs // experts.layers) * dtype_bytes
