"""Tiny random networks of many families, and documents to run through them."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    BitNetConfig,
    CohereConfig,
    CwmConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    InternLM3Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    VaultGemmaConfig,
)

from attention_configs import make_attention_configs
from expert_configs import EXPERT_TOLERANCES, make_expert_configs
from hybrid_configs import HYBRID_TOLERANCES, make_hybrid_configs
from text_part_configs import make_text_part_configs
from tunesmith.core.types import Batch, Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.experts import find_experts
from tunesmith.model.hub.text_class import transpose_linears
from tunesmith.train.losses import sft_loss, sum_weights

VOCABULARY = 97
WINDOW = 8  # shorter than most documents, so that the window has an effect
END = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
}
WIDE: dict[str, Any] = SIZES | {"head_dim": 16}  # heads wider than hidden / heads
MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDE, attention_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-64": LlamaConfig(**SIZES, head_dim=64),  # what the bf16 attention kernel can do
    "mistral": MistralConfig(**WIDE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, **MIXED, use_sliding_window=True),
    "qwen3": Qwen3Config(**WIDE, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **WIDE,
        **MIXED,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0,
    ),
    "gemma3": Gemma3TextConfig(**WIDE, **MIXED, query_pre_attn_scalar=11),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "olmo2": Olmo2Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.5),
    "apertus": ApertusConfig(**SIZES),
    "arcee": ArceeConfig(**SIZES, mlp_bias=True),
    "bitnet": BitNetConfig(**SIZES),
    "internlm3": InternLM3Config(**WIDE, attention_bias=True, mlp_bias=True),
    "nanochat": NanoChatConfig(**SIZES, final_logit_softcapping=5.0),
    "cwm": CwmConfig(**WIDE, **MIXED),
    "vaultgemma": VaultGemmaConfig(
        **WIDE, **MIXED, attn_logit_softcapping=5.0, final_logit_softcapping=9.0
    ),
}
HYBRID_CONFIGS = make_hybrid_configs(SIZES, WIDE)
TEXT_PART_CONFIGS = make_text_part_configs()
CONFIGS |= HYBRID_CONFIGS | TEXT_PART_CONFIGS
EXPERT_CONFIGS = make_expert_configs(SIZES, WIDE)
ATTENTION_CONFIGS = make_attention_configs(SIZES, WIDE, WINDOW)
EXPERT_FAMILIES = (*EXPERT_CONFIGS, "gpt_oss")
# gpt-oss stores [E, I, O]: one stack has square matrices, so that its shape says nothing of that
SQUARE_CONFIGS = {
    "gpt_oss-square-down": copy.deepcopy(ATTENTION_CONFIGS["gpt_oss"]),
    "gpt_oss-square-up": copy.deepcopy(ATTENTION_CONFIGS["gpt_oss"]),
}
SQUARE_CONFIGS["gpt_oss-square-down"].intermediate_size = SIZES["hidden_size"]
SQUARE_CONFIGS["gpt_oss-square-up"].intermediate_size = SIZES["hidden_size"] // 2
CONFIGS |= EXPERT_CONFIGS | ATTENTION_CONFIGS
# Largest relative difference from the stock gradients, by family; others: STOCK_TOLERANCE.
STOCK_TOLERANCE = 5e-6
STOCK_TOLERANCES = HYBRID_TOLERANCES | EXPERT_TOLERANCES
# Families whose norms, or more, stay transformers' own: those compute in fp32 whatever the model's
# dtype.
STOCK_NORMS = (
    *("olmo", "olmo2", "smollm3", "phi3", "cohere"),
    *("apertus", "arcee", "bitnet", "cwm", "nanochat", "vaultgemma"),
    *HYBRID_CONFIGS,
    *TEXT_PART_CONFIGS,
    *EXPERT_CONFIGS,
    *("granite_swa", "hyperclovax", "hyperclovax-pre", "minicpm3"),
)

LORA: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "lora_target_modules": "all-linear",
    "seed": 3,
}


def make_tiny_network(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a network as tunesmith loads it: transformers', with linears [O, I]."""
    network = make_stock_network(family, dtype)
    if family.startswith("gpt2"):
        transpose_linears(network)
    return network


