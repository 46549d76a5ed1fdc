"""Training of models of published sizes, with two or three of their layers: shapes cost nothing,
and what one more layer adds gives the whole model (`extend`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from fake_models import make_loop, make_model, take_step
from recorder import Record, recording
from tunesmith.core.types import Document, ModelSpec
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.hub.spec import read_spec
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossNormalizer, compute_step_terms

RANK = 16
POLICIES = ("none", "selective", "full")
FEWER = 2  # layers of the two models that are compared
MORE = 3


@dataclass(frozen=True)
class LargeModel:
    """A model, and the documents of its pack: how many, of how many tokens, and how many of these
    are trained at the end of each."""

    config_class: type[PreTrainedConfig]
    num_layers: int
    sizes: Mapping[str, Any]
    num_documents: int = 23
    document_tokens: int = 350
    trained_tokens: int = 120
    policies: tuple[str, ...] = POLICIES

    @property
    def num_tokens(self) -> int:
        return self.num_documents * self.document_tokens

    def make_config(self, num_layers: int) -> PreTrainedConfig:
        architecture = self.config_class.__name__.replace("Config", "ForCausalLM")
        others = {"num_hidden_layers": num_layers, "architectures": [architecture]}
        return self.config_class(**self.sizes, **others)

    def describe(self, num_layers: int, folder: Path) -> ModelSpec:
        """Return the model with so many layers as a plan reads it from the folder."""
        self.make_config(num_layers).save_pretrained(folder)
        return read_spec(folder)


LARGE_MODELS = {
    "Qwen3-8B": LargeModel(
        Qwen3Config,
        36,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3-8B": LargeModel(
        LlamaConfig,
        32,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        num_documents=2,
        document_tokens=4096,
        trained_tokens=4096,
        policies=("none",),
    ),
    "Llama-3.2-1B": LargeModel(
        LlamaConfig,
        16,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM2-135M": LargeModel(
        LlamaConfig,
        30,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}


def name_case(model: str, policy: str, num_layers: int) -> str:
    return f"{model}, {num_layers} layers, {policy}"


def count_layer(results: Mapping[str, Mapping[str, Any]], model: str, policy: str, key: str) -> Any:
    """Return what one more layer adds."""
    fewer, more = (results[name_case(model, policy, n)][key] for n in (FEWER, MORE))
    return more - fewer


def extend(results: Mapping[str, Mapping[str, Any]], model: str, policy: str, key: str) -> Any:
    """Return the number of the model with all its layers."""
    few_layers = results[name_case(model, policy, FEWER)][key]
    more_layers = LARGE_MODELS[model].num_layers - FEWER
    return few_layers + more_layers * count_layer(results, model, policy, key)


def train_large(name: str, num_layers: int, policy: str) -> Record:
    """Record a run from the start. Kernels, bytes and seconds are those of one pack, forward and
    backward, after the first update."""
    large = LARGE_MODELS[name]
    documents = make_documents(large)
    with recording() as record:
        model = make_model(
            large.make_config(num_layers), lora_r=RANK, gradient_checkpointing=policy
        )
        num_uploads = record.uploads
        loop = make_loop(model, documents, pack_length=large.num_tokens)
        keep_saved(model, record)
        take_step(loop)
        num_uploads = record.uploads - num_uploads
        num_kernels = record.num_kernels
        num_bytes = record.moved_bytes
        seconds = record.seconds
        run_pack(loop, documents)
        record.step_kernels = record.num_kernels - num_kernels
        record.step_bytes = record.moved_bytes - num_bytes
        record.step_seconds = record.seconds - seconds
        record.uploads = num_uploads
    return record


def make_documents(large: LargeModel) -> list[Document]:
    documents: list[Document] = []
    for index in range(large.num_documents):
        tokens_L = np.random.default_rng(index).integers(5, 1000, large.document_tokens + 1)
        weights_L = np.zeros(len(tokens_L), np.float32)
        weights_L[-large.trained_tokens :] = 1
        documents.append(Document(f"rows:{index}", tokens_L, weights_L))
    return documents


def run_pack(loop: TrainingLoop, documents: Sequence[Document]) -> None:
    """Run a pack forward and backward, as a step of several packs does with its first."""
    model = loop.model
    model.network.train()
    (pack,) = pack_step(documents, loop.pack_length)
    normalizer = LossNormalizer.from_documents(documents)
    batch = collate(pack, model.device)
    terms = compute_step_terms(model, batch, normalizer, loop.loss_config)
    torch.stack(
        [term.coefficient * term.sum / term.count for term in terms.values()]
    ).sum().backward()


def keep_saved(model: PackedCausalLM, record: Record) -> None:
    """Record the bytes that are in memory when the decoder is through its first pack, beside those
    before."""
    start_bytes = record.live_bytes

    def read(*_arguments: Any) -> None:
        record.saved_bytes = record.saved_bytes or record.live_bytes - start_bytes

    model.decoder.register_forward_hook(read)
