"""A transformers causal language model, loaded safely and run our way.

In: a model folder that source.resolve has checked. Out: LanguageModel, whose `hidden` runs a packed
Batch and whose `prefill` and `extend` run generation over a RowCache. The stock network is the
oracle: take `stock_logits` before `adopt`. Left out: adapters (adapters.py), the loss (head.py).
Legend: T tokens, S targets, H hidden, V vocabulary."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tunesmith.core.errors import InputError
from tunesmith.core.types import Batch, Json, PackLayout
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.attention import packed_attention_forward
from tunesmith.model.frozen_weight import BlockedWeight, has_onednn_bf16
from tunesmith.model.hub.check_weights import check_weight_shapes, transformers_errors
from tunesmith.model.kv_cache import RaggedKVCache
from tunesmith.model.layers import (
    Embedding,
    apply_gradient_checkpointing,
    prune_last_layer,
    replace_layers,
)
from tunesmith.model.lm_head import LMHead
from tunesmith.model.malloc import limit_onednn_cache
from tunesmith.model.new_embeddings import get_new_rows
from tunesmith.model.safetensors_io import find_nonfinite

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
Network = PreTrainedModel  # what other packages call it, since only this one knows transformers
# the name of our attention; it has no mask function, so transformers builds no mask for it
ATTENTION_NAME = "tunesmith"

AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
limit_onednn_cache()


def load_network(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The stock network with weights in `dtype`, evaluation mode, nothing trainable, remote code
    refused. Raises InputError for weights that are not those of the config, and for values that are
    not finite."""
    check_weight_shapes(folder)
    # what stands on stderr is the command line's to say, and loading takes a moment
    disable_progress_bar()
    with transformers_errors(folder):
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    if name := find_nonfinite(dict(network.named_parameters())):
        raise InputError(f"the tensor {name} holds values that are not finite", where=str(folder))
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def compute_stock_logits(
    network: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Logits [len(places), V] in fp32 of one document alone, as transformers computes them."""
    ids, positions_to_keep = torch.tensor([list(tokens)]), torch.tensor(list(positions))
    out = network(
        input_ids=ids.to(network.device),
        use_cache=False,
        logits_to_keep=positions_to_keep.to(network.device),
    )
    return out.logits[0].float()


def encode_stock_conversation(
    folder: Path,
    messages: Sequence[Json],
    tools: Sequence[Json],
    template: str | None,
    variables: Json,
    added_tokens: tuple[str, ...] = (),
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Ids of a conversation from transformers' own tokenizer and chat template, with tokens `added`
    by it. `prompt`: with the start of an answer behind it."""
    encoded = _load_tokenizer(folder, added_tokens).apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        **variables,
    )
    return list(encoded["input_ids"])


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, added_tokens: tuple[str, ...]):
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text in added_tokens]
    )
    return tokenizer


def get_sliding_window(network: PreTrainedModel) -> int | None:
    """Tokens that the model's windowed layers look back, None if all look back to the start."""
    config = network.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None
    )


def get_lm_head(network: PreTrainedModel) -> LMHead:
    config, output = network.config, network.get_output_embeddings()
    assert output is not None, "a causal language model has a head"
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    new_rows = get_new_rows(output)
    if new_rows is not None:
        new_rows.write_into(output.weight)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
    return LMHead(output.weight, output.bias, float(scale), softcap, new_rows)


