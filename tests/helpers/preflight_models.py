"""Tiny models as they are before the first step, with the samples that preflight compares."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from tiny_models import (
    END,
    make_branching_documents,
    make_tiny_documents,
    make_tiny_network,
)
from tunesmith.core.errors import GateError
from tunesmith.core.types import Document
from tunesmith.data.packing import count_input_tokens
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import (
    PackedCausalLM,
    compute_stock_logits,
    get_sliding_window,
    wrap_model,
)
from tunesmith.model.compare_layers import StockNetwork
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    TokenIdCheck,
    choose_documents,
    choose_positions,
    choose_sharing_documents,
    compute_oracle_logits,
)
from tunesmith.train.preflight import run_preflight

ADAPTER = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "lora_target_modules": "all-linear",
    "seed": 0,
}


def prepare_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    candidates: Sequence[Document] | None = None,
    method: str = "lora",
) -> tuple[PackedCausalLM, PreflightSamples]:
    """A model as it is before its first step, and what the stock one said."""
    return prepare_network(make_tiny_network(family, dtype), candidates, method)


def prepare_network(
    network: PreTrainedModel,
    candidates: Sequence[Document] | None = None,
    method: str = "lora",
) -> tuple[PackedCausalLM, PreflightSamples]:
    """The same of a network, which is changed."""
    dtype = network.dtype
    documents = choose_documents(
        candidates or make_tiny_documents((20, 9, 33, 14)), get_sliding_window(network)
    )
    stock = tuple(
        compute_stock_logits(
            network, d.tokens_L[: count_input_tokens(d)].tolist(), choose_positions(d)
        )
        for d in documents
    )
    oracle = compute_oracle_logits(network, documents)
    stock_network = StockNetwork(network)
    METHODS[method](network, ADAPTER)
    return wrap_model(network, dtype), PreflightSamples(
        documents,
        stock,
        frozenset({END}),
        (TokenIdCheck("rows:1", True),),
        folder_end_ids=frozenset({END}),
        oracle=oracle,
        stock=stock_network,
    )


def prepare_sharing_model(
    family: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[PackedCausalLM, PreflightSamples]:
    """Ready, with documents of which two begin alike and one continues another's beginning."""
    model, samples = prepare_model(family, dtype)
    alike = choose_sharing_documents(make_branching_documents())
    assert len(alike) == 3
    return model, dataclasses.replace(samples, sharing_documents=alike)


def get_refusal(model: PackedCausalLM, samples: PreflightSamples) -> str:
    with pytest.raises(GateError) as caught:
        run_preflight(model, samples)
    assert caught.value.where.startswith("preflight")
    assert caught.value.exit_code == 4
    return caught.value.message
