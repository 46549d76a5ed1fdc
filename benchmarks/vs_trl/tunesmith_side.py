"""tunesmith's side: the same rows through `Training`, with the modules, the packs and the loop that
every run uses.

python -m benchmarks.vs_trl.tunesmith_side JOB                   a Job as JSON; options:
pack_length, blocked, share_prefixes python -m benchmarks.vs_trl.tunesmith_side start MODEL FOLDER
writes the adapter that both sides begin with"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from benchmarks.vs_trl.job import LORA, Clock, Job, Outcome, job_of, read_documents, say, threads
from transformers import PreTrainedModel

from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document
from tunesmith.model.adapters import add_lora
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.model.save import load_adapter, save_adapter
from tunesmith.train.loop import TrainingConfig, TrainingLoop


def load(model: str) -> PreTrainedModel:
    network = load_network(Path(model), torch.bfloat16)
    add_lora(network, LORA)
    return network


def start(model: str, folder: str) -> None:
    save_adapter(load(model), Path(folder), LORA, Path(model))
    print(json.dumps(folder))


def run(job: Job) -> Outcome:
    torch.set_num_threads(threads())
    torch.set_flush_denormal(True)  # as a run of tunesmith does
    documents = read_documents(job.documents)
    network = load(job.model)
    load_adapter(network, Path(job.adapter) / "adapter_model.safetensors")
    settings = TrainingConfig(
        steps=job.steps,
        pack_length=job.options["pack_length"],
        learning_rate=job.learning_rate,
        warmup_steps=job.warmup_steps,
        schedule="linear",
        weight_decay=0.0,
        max_grad_norm=job.max_grad_norm,
        seed=0,
        share_prefixes=job.options["share_prefixes"],
    )

    def documents_of(step: int) -> list[Document]:
        return documents[(step - 1) * job.batch : step * job.batch]

    model = wrap_model(network, torch.bfloat16, should_block_weights=job.options["blocked"])
    training, clock = TrainingLoop(model, documents_of, settings), Clock(job, documents)
    clock.start()
    for event in training:
        if isinstance(event, TrainStep) and clock.step_done(event.loss):
            training.stop()
    return clock.outcome()


if __name__ == "__main__":
    if sys.argv[1] == "start":
        start(*sys.argv[2:])
    else:
        say(run(job_of(sys.argv[1])))
