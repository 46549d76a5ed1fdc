"""Another default dtype of the process changes nothing: C gets buffers of the types it writes."""

from collections.abc import Iterator

import pytest
import torch

from tiny_models import (
    LORA,
    collate_documents,
    compute_step_gradients,
    make_branching_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.types import GenerationRequest
from tunesmith.model.adapters import METHODS
from tunesmith.model.generation.engine import generate
from tunesmith.model.kernels import ops


@pytest.fixture
def _float64_is_default() -> Iterator[None]:
    """Restore float32 after the test."""
    yield
    torch.set_default_dtype(torch.float32)


def compute_all(
    family: str, dtype: torch.dtype, *, has_dora: bool, default: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the loss, gradients and initial weights, the hidden states, and generated tokens."""
    torch.set_default_dtype(torch.float32)
    model = make_tiny_model(family, dtype, use_dora=has_dora)
    network = make_tiny_network(family, dtype)
    torch.set_default_dtype(default)
    METHODS["lora"](network, LORA | {"use_dora": has_dora})
    documents = make_branching_documents()
    results = {f"initial {name}": p.detach() for name, p in network.named_parameters()}
    for share in (False, True):
        loss, gradients = compute_step_gradients(model, documents, 200, share=share)
        results |= {f"{share} {name}": gradient for name, gradient in gradients.items()}
        results[f"loss {share}"] = torch.tensor(loss, dtype=torch.float64)
    with torch.no_grad():
        results["hidden"] = model.compute_hidden(collate_documents(documents))
    logits = torch.arange(12, dtype=dtype).view(3, 4)
    targets = torch.tensor([0, 1, 2])
    for index, values in enumerate(ops.kl_divergence(logits, logits * 0.5, targets, 1.0, 0.0)):
        results[f"kl {index}"] = values
    requests = [GenerationRequest(tuple(d.tokens_L[:9].tolist()), 6) for d in documents]
    for index, output in generate(model, requests, decode=str, end_ids=()):
        results[f"answer {index}"] = torch.tensor(output.tokens)
    return results


@pytest.mark.usefixtures("_float64_is_default")
@pytest.mark.parametrize("has_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float64_as_default_changes_no_bit(dtype: torch.dtype, has_dora: bool) -> None:
    plain = compute_all("llama-64", dtype, has_dora=has_dora, default=torch.float32)
    other = compute_all("llama-64", dtype, has_dora=has_dora, default=torch.float64)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        assert other[name].dtype == value.dtype, name
        assert torch.equal(other[name], value), name
