"""LoRA fine-tuning in one file, on tunesmith's building blocks: render, pack, prove, train, save.

    python examples/minimal_sft.py MODEL_FOLDER rows.jsonl adapter/

Read this first, then src/tunesmith/train/run.py, which does the same and measures, guards, saves
checkpoints and resumes. Every value that is a constant here is decided by the plan there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.data.sampler import StepSampler
from tunesmith.model import causal_lm
from tunesmith.model.adapters import add_lora, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, compute_stock_logits
from tunesmith.model.save import save_adapter
from tunesmith.train.losses import sft_loss, sum_weights
from tunesmith.train.optimizer import compute_learning_rate, make_optimizer, step_optimizer

BATCH_SIZE = 4  # rows per optimizer step
PACK_LENGTH = 2048  # tokens: how many rows run side by side, without seeing each other
EPOCHS = 1.0
LEARNING_RATE = 1e-3
WARMUP_STEPS = 3
LORA = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
    "seed": 0,
}


def main(model_folder: Path, rows_file: Path, adapter_folder: Path) -> None:
    rows = load_rows(rows_file, Renderer.from_folder(model_folder, now=datetime.now()))
    network = causal_lm.load_network(model_folder, torch.float32)
    shortest, longest = min(rows, key=len), max(rows, key=len)
    last_target = longest.weights_L.nonzero()[0][-1]
    reference = compute_stock_logits(network, longest.tokens_L.tolist(), [last_target - 1])
    add_lora(network, LORA)
    model = causal_lm.wrap_model(network, torch.float32)
    prove(model, shortest, longest, reference)
    train(model, rows)
    adapter_folder.mkdir(parents=True)
    save_adapter(network, adapter_folder, LORA, model_folder)


def load_rows(file: Path, renderer: Renderer) -> list[Document]:
    """Render each conversation to token ids, and weights: 1 for the answers, 0 for the rest."""
    rows: list[Document] = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        messages = tuple(json.loads(line)["messages"])
        weights = tuple(float(message["role"] == "assistant") for message in messages)
        example = Example(f"{file.name}:{number}", messages=messages, turn_weights=weights)
        rows.extend(renderer.render(example).documents)
    return rows


def prove(
    model: PackedCausalLM, shortest: Document, longest: Document, reference: torch.Tensor
) -> None:
    """Nothing is trained unless our forward equals transformers', packed and alone."""
    last = compute_last_logits(model, [longest])
    torch.testing.assert_close(last, reference[-1], rtol=1e-3, atol=1e-3)
    packed = compute_last_logits(model, [shortest, longest])
    torch.testing.assert_close(packed, last, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def compute_last_logits(model: PackedCausalLM, documents: Sequence[Document]) -> torch.Tensor:
    """Return the logits [V] of the last target of the last document, in one pack of all."""
    (pack,) = pack_step(documents, PACK_LENGTH)
    batch = collate(pack)
    hidden_SH = model.compute_hidden(batch)
    index = pack.documents.index(documents[-1])
    return model.head.compute_logits(hidden_SH[batch.document_S == index][-1:])[0]


def train(model: PackedCausalLM, rows: Sequence[Document]) -> None:
    sampler = StepSampler(len(rows), BATCH_SIZE, EPOCHS, seed=0)
    optimizer = make_optimizer(get_trainable_parameters(model.network).values(), weight_decay=0.0)
    model.network.train()
    for step, indices in sampler.iter_steps():
        documents = [rows[index] for index in indices]
        # The divisor is the step's own, so that packing cannot change the update.
        step_weight = sum_weights(documents)
        loss = 0.0
        for pack in pack_step(documents, PACK_LENGTH, should_share=True):
            for term in sft_loss(model, collate(pack), step_weight).values():
                (term.sum / term.count).backward()
                loss += float(term.sum.detach()) / term.count
        learning_rate = compute_learning_rate(
            step,
            peak=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            total_steps=sampler.total_steps,
            schedule="linear",
        )
        step_optimizer(optimizer, learning_rate)
        optimizer.zero_grad()
        print(f"step {step}/{sampler.total_steps}  loss {loss:.4f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
