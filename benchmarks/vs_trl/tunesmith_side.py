"""Run tunesmith's side: the same rows through the `TrainingLoop` of every run.

    python -m benchmarks.vs_trl.tunesmith_side JOB
    python -m benchmarks.vs_trl.tunesmith_side start MODEL FOLDER

JOB is a Job as JSON with the options pack_length, blocked and share_prefixes. `start` writes the
adapter that both sides start from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.vs_trl.job import (
    LORA,
    Clock,
    Job,
    Outcome,
    count_threads,
    parse_job,
    print_outcome,
    read_documents,
)
from transformers import PreTrainedModel

from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document, PlanConfig
from tunesmith.model.adapters import add_lora
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.model.save import load_adapter, save_adapter
from tunesmith.train.loop import TrainingLoop


def load_lora_network(model: str) -> PreTrainedModel:
    network = load_network(Path(model), torch.bfloat16)
    add_lora(network, LORA)
    return network


def save_initial_adapter(model: str, folder: str) -> None:
    save_adapter(load_lora_network(model), Path(folder), LORA, Path(model))
    print(json.dumps(folder))


def make_loop_config(**settings: Any) -> PlanConfig:
    """Return `settings` with defaults for those that a loop of a benchmark does not read, such as
    evaluation, the guard and checkpoints."""
    return PlanConfig(
        optim="adamw",
        dtype="bf16",
        num_train_epochs=1,
        warmup_ratio=0.0,
        weight_decay=0.0,
        step_in_backward=False,
        metrics=(),
        eval_steps=1,
        save_steps=1,
        guard_collapse="off",
        guard_forgetting="off",
        forgetting_margin=0.0,
        patience=1,
        probe_steps=0,
        probe_prompts=0,
        gradient_checkpointing="none",
        chat_template="auto",
        on_overlong="refuse",
        seed=0,
        stage="sft",
        output_dir="",
        now="2026-01-01T00:00:00",
        **settings,
    )


def make_config(job: Job) -> PlanConfig:
    """Return the settings of the job."""
    return make_loop_config(
        method="lora",
        max_length=job.options["pack_length"],
        pack_length=job.options["pack_length"],
        learning_rate=job.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=job.max_grad_norm,
        attention="cpu_kernel",
        share_prefixes=job.options["share_prefixes"],
        weight_layout="blocked" if job.options["blocked"] else "plain",
    )


def run(job: Job) -> Outcome:
    torch.set_num_threads(count_threads())
    torch.set_flush_denormal(True)  # as a run of tunesmith does
    documents = read_documents(job.documents)
    network = load_lora_network(job.model)
    load_adapter(network, Path(job.adapter) / "adapter_model.safetensors")
    config = make_config(job)

    def load_documents(step: int) -> list[Document]:
        return documents[(step - 1) * job.batch_size : step * job.batch_size]

    model = wrap_model(network, torch.bfloat16, should_block_weights=job.options["blocked"])
    training = TrainingLoop(
        model, load_documents, config, steps=job.steps, warmup_steps=job.warmup_steps
    )
    clock = Clock(job, documents)
    clock.start()
    for event in training:
        if isinstance(event, TrainStep) and clock.finish_step(event.loss):
            training.stop()
    return clock.make_outcome()


if __name__ == "__main__":
    if sys.argv[1] == "start":
        save_initial_adapter(*sys.argv[2:])
    else:
        print_outcome(run(parse_job(sys.argv[1])))
