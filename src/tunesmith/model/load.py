"""A transformers causal language model, loaded safely and run our way.

In: a model folder that source.resolve has checked. Out: LanguageModel, whose `hidden` runs a packed Batch and whose
`forward_cached` runs generation over a cache. The stock network is the oracle: take `stock_logits` before `adopt`.
Left out: adapters (adapters.py), the loss (head.py).
Legend: T tokens, S targets, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from tunesmith.model.attention import stock_attention
from tunesmith.model.head import Head
from tunesmith.model.layers import Embedding, replace_layers
from tunesmith.types import Batch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
PACKED = "tunesmith"  # the name of our attention; it has no mask function, so transformers builds no mask for it

AttentionInterface.register(PACKED, stock_attention)


def load_network(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The stock network with weights in `dtype`, evaluation mode, nothing trainable, remote code refused."""
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def stock_logits(network: PreTrainedModel, documents: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [L, V] in fp32 of each document alone, as transformers computes them."""
    device = network.device
    return [
        network(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False).logits[0].float()
        for tokens in documents
    ]


def head_of(network: PreTrainedModel) -> Head:
    config, output = network.config, network.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(output.weight, output.bias, float(scale), float(getattr(config, "final_logit_softcapping", None) or 0))


class LanguageModel:
    """The network after `adopt`: its decoder takes a Layout, its head is called where it is needed.

    Two ways to run: packed (training, likelihoods) and cached (generation). Attention is switched between them here
    and nowhere else.
    """

    def __init__(self, network: PreTrainedModel, dtype: torch.dtype, backend: str = "auto") -> None:
        self.network, self.dtype, self.backend = network, dtype, backend
        self.decoder: nn.Module = network.base_model
        self.stock_implementation: str = network.config._attn_implementation
        parameters = inspect.signature(type(self.decoder).forward).parameters
        self.cache_keyword = "cache" if "cache" in parameters else "past_key_values"

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def head(self) -> Head:
        return head_of(self.network)

    def _attention(self, implementation: str) -> None:
        if self.network.config._attn_implementation != implementation:
            self.network.set_attn_implementation(implementation)

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [S, H] of the positions that predict a target."""
        self._attention(PACKED)
        out = self.decoder(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            layout=batch.layout,
            backend=self.backend,
        )
        return out.last_hidden_state[0].index_select(0, batch.positions_S)

    def forward_cached(self, tokens_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor, cache: Any) -> Tensor:
        """Hidden states [B, L, H] of new tokens; `cache` (a transformers Cache) grows by them."""
        self._attention(self.stock_implementation)
        out = self.decoder(
            input_ids=tokens_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            use_cache=True,
            **{self.cache_keyword: cache},
        )
        return out.last_hidden_state


def adopt(network: PreTrainedModel, dtype: torch.dtype, backend: str = "auto") -> LanguageModel:
    """Replaces the modules that we do better and hands the network over. Weights are shared, none is copied."""
    network.set_input_embeddings(Embedding(network.get_input_embeddings(), dtype))
    replace_layers(network)
    return LanguageModel(network, dtype, backend)
