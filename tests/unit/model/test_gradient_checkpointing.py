"""Gradient checkpointing: every policy gives bitwise the same gradients with less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import (
    collate_documents,
    compute_mean_loss,
    compute_step_gradients,
    make_branching_documents,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.model.causal_lm import PackedCausalLM

POLICIES = ("selective", "full")
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "backend": "cpu_kernel", "blocked": True}


def gradients(model: PackedCausalLM, *, share: bool = False) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(7)  # dropout's
    model.network.train()
    return compute_step_gradients(
        model, make_branching_documents() if share else make_tiny_documents(), 10**6, share=share
    )


@pytest.mark.parametrize("gradient_checkpointing", POLICIES)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama-tied", {"method": "full"}),
        ("llama-64", BF16),
        ("gemma2", {"lora_dropout": 0.3}),
        ("qwen3", {"use_dora": True, "lora_dropout": 0.3}),
        ("phi3", {}),
        ("olmo2", {"method": "full"}),
    ],
)
def test_gradients_are_the_same_to_the_bit(
    gradient_checkpointing: str, family: str, settings: dict[str, Any]
) -> None:
    loss, expected = gradients(make_tiny_model(family, **settings))
    again, grads = gradients(
        make_tiny_model(family, **settings, gradient_checkpointing=gradient_checkpointing)
    )
    assert again == loss
    assert {name for name in expected if not torch.equal(grads[name], expected[name])} == set()


@pytest.mark.parametrize("gradient_checkpointing", POLICIES)
def test_shared_prefixes_work_when_layers_run_again(gradient_checkpointing: str) -> None:
    loss, expected = gradients(make_tiny_model(), share=True)
    again, grads = gradients(
        make_tiny_model(gradient_checkpointing=gradient_checkpointing), share=True
    )
    assert again == loss
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def saved_bytes(gradient_checkpointing: str) -> int:
    """Return the bytes that autograd saves in a forward; a recomputed layer saves nothing
    inside."""
    model, saved = make_tiny_model(gradient_checkpointing=gradient_checkpointing), {}
    model.network.train()

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_mean_loss(model, collate_documents(make_tiny_documents()), 1.0)
    return sum(saved.values())


def test_each_policy_keeps_less() -> None:
    keep, selective, recompute = (saved_bytes(policy) for policy in ("none", *POLICIES))
    tokens, width, layers = collate_documents(make_tiny_documents()).layout.num_tokens, 80 * 4, 2
    pruned = int(
        collate_documents(make_tiny_documents()).positions_S.shape[0]
    )  # rows of the last layer's MLP
    assert keep - selective >= 2 * width * (tokens * (layers - 1) + pruned)
    assert recompute < 0.75 * keep
