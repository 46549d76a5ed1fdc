"""A transformers causal language model, loaded safely and run on packs.

In: a model folder that `hub/resolve.py` has checked. Out: PackedCausalLM, whose `compute_hidden`
runs a packed Batch and whose `prefill` and `decode_step` run generation over a PagedKVCache. The
stock network is the oracle: take `compute_stock_logits` before `wrap_model`. Left out: adapters
(adapters.py), the loss (lm_head.py). Legend: T tokens, S targets, B rows, H hidden, V vocabulary,
N query heads, D head size."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tunesmith.core.errors import InputError
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.token_shard import TokenShard
from tunesmith.core.types import Batch, Json, PackLayout
from tunesmith.model.adapters import find_lora_layers
from tunesmith.model.attention import AttentionConfig, attend
from tunesmith.model.bank_linear import RowAdapters
from tunesmith.model.experts import freeze_routing
from tunesmith.model.frozen_weight import BlockedWeight, has_onednn_bf16, limit_onednn_cache
from tunesmith.model.hub.stored_tensors import has_uniform_layers
from tunesmith.model.hub.text_class import (
    LOAD_ERRORS,
    get_context_length,
    transformers_errors,
    use_torch_code,
)
from tunesmith.model.kernels import ops
from tunesmith.model.layers import (
    MIXERS,
    Embedding,
    add_residuals_in_norms,
    apply_gradient_checkpointing,
    prune_last_layer,
    replace_layers,
)
from tunesmith.model.lm_head import LMHead
from tunesmith.model.machine_errors import explain_error
from tunesmith.model.new_embeddings import get_new_rows
from tunesmith.model.paged_cache import CacheRow, PagedKVCache
from tunesmith.model.rotary import RotationKey, measure_documents, wrap_rotary
from tunesmith.model.safetensors_io import find_nonfinite
from tunesmith.model.stacked_adapters import bundle_adapters
from tunesmith.model.text_network import check_weight_shapes, load_text_network
from tunesmith.model.weight_shards import WeightShards, gather_weights

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
STOCK_DROPOUTS = ("residual_dropout", "embedding_dropout")  # numbers in modules
# names in the forwards of classes with a head -> the exponent of this factor of logits
HEAD_FACTORS = {
    **dict.fromkeys(("logit_scale", "lm_head_multiplier", "output_multiplier"), 1),
    "logits_scaling": -1,
}
MULTIPLIED_TYPES = ("hyperclovax",)  # others divide by logits_scaling
HEAD_CAP = "final_logit_softcapping"
RunLayers = Callable[[Tensor], Tensor | None]
Network = PreTrainedModel  # for other packages, which do not import transformers
# our attention; transformers builds no mask for a name without a mask function
ATTENTION_NAME = "tunesmith"


# ---------------------------------------------------------------- the stock network


def load_network(
    folder: Path, dtype: torch.dtype, device: str = "cpu", shards: WeightShards | None = None
) -> PreTrainedModel:
    """Load the stock network with weights in `dtype`, in evaluation mode, with nothing trainable
    and remote code refused. Of a multimodal checkpoint only the text part is loaded. With `shards`,
    each rank keeps its part of every layer.

    Raises InputError for weights that do not match the config, and for NaN or infinite values."""
    check_weight_shapes(folder)
    if device != "cpu" or shards is not None or not has_uniform_layers(folder):
        return load_text_network(folder, dtype, device, shards)  # tensor by tensor to the device
    disable_progress_bar()  # stderr belongs to the command line
    with transformers_errors(folder):
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    if name := find_nonfinite(dict(network.named_parameters())):
        message = f"the tensor {name} holds NaN or infinite values"
        raise InputError(message, where=str(folder), fix="download the model again")
    return use_torch_code(network).to(device).eval().requires_grad_(False)


@torch.no_grad()
def compute_stock_logits(
    network: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Return fp32 logits [len(positions), V] of one document, computed by transformers. Raises
    InputError if it cannot."""
    with forward_errors():
        out = network(
            input_ids=torch.tensor([list(tokens)], device=network.device),
            use_cache=False,
            logits_to_keep=torch.tensor(list(positions), device=network.device),
        )
    return out.logits[0].float()


@contextmanager
def forward_errors() -> Iterator[None]:
    """Turn an error of transformers' own forward into InputError: some configs build a network that
    cannot compute, such as one whose rotation has other sizes than its heads."""
    try:
        yield
    except (*LOAD_ERRORS, RuntimeError) as error:
        if isinstance(error, RuntimeError) and explain_error(error) is not None:
            raise
        detail = " ".join(str(error).split())[:300]
        message = f"transformers itself cannot compute it: {type(error).__name__}: {detail}"
        fix = "correct config.json, or download the model again"
        raise InputError(message, where="model", fix=fix) from error


