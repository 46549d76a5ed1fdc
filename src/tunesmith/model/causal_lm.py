"""A transformers causal language model, loaded safely and run our way.

In: a model folder that source.resolve has checked. Out: LanguageModel, whose `hidden` runs a packed Batch and whose
`prefill` and `extend` run generation over a RowCache. The stock network is the oracle: take `stock_logits` before
`adopt`.
Left out: adapters (adapters.py), the loss (head.py).
Legend: T tokens, S targets, H hidden, V vocabulary.
"""

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
from tunesmith.core.types import Batch, Json, Layout
from tunesmith.model.adapters import lora_layers
from tunesmith.model.attention import stock_attention
from tunesmith.model.frozen_weight import Blocked, blocks_here
from tunesmith.model.hub.check_weights import check_fit, its_errors
from tunesmith.model.kv_cache import RowCache
from tunesmith.model.layers import Embedding, keep_less, prune_last, replace_layers
from tunesmith.model.lm_head import Head
from tunesmith.model.malloc import keep_little
from tunesmith.model.new_embeddings import rows_of
from tunesmith.model.safetensors_io import first_not_finite

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
Network = PreTrainedModel  # what other packages call it, since only this one knows transformers
PACKED = "tunesmith"  # the name of our attention; it has no mask function, so transformers builds no mask for it

AttentionInterface.register(PACKED, stock_attention)
keep_little()


def load_network(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The stock network with weights in `dtype`, evaluation mode, nothing trainable, remote code refused. Raises
    InputError for weights that are not those of the config, and for values that are not finite."""
    check_fit(folder)
    disable_progress_bar()  # what stands on stderr is the command line's to say, and loading takes a moment
    with its_errors(folder):
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    if name := first_not_finite(dict(network.named_parameters())):
        raise InputError(f"the tensor {name} holds values that are not finite", where=str(folder))
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def stock_logits(network: PreTrainedModel, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
    """Logits [len(places), V] in fp32 of one document alone, as transformers computes them."""
    ids, kept = torch.tensor([list(tokens)]), torch.tensor(list(places))
    out = network(input_ids=ids.to(network.device), use_cache=False, logits_to_keep=kept.to(network.device))
    return out.logits[0].float()


def stock_ids(
    folder: Path,
    messages: Sequence[Json],
    tools: Sequence[Json],
    template: str | None,
    variables: Json,
    added: tuple[str, ...] = (),
    *,
    prompt: bool = False,
) -> list[int]:
    """Ids of a conversation from transformers' own tokenizer and chat template, with tokens `added` by it. `prompt`:
    with the start of an answer behind it."""
    encoded = _tokenizer(folder, added).apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=True,
        **variables,
    )
    return list(encoded["input_ids"])


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, added: tuple[str, ...]):
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    return tokenizer


def shortest_window(network: PreTrainedModel) -> int | None:
    """Tokens that the model's windowed layers look back, None if all look back to the start."""
    config = network.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None


def head_of(network: PreTrainedModel) -> Head:
    config, output = network.config, network.get_output_embeddings()
    assert output is not None, "a causal language model has a head"
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    new = rows_of(output)
    if new is not None:
        new.put(output.weight)
    cap = float(getattr(config, "final_logit_softcapping", None) or 0)
    return Head(output.weight, output.bias, float(scale), cap, new)


class LanguageModel:
    """The network after `adopt`: its decoder takes a Layout, its head is called where it is needed.

    Training, likelihoods and generation run the same packed forward; generation adds a RowCache.
    """

    def __init__(self, network: PreTrainedModel, dtype: torch.dtype, backend: str = "auto") -> None:
        self.network, self.dtype, self.backend = network, dtype, backend
        self.decoder: Any = network.base_model
        network.set_attn_implementation(PACKED)
        self.pruned = prune_last(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def head(self) -> Head:
        return head_of(self.network)

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

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [S, H] of the positions that predict a target."""
        kept, again = batch.positions_S, None
        if batch.layout.parents:  # what ends a shared part predicts several targets: it is computed once
            kept, again = batch.positions_S.unique(return_inverse=True)
        hidden = self._run(batch.tokens_T, batch.positions_T, batch.layout, kept=kept)
        return hidden if again is None else hidden.index_select(0, again)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], rows: RowCache) -> Tensor:
        """Puts prompts as new rows into the cache, packed; hidden states [B, H] of the last token of each. Each prompt
        starts with the cache's shared tokens, and goes on."""
        new = [prompt[rows.shared :] for prompt in prompts]
        lengths = [len(tokens) for tokens in new]
        ends = list(itertools.accumulate(lengths))
        rows.admit(lengths)
        tokens_T = torch.tensor([token for tokens in new for token in tokens], device=self.device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).add_(rows.shared).to(self.device)
        layout = Layout(tuple(end - length for end, length in zip(ends, lengths, strict=True)), tuple(lengths))
        last_B = torch.tensor(ends, device=self.device) - 1
        return self._run(tokens_T, positions_T, layout, rows, kept=last_B)

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], rows: RowCache) -> Tensor:
        """One more token for every row of the cache; hidden states [B, H]."""
        positions_B = rows.advance(self.device)
        layout = Layout(tuple(range(len(tokens))), (1,) * len(tokens))
        return self._run(torch.tensor(tokens, device=self.device), positions_B, layout, rows)

    def _run(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        rows: RowCache | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, H], or [len(kept), H] of those positions."""
        out = self.decoder(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            layout=layout,
            backend=self.backend,
            rows=rows,
            kept=kept,
        )
        hidden = out.last_hidden_state[0]
        return hidden if kept is None or self.pruned else hidden.index_select(0, kept)


def adopt(
    network: PreTrainedModel,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    blocked: bool = False,
    activations: str = "keep",
) -> LanguageModel:
    """Replaces the modules that we do better and hands the network over. Weights are shared, none is copied; `blocked`
    keeps those beside adapters in oneDNN's layouts, where that is possible. `activations`: see `keep_less`."""
    if blocked and dtype == torch.bfloat16 and network.device.type == "cpu" and blocks_here():
        _block(network)
    network.set_input_embeddings(Embedding(network.get_input_embeddings(), dtype))
    replace_layers(network)
    model = LanguageModel(network, dtype, backend)
    keep_less(list(model.decoder.layers), activations)
    return model


def _block(network: PreTrainedModel) -> None:
    """What stays as it is moves to memory of its own: the weights' file is mapped as a whole, and its pages count as
    ours until nothing refers to them."""
    for layer in lora_layers(network).values():
        layer.frozen = Blocked(layer.frozen.weight)
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.clone()
