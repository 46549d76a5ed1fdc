"""What is trained on a GPU to measure it: models with random weights, documents of random ids.

A Work says which; its sides (tunesmith_side.py, peer_side.py) run it, each in a process of its own,
and print a Result as JSON. Nothing is downloaded: the configs are those of public models."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.core.types import Document

WARM_UP_STEPS = 3  # kernels are compiled, memory is reserved
RANK = 16
ALPHA = 32
SHORT_TOKENS = 350  # a chat, a third of which is trained; longer documents are trained whole

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Work:
    """One line of the table. `folder` holds the config.json, and random weights for peers."""

    model: str
    method: str  # lora, qlora
    document_tokens: int
    pack_tokens: int
    folder: str
    device: str
    seconds: float  # no step starts after this much measured time

    @property
    def title(self) -> str:
        return f"{self.model} {self.method}, {self.document_tokens:,} tokens"


@dataclass(frozen=True)
class Result:
    """The measurements of one side, or the problem that prevented them."""

    tokens_per_second: float = 0.0
    kernels: int = 0  # of a step
    peak_bytes: int = 0
    predicted_bytes: int = 0
    utilization: float = 0.0  # of the data sheet's rate; 0 where it is not known
    problem: str = ""


def parse_work(text: str) -> Work:
    return Work(**json.loads(text))


def print_result(result: Result) -> None:
    print(json.dumps(asdict(result)))


def make_documents(work: Work) -> list[Document]:
    """Return the documents of a step: as many as fit into a pack, the same ids for every side."""
    config = json.loads((Path(work.folder) / "config.json").read_text())
    length = work.document_tokens
    documents: list[Document] = []
    for index in range(max(1, work.pack_tokens // length)):
        tokens_L = np.random.default_rng(index).integers(5, config["vocab_size"], length + 1)
        weights_L = np.ones(length + 1, np.float32)
        weights_L[: 1 if length > SHORT_TOKENS else 2 * length // 3] = 0
        documents.append(Document(f"rows:{index}", tokens_L, weights_L))
    return documents


class Clock:
    """A timer of the steps after the warm-up, until the seconds are used."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.steps = 0
        self.started = 0.0
        self.seconds = 0.0

    def finish_step(self) -> bool:
        """Count a finished step; return whether it was the last."""
        if self.work.device == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            self.started = time.perf_counter()
            if self.work.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        self.seconds = time.perf_counter() - self.started
        return self.steps > WARM_UP_STEPS and self.seconds >= self.work.seconds

    def compute_rate(self, tokens: int) -> float:
        """Return tokens per second, from those of a step."""
        return tokens * (self.steps - WARM_UP_STEPS) / self.seconds