@torch.no_grad()
def compute_cached_logits(network: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Return fp32 logits [2, V] of the last two tokens of one document, computed by transformers
    with its cache: the last one from the cache of all others."""
    ids = torch.tensor([list(tokens)], device=network.device)
    # its name before transformers 5.24
    names = inspect.signature(network.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    # with a number, a slice, the forward of SmolLM2 in bf16 takes twice as long
    positions = torch.tensor([len(tokens) - 2], device=network.device)
    begin = network(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=positions)
    last = network(input_ids=ids[:, -1:], use_cache=True, **{name: getattr(begin, name)})
    return torch.cat((begin.logits[0], last.logits[0])).float()


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
    """Return the ids of a conversation from transformers' tokenizer and chat template.

    `variables` are passed to the template; `added_tokens` are added to the tokenizer first."""
    encoded = load_stock_tokenizer(folder, added_tokens).apply_chat_template(
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
def load_stock_tokenizer(folder: Path, added_tokens: tuple[str, ...]):
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    new_tokens = [AddedToken(text, normalized=False, special=False) for text in added_tokens]
    tokenizer.add_tokens(new_tokens)
    return tokenizer


def get_sliding_window(network: PreTrainedModel) -> int | None:
    """Return how many tokens the windowed layers look back, None if all layers see everything."""
    config = network.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    return window if isinstance(window, int) and is_used else None


def has_attention_layer(network: PreTrainedModel) -> bool:
    layers: Any = network.base_model.layers
    return any(_has_attention(layer) for layer in layers)


def get_lm_head(network: PreTrainedModel) -> LMHead:
    """Return the head with the scale and the soft cap of the config; rows of new tokens are written
    into its weight."""
    config = network.config.get_text_config()
    output = network.get_output_embeddings()
    assert output is not None, "a causal language model has a head"
    gather_weights(output)
    # configs may have keys that the class ignores
    code = inspect.unwrap(type(network).forward).__code__
    names = {*code.co_names, *code.co_consts}
    scale = 1.0
    for name in HEAD_FACTORS.keys() & names:
        factor = getattr(config, name, 1.0)
        if not factor:
            message = f"{name} is {factor!r}, by which logits cannot be scaled"
            raise InputError(message, where="config.json", fix="download config.json again")
        is_multiplied = config.model_type in MULTIPLIED_TYPES
        scale = float(factor) ** (1 if is_multiplied else HEAD_FACTORS[name])
    new_rows = get_new_rows(output)
    if new_rows is not None:
        new_rows.write_into(output.weight)
    softcap = float(getattr(config, HEAD_CAP, 0) or 0) if HEAD_CAP in names else 0.0
    return LMHead(output.weight, output.bias, scale, softcap, new_rows)


# ---------------------------------------------------------------- the wrapped model


class PackedCausalLM:
    """A network after `wrap_model`: its decoder takes a PackLayout, its head is called separately.

    Training, likelihoods and generation run the same packed forward; generation adds a
    PagedKVCache. `ranks` are the processes that hold this model and share out what is measured."""

    def __init__(self, network: PreTrainedModel, dtype: torch.dtype, backend: str = "auto") -> None:
        self.network = network
        self.dtype = dtype
        self.backend = backend
        self.decoder: Any = network.base_model
        self.row_adapters: RowAdapters | None = None  # of an AdapterBank
        self.shards: WeightShards | None = None  # of frozen weights that ranks hold together
        self.ranks: Ranks = SINGLE_PROCESS
        network.set_attn_implementation(ATTENTION_NAME)
        self.rotary = wrap_rotary(self.decoder)
        self.is_pruned = prune_last_layer(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def head(self) -> LMHead:
        return get_lm_head(self.network)

    @property
    def embedding_size(self) -> int:
        embedding: Any = self.network.get_input_embeddings()
        return embedding.weight.shape[1]

    @property
    def token_rows(self) -> int:
        """How many token ids every embedding has a row for; Gemma 4's second one may have fewer."""
        embedding: Any = self.network.get_input_embeddings()
        second: Any = getattr(self.decoder, "embed_tokens_per_layer", None)
        num_rows = embedding.weight.shape[0]
        return num_rows if second is None else min(num_rows, second.weight.shape[0])

    @property
    def context_length(self) -> int:
        return get_context_length(self.network.config)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the keys and values of all attention layers for one token."""
        configs = self.network.config.get_text_config().per_layer_config
        num_values = 0
        for index, layer in enumerate(self.decoder.layers):
            if _has_attention(layer):
                num_values += 2 * _count_key_values(configs[index])
        return num_values * self.dtype.itemsize

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes of the states of all recurrent layers for one row, whatever its length."""
        mixers = [module for module in self.decoder.modules() if isinstance(module, MIXERS)]
        return sum(mixer.count_state_bytes(self.dtype) for mixer in mixers)

    def get_rotation_key(self, length: int) -> RotationKey:
        """Return a key that is equal for lengths of documents with equal rotary frequencies."""
        return self.rotary.get_key(length) if self.rotary else ()

    def compute_hidden(self, batch: Batch) -> Tensor:
        """Return final hidden states [S, H] of the positions that predict a target."""
        self.set_layout(batch.layout, batch.shard)
        shared = batch.shared_targets
        if shared is None or not shared.is_for(batch):
            return self._run_decoder(
                batch.tokens_T,
                batch.positions_T,
                batch.layout,
                positions_to_keep=batch.positions_S,
                embedding_noise_TH=batch.embedding_noise_TH,
                shard=batch.shard,
            )
        # the last token of a shared part predicts several targets: compute it once
        hidden_PH = self._run_decoder(
            batch.tokens_T,
            batch.positions_T,
            batch.layout,
            positions_to_keep=shared.positions_P,
            shard=batch.shard,
        )
        return hidden_PH.index_select(0, shared.position_S)

    @torch.no_grad()
    def prefill(
        self,
        rows: Sequence[CacheRow],
        tokens_by_row: Sequence[Sequence[int]],
        kv_cache: PagedKVCache,
        document_lengths: Sequence[int] | None = None,
        num_outputs: Sequence[int] | None = None,
    ) -> Tensor:
        """Run new tokens of each row after those that it has stored, in one pack. Returns hidden
        states [B, H] of the last ones, or of the last `num_outputs` of each row, one after another.

        A row that gets more tokens later is rotated as the beginning of a document of its entry in
        `document_lengths`."""
        lengths = [len(tokens) for tokens in tokens_by_row]
        positions_T = kv_cache.begin_forward(rows, lengths, self.device)
        tokens_T = torch.tensor([*itertools.chain(*tokens_by_row)], device=self.device)
        ends = list(itertools.accumulate(lengths))
        starts = tuple(end - length for end, length in zip(ends, lengths, strict=True))
        layout = PackLayout(starts, tuple(lengths))
        self._set_lengths(document_lengths or [row.length for row in rows], layout)
        positions: list[int] = []
        for end, count in zip(ends, num_outputs or [1] * len(ends), strict=True):
            positions += range(end - count, end)
        positions_K = torch.tensor(positions, device=self.device)
        return self._run_decoder(
            tokens_T, positions_T, layout, kv_cache, positions_to_keep=positions_K
        )

    @torch.no_grad()
    def decode_step(
        self,
        rows: Sequence[CacheRow],
        tokens: Sequence[int],
        kv_cache: PagedKVCache,
        run_layers: RunLayers | None = None,
    ) -> Tensor:
        """Run one more token for every row. Returns hidden states [B, H].

        `run_layers` takes the place of the decoder's forward, unless it returns None."""
        positions_B = kv_cache.begin_forward(rows, (1,) * len(rows), self.device, is_step=True)
        layout = PackLayout(tuple(range(len(tokens))), (1,) * len(tokens))
        tokens_B = torch.tensor(tokens, device=self.device)
        self._set_lengths([row.length for row in rows], layout)
        hidden_BH = None if run_layers is None else run_layers(tokens_B)
        if hidden_BH is None:
            hidden_BH = self._run_decoder(tokens_B, positions_B, layout, kv_cache)
        return hidden_BH

    def set_layout(self, layout: PackLayout, shard: TokenShard | None = None) -> None:
        """Let the rotary embedding know the documents of the next forward, of which `shard` has
        some tokens."""
        if not self.rotary:
            return
        lengths: Sequence[int] = layout.lengths
        if shard is not None:
            lengths = shard.cut_segments(layout.starts, layout.lengths)
        self.rotary.set_lengths(measure_documents(layout), lengths)

    def _set_lengths(self, lengths: Sequence[int], layout: PackLayout) -> None:
        if self.rotary:
            self.rotary.set_lengths(lengths, layout.lengths)

    def _run_decoder(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: PackLayout,
        kv_cache: PagedKVCache | None = None,
        positions_to_keep: Tensor | None = None,
        embedding_noise_TH: Tensor | None = None,
        shard: TokenShard | None = None,
    ) -> Tensor:
        """Return final hidden states [T, H], or [len(positions_to_keep), H]."""
        if self.row_adapters is not None:
            self.row_adapters.keep_positions(positions_to_keep)
        inputs = {"input_ids": tokens_T[None]}
        if embedding_noise_TH is not None:
            embeddings_TH = self.network.get_input_embeddings()(tokens_T)
            noisy_TH = embeddings_TH + embedding_noise_TH.to(embeddings_TH.dtype)
            if type(self.decoder).__name__ == "FalconH1Model":  # scales only what it looks up
                noisy_TH = noisy_TH * self.decoder.embedding_multiplier
            inputs = {"inputs_embeds": noisy_TH[None]}
            if getattr(self.decoder, "hidden_size_per_layer_input", 0):
                per_layer_inputs = self.decoder.get_per_layer_inputs(tokens_T[None])
                inputs["per_layer_inputs"] = per_layer_inputs
        out = self.decoder(
            **inputs,
            position_ids=positions_T[None],
            use_cache=False,
            layout=layout,
            backend=self.backend,
            kv_cache=kv_cache,
            positions_to_keep=positions_to_keep,
            shard=shard,
        )
        hidden = out.last_hidden_state[0]
        if positions_to_keep is None or self.is_pruned:
            return hidden
        return hidden.index_select(0, positions_to_keep)


def wrap_model(
    network: PreTrainedModel,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    should_block_weights: bool = False,
    gradient_checkpointing: str = "none",
    shards: WeightShards | None = None,
) -> PackedCausalLM:
    """Replace the modules that have a faster equivalent, in place, and wrap the network.

    Weights are shared, not copied. `should_block_weights` stores the frozen weights of adapted
    layers in the layouts of products where the machine supports it. For `gradient_checkpointing`
    see `apply_gradient_checkpointing`."""
    is_bf16_cpu = dtype == torch.bfloat16 and network.device.type == "cpu"
    if should_block_weights and is_bf16_cpu and has_onednn_bf16():
        _block_weights(network)
    network.set_input_embeddings(Embedding(network.get_input_embeddings(), dtype))
    replace_layers(network)
    _disable_dropout(network)
    freeze_routing(network)
    model = PackedCausalLM(network, dtype, backend)
    if ops.is_gpu(network.device):
        add_residuals_in_norms(model.decoder.layers)
        bundle_adapters(list(find_lora_layers(network).values()), dtype)
    apply_gradient_checkpointing(list(model.decoder.layers), gradient_checkpointing)
    if shards is not None:
        shards.attach(network, dtype)
        model.shards = shards
    return model


def _disable_dropout(network: nn.Module) -> None:
    """Disable the dropout of the base, which older families have: its mask would be drawn for a
    pack, so that a document's loss depended on the others. The adapter's own is a setting."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in STOCK_DROPOUTS:
            if hasattr(module, name):
                setattr(module, name, 0.0)


def _block_weights(network: PreTrainedModel) -> None:
    """Block the adapted weights and copy the other frozen ones.

    The weight file is memory-mapped: its pages count as ours until no tensor refers to them."""
    for layer in find_lora_layers(network).values():
        layer.frozen = BlockedWeight(layer.frozen.weight)
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _count_key_values(config: Any) -> int:
    """Return how many values the keys of a layer have for one token, and its values at most."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return heads * size


def _has_attention(layer: nn.Module) -> bool:
    """Return whether a decoder layer has softmax attention, stock or ours."""
    return any(type(module).__name__.endswith("Attention") for module in layer.modules())


# ---------------------------------------------------------------- inside stock attention modules


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackLayout,
    backend: str = "auto",
    kv_cache: PagedKVCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for stock modules, as transformers' AttentionInterface calls it:
    [1, N, T, D] in, [1, T, N, D] out.

    Raises InputError for an argument that it would have to ignore."""
    unsupported = [k for k in ("head_mask", "position_bias") if kwargs.get(k) is not None]
    if attention_mask is not None:
        unsupported.append("a mask")
    if unsupported:
        message = (
            f"{type(module).__name__} passes {', '.join(unsupported)} to attention, "
            "which packing does not support"
        )
        fix = "use a model family from the list in docs/reference/models.md"
        raise InputError(message, fix=fix)
    scaling = kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    softcap = kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    config = AttentionConfig(
        scale=float(scaling) if isinstance(scaling, int | float) else query.shape[-1] ** -0.5,
        window=window if isinstance(window, int) else None,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
        sinks_N=sinks if isinstance(sinks, Tensor) else None,
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    value_size = v.shape[-1]
    if value_size < k.shape[-1]:  # multi-head latent attention
        v = F.pad(v, (0, k.shape[-1] - value_size))
    if kv_cache is None:
        out = attend(q, k, v, layout, config, backend, shard=kwargs.get("shard"))
    else:
        out = kv_cache.attend(module, q, k, v, layout, config, backend)
    return out[None, ..., :value_size], None


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
limit_onednn_cache()
# on a GPU, a sum over the tokens of a pack (the gradient of an adapter) is not rounded on its way
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