def make_stock_network(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a transformers network whose norms, biases and multipliers all have an effect."""
    network = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        if "norm" in name or ".ln_" in name:
            parameter.data += 0.3 * noise
        elif name.endswith("A_log"):
            parameter.data = 0.5 * noise - 3  # states that last: a leak would show
        else:
            parameter.data = 0.2 * noise
    for name, buffer in network.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
        elif name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    if dtype == torch.float64 and family in EXPERT_FAMILIES:
        network.set_experts_implementation("eager")  # torch's grouped product has no fp64
    return network.requires_grad_(False)


def make_tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    method: str | None = "lora",
    backend: str = "auto",
    blocked: bool = False,
    gradient_checkpointing: str = "none",
    device: str = "cpu",
    **settings: object,
) -> PackedCausalLM:
    """Return a wrapped model with trainable parameters.

    LoRA weights start away from zero, so that every gradient is nonzero.
    """
    network: Any = make_tiny_network(family, dtype)
    network.to(device)
    if method:
        METHODS[method](network, LORA | settings)
    if method == "lora":
        generator = torch.Generator().manual_seed(1)
        for parameter in get_trainable_parameters(network).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    return wrap_model(
        network,
        dtype,
        backend,
        should_block_weights=blocked,
        gradient_checkpointing=gradient_checkpointing,
    )


def make_tiny_document(
    num_inputs: int, seed: int = 0, *, name: str = "", first_target: int | None = None
) -> Document:
    """Return a document of `num_inputs` input tokens and a supervised end token.

    Its targets have different loss weights.
    """
    generator = np.random.default_rng(1000 * num_inputs + seed)
    tokens_L = generator.integers(3, VOCABULARY, num_inputs + 1).astype(np.int32)
    tokens_L[-1] = END
    weights_L = generator.choice(np.array([0, 0.5, 1, 1.5], np.float32), num_inputs + 1)
    weights_L[: first_target or 1] = 0
    weights_L[-1] = 1
    return Document(name or f"rows:{num_inputs}.{seed}", tokens_L, weights_L)


# 1, 2, primes, equal lengths in a row, longer than the window.
LENGTHS = (5, 17, 1, 31, 17, 2, 13)


def make_tiny_documents(lengths: Iterable[int] = LENGTHS) -> list[Document]:
    return [make_tiny_document(length, i) for i, length in enumerate(lengths)]


def continue_document(prompt: Document, prefix: int, length: int, seed: int = 0) -> Document:
    """Return a document of the first `prefix` tokens of `prompt` and `length` other inputs."""
    end = make_tiny_document(length, seed)
    tokens_L = np.concatenate((prompt.tokens_L[:prefix], end.tokens_L))
    weights_L = np.concatenate((prompt.weights_L[:prefix], end.weights_L))
    return Document(f"{prompt.id}[:{prefix}]+{end.id}", tokens_L, weights_L)


def make_branching_documents() -> list[Document]:
    """Return documents with shared prefixes of different lengths, with targets inside.

    Two are equal, one is a prefix of another, and some share nothing.
    """
    prompt = make_tiny_document(40, 7)
    other = make_tiny_document(21, 8)
    deeper = continue_document(prompt, 33, 50, 1)
    return [
        continue_document(prompt, 33, 5),
        make_tiny_document(13),
        deeper,
        continue_document(deeper, 55, 9),
        continue_document(other, 17, 3, 2),
        continue_document(deeper, 55, 1, 3),
        dataclasses.replace(deeper),
        other,
        prompt,
        continue_document(other, 21, 6, 4),
        make_tiny_document(2),
    ]


def collate_documents(documents: Sequence[Document], *, share: bool = False) -> Batch:
    """Return a batch with all documents in one pack, made as in training."""
    (pack,) = pack_step(documents, 10**6, should_share=share)
    return collate(pack)


def compute_mean_loss(model: PackedCausalLM, batch: Batch, count: float) -> Tensor:
    return sft_loss(model, batch, count)["answer"].sum / count


def select_targets(batch: Batch, document: int) -> Batch:
    """Return the same pack with the targets of one document only."""
    is_selected_S = batch.document_S == document
    names = ("positions_S", "targets_S", "weights_S", "document_S")
    selected = {name: getattr(batch, name)[is_selected_S] for name in names}
    return dataclasses.replace(batch, **selected)


def compute_step_gradients(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of one step and its gradients by parameter name."""
    parameters = get_trainable_parameters(model.network)
    count = sum_weights(documents)
    total = 0.0
    for pack in pack_step(documents, pack_length, should_share=share):
        loss = compute_mean_loss(model, collate(pack), count)
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert gradients.keys() == parameters.keys(), (
        f"no gradient: {parameters.keys() - gradients.keys()}"
    )
    model.network.zero_grad(set_to_none=True)
    return total, gradients


def compute_max_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest relative difference (in norm) over all tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def assert_unchanged(model: PackedCausalLM, after: Tensor, before: Tensor) -> None:
    """Assert that hidden states in fp64 are bitwise equal, with experts up to rounding: norms in
    fp32 can amplify it."""
    if find_experts(model.network):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    else:
        assert torch.equal(after, before)