class PackedCausalLM:
    """The network after `adopt`: its decoder takes a Layout, its head is called where it is needed.

    Training, likelihoods and generation run the same packed forward; generation adds a RowCache.
    """

    def __init__(self, network: PreTrainedModel, dtype: torch.dtype, backend: str = "auto") -> None:
        self.network, self.dtype, self.backend = network, dtype, backend
        self.decoder: Any = network.base_model
        network.set_attn_implementation(ATTENTION_NAME)
        self.is_pruned = prune_last_layer(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def head(self) -> LMHead:
        return get_lm_head(self.network)

    @property
    def context_length(self) -> int:
        return self.network.config.get_text_config().max_position_embeddings

    @property
    def cache_bytes_per_token(self) -> int:
        """What generation keeps of a token: keys and values of every layer."""
        config = self.network.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * size * self.dtype.itemsize

    def compute_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [S, H] of the positions that predict a target."""
        positions_S, inverse = batch.positions_S, None
        if (
            batch.layout.parents
        ):  # what ends a shared part predicts several targets: it is computed once
            positions_S, inverse = batch.positions_S.unique(return_inverse=True)
        hidden = self._run_decoder(
            batch.tokens_T, batch.positions_T, batch.layout, positions_to_keep=positions_S
        )
        return hidden if inverse is None else hidden.index_select(0, inverse)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], kv_cache: RaggedKVCache) -> Tensor:
        """Puts prompts as new rows into the cache, packed; hidden states [B, H] of the last token
        of each. Each prompt starts with the cache's shared tokens, and goes on."""
        new_tokens = [prompt[kv_cache.prefix_length :] for prompt in prompts]
        lengths = [len(tokens) for tokens in new_tokens]
        ends = list(itertools.accumulate(lengths))
        kv_cache.begin_prefill(lengths)
        tokens_T = torch.tensor(
            [token for tokens in new_tokens for token in tokens], device=self.device
        )
        positions_T = (
            torch.cat([torch.arange(length) for length in lengths])
            .add_(kv_cache.prefix_length)
            .to(self.device)
        )
        layout = PackLayout(
            tuple(end - length for end, length in zip(ends, lengths, strict=True)), tuple(lengths)
        )
        last_B = torch.tensor(ends, device=self.device) - 1
        return self._run_decoder(tokens_T, positions_T, layout, kv_cache, positions_to_keep=last_B)

    @torch.no_grad()
    def decode_step(self, tokens: Sequence[int], kv_cache: RaggedKVCache) -> Tensor:
        """One more token for every row of the cache; hidden states [B, H]."""
        positions_B = kv_cache.begin_decode(self.device)
        layout = PackLayout(tuple(range(len(tokens))), (1,) * len(tokens))
        return self._run_decoder(
            torch.tensor(tokens, device=self.device), positions_B, layout, kv_cache
        )

    def _run_decoder(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: PackLayout,
        kv_cache: RaggedKVCache | None = None,
        positions_to_keep: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, H], or [len(kept), H] of those positions."""
        out = self.decoder(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            layout=layout,
            backend=self.backend,
            kv_cache=kv_cache,
            positions_to_keep=positions_to_keep,
        )
        hidden = out.last_hidden_state[0]
        return (
            hidden
            if positions_to_keep is None or self.is_pruned
            else hidden.index_select(0, positions_to_keep)
        )


def wrap_model(
    network: PreTrainedModel,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    should_block_weights: bool = False,
    activations: str = "keep",
) -> PackedCausalLM:
    """Replaces the modules that we do better and hands the network over. Weights are shared, none
    is copied; `blocked` keeps those beside adapters in oneDNN's layouts, where that is possible.
    `activations`: see `keep_less`."""
    if (
        should_block_weights
        and dtype == torch.bfloat16
        and network.device.type == "cpu"
        and has_onednn_bf16()
    ):
        _block_weights(network)
    network.set_input_embeddings(Embedding(network.get_input_embeddings(), dtype))
    replace_layers(network)
    model = PackedCausalLM(network, dtype, backend)
    apply_gradient_checkpointing(list(model.decoder.layers), activations)
    return model


def _block_weights(network: PreTrainedModel) -> None:
    """What stays as it is moves to memory of its own: the weights' file is mapped as a whole, and
    its pages count as ours until nothing refers to them."""
    for layer in find_lora_layers(network).values():
        layer.frozen = BlockedWeight(layer.frozen.weight)
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.clone()
