"""Compare every family of the tests with transformers, and write docs/results/families.md.

    python -m benchmarks.train.families [FAMILY ...]

The tiny random models and documents are those of tests/helpers/tiny_models.py, fp64 where
transformers allows it. Each family is measured as the tests do it: gradients of all weights against
the stock model, document by document; an adapter's gradients in one pack against one document at a
time; generation, token by token from its cache, against one stock forward. With names, the table
has those families only and is printed.
"""

from __future__ import annotations

import copy
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "helpers"))

import tiny_models  # noqa: E402
from tunesmith.core.types import Document  # noqa: E402
from tunesmith.model.causal_lm import compute_stock_logits, wrap_model  # noqa: E402
from tunesmith.model.paged_cache import PagedKVCache, count_blocks  # noqa: E402
from tunesmith.train.losses import sum_weights  # noqa: E402

PAGE = ROOT / "docs" / "results" / "families.md"
# longer and shorter than a chunk of the scan, equal lengths in a row
LENGTHS = (70, 31, 1, 65, 17, 17)
PROMPT_TOKENS = 70
NEW_TOKENS = 12
HEADER = """\
# Families against transformers

Every family of the tests as a tiny random model, measured on {day} with transformers {version} and
torch {torch} on a CPU (`python -m benchmarks.train.families`). Largest relative differences:

- **gradients**: of all weights against the stock model, which gets one document at a time; with
  experts, which are never trained in full, of the embeddings, through all layers;
- **packed**: an adapter's gradients with {count} documents of {shortest} to {longest} tokens in one
  pack, against one document at a time;
- **generation**: logits of {new} tokens after a prompt of {prompt}, one by one from the cache,
  against one forward of the stock model, in fp32.

Gradients are computed in fp64, but transformers computes many norms and all recurrences in fp32:
the differences of those families are its rounding.

The tests bound the gradients by 1e-4 (Gated DeltaNet), 1e-5 (Mamba2) and 5e-6 (others), with
recurrent layers also on documents of 130, 70, 64, 65, 3, 128 and 1 tokens; by 1e-10 where the stock
network is given norms in fp64 and its mixers compute in it. Packed equals alone within 1e-6. Token
by token equals one forward: each token of recurrent layers within 1e-7 in fp64 and 1.5e-5 in fp32
(measured: 4e-8 and 1.0e-5), all tokens together within 1e-5 in fp32.

| type | family of the tests | gradients | packed | generation |
|---|---|---|---|---|
"""


class FamilyErrors(NamedTuple):
    """Largest relative differences."""

    gradients: float
    packed: float
    generation: float


def main(families: list[str]) -> None:
    torch.set_num_threads(1)
    lines: list[str] = []
    for family in families or tiny_models.CONFIGS:
        errors = measure_family(family)
        numbers = " | ".join(f"{error:.0e}" for error in errors)
        lines.append(f"| {tiny_models.CONFIGS[family].model_type} | {family} | {numbers} |")
        print(lines[-1], flush=True)
    if not families:
        header = HEADER.format(
            day=date.today().isoformat(),
            version=transformers.__version__,
            torch=torch.__version__,
            count=len(LENGTHS),
            shortest=min(LENGTHS),
            longest=max(LENGTHS),
            new=NEW_TOKENS,
            prompt=PROMPT_TOKENS,
        )
        PAGE.write_text(header + "\n".join(sorted(lines)) + "\n")


def measure_family(family: str) -> FamilyErrors:
    documents = tiny_models.make_tiny_documents(LENGTHS)
    model = tiny_models.make_tiny_model(family, torch.float64)
    _, packed = tiny_models.compute_step_gradients(model, documents, 10**6)
    _, alone = tiny_models.compute_step_gradients(model, documents, 1)
    return FamilyErrors(
        gradients=measure_gradients(family, documents),
        packed=tiny_models.compute_max_difference(packed, alone),
        generation=measure_generation(family),
    )


def measure_gradients(family: str, documents: list[Document]) -> float:
    """Return the difference of the gradients of all weights, or of the embeddings alone if there
    are experts."""
    network = tiny_models.make_tiny_network(family, torch.float64)
    has_experts = any(name.endswith("experts") for name, _ in network.named_modules())
    if has_experts:
        network.get_input_embeddings().requires_grad_(True)
        model = wrap_model(copy.deepcopy(network), torch.float64)
    else:
        network.requires_grad_(True)
        model = tiny_models.make_tiny_model(family, torch.float64, method="full")
    _, ours = tiny_models.compute_step_gradients(model, documents, 10**6)
    stock = compute_stock_gradients(network, documents)
    return tiny_models.compute_max_difference(ours, stock)


def compute_stock_gradients(
    network: PreTrainedModel, documents: list[Document]
) -> dict[str, torch.Tensor]:
    """Return the gradients of transformers, one document at a time."""
    count = sum_weights(documents)
    for document in documents:
        tokens_L = torch.from_numpy(document.tokens_L).long()
        weights_L = torch.from_numpy(document.weights_L)
        logits = network(input_ids=tokens_L[None, :-1], use_cache=False).logits[0].double()
        losses = F.cross_entropy(logits, tokens_L[1:], reduction="none")
        ((losses * weights_L[1:].double()).sum() / count).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@torch.no_grad()
def measure_generation(family: str) -> float:
    """Return the difference of the logits of new tokens, fed one by one."""
    length = PROMPT_TOKENS + NEW_TOKENS
    tokens = tiny_models.make_tiny_document(length).tokens_L[:length].tolist()
    network = tiny_models.make_tiny_network(family)
    positions = range(PROMPT_TOKENS - 1, length)
    expected = compute_stock_logits(network, tokens, list(positions))
    model = wrap_model(network, torch.float32)
    cache = PagedKVCache(slots=1, num_blocks=count_blocks(length))
    row = cache.add_row()
    hidden = [model.prefill([row], [tokens[:PROMPT_TOKENS]], cache)]
    hidden += [model.decode_step([row], [token], cache) for token in tokens[PROMPT_TOKENS:]]
    logits = model.head.compute_logits(torch.cat(hidden))
    return float((logits - expected).norm() / expected.norm())


if __name__ == "__main__":
    main(sys.argv[1:])
