"""The shape of a model, from which the plan predicts memory and time.

    ModelSpec        the model
    PartShape        the linears of attention, of recurrent layers, of MLPs, of experts
    NormShape        the norms of the layers
    RecurrentShape   a layer that carries a state from token to token, and the bytes that follow

In: what model/hub/spec.py and part_shapes.py read from config.json and the headers of the weights.
Left out: what all layers take together (plan/memory.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class PartShape:
    """The linears of one part of the layers, summed over all layers; each reads the hidden states
    or writes into them."""

    # layer that has this part -> its values per token inside, inner_outputs and inner_inputs
    layer_values: dict[int, int]
    inputs: int  # widths of all of them: an adapter of rank 1 has inputs + outputs parameters
    outputs: int
    # values per token inside: outputs of those that read, inputs of those that write; of the
    # experts that a token meets
    inner_outputs: int
    inner_inputs: int

    @property
    def layers(self) -> int:
        """How many layers have this part."""
        return len(self.layer_values)


@dataclass(frozen=True)
class NormShape:
    """The norms that have weights, summed over all layers: how many are of the hidden states, and
    the values per token that the others read (q, k, latents)."""

    hidden: int = 0
    inner_values: int = 0


STATE_BYTES = 4  # of a value of a recurrent state: fp32, in fp64 runs more


@dataclass(frozen=True)
class RecurrentShape:
    """One recurrent layer. Heads and their sizes are 0 for a short convolution alone."""

    num_channels: int  # of the convolution
    num_taps: int
    num_heads: int = 0  # of the values
    key_size: int = 0
    value_size: int = 0

    def compute_state_bytes(self, dtype_bytes: int) -> int:
        """Return the bytes that a row of generation keeps, whatever its length."""
        history_bytes = (self.num_taps - 1) * self.num_channels * dtype_bytes
        state_values = self.num_heads * self.key_size * self.value_size
        return history_bytes + state_values * max(STATE_BYTES, dtype_bytes)

    def compute_saved_bytes(self, dtype_bytes: int) -> int:
        """Return the bytes per token that the mixer saves between forward and backward, without the
        inputs of its linears: what the projections give (inputs of the convolution, gate), what is
        read from the state, and the decays in fp32. A short convolution saves its projection."""
        if not self.num_heads:
            return 3 * self.num_channels * dtype_bytes
        values = 2 * self.num_heads * self.value_size
        decays = 8 * self.num_heads * max(STATE_BYTES, dtype_bytes)
        return (self.num_channels + values) * dtype_bytes + decays


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model, read from config.json and the safetensors headers."""

    name: str
    path: Path
    architecture: str  # LlamaForCausalLM
    model_type: str  # llama
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    tie_word_embeddings: bool
    parameters: int
    dtype: str
    origin: str = ""  # where the weights come from
    # of the matrices in the decoder layers, counted from the headers: all, and those that a token
    # meets, which are fewer with experts
    block_parameters: int = 0
    active_parameters: int = 0
    packed_parameters: int = 0  # of them, those that stay in MXFP4
    # of each layer: attention, delta, mamba2, conv, attention+mamba2, or "" without one
    layer_mixers: tuple[str, ...] = ()
    num_experts: int = 0  # routed ones of a layer
    num_experts_per_token: int = 0
    # of the text part's tensors on a multimodal model, and the bytes of its other parts
    tensor_prefix: str = ""
    omitted_bytes: int = 0
    per_layer_rows: int = 0  # of Gemma 4's second embedding, 0 without one
    # attention, recurrent, mlp, experts -> its linears
    parts: dict[str, PartShape] = field(default_factory=dict[str, PartShape])
    norms: NormShape = NormShape()
    cache_values: int = 0  # keys and values of all attention layers for one token
    recurrent: RecurrentShape | None = None  # of each layer that is not attention alone

    @property
    def expert_parameters(self) -> int:
        """Parameters of the routed experts' matrices, of which a token meets few."""
        rest = self.num_experts - self.num_experts_per_token
        if rest <= 0:
            return 0
        return (self.block_parameters - self.active_parameters) * self.num_experts // rest

    @property
    def token_rows(self) -> int:
        """How many token ids every embedding has a row for."""
        return min(self.vocab_size, self.per_layer_rows or self.vocab_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size
