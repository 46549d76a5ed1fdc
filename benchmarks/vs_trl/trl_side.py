"""Run TRL's side: `SFTTrainer` with a PEFT model, as fast as its settings allow on a CPU.

    python -m benchmarks.vs_trl.trl_side JOB

JOB is a Job as JSON with the options padding_free, autocast, fp32_adapter and losses. The trainer
gets the token ids and labels of tunesmith's documents in the same order, and the same initial
adapter. Disabled: evaluation, checkpoints, logging (except losses), workers, gradient
checkpointing, data preparation.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.vs_trl.job import (
    Clock,
    Job,
    Outcome,
    count_threads,
    parse_job,
    print_outcome,
    read_documents,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from datasets import Dataset
from tunesmith.core.types import Document

IGNORED = -100  # the label of an unsupervised token


class Timer(TrainerCallback):
    """Report the trainer's steps to the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state
        control.should_training_stop |= self.clock.finish_step()


def make_dataset(documents: Sequence[Document]) -> Dataset:
    def labels(document: Document) -> list[int]:
        pairs = zip(document.tokens_L.tolist(), document.weights_L.tolist(), strict=True)
        return [token if weight else IGNORED for token, weight in pairs]

    return Dataset.from_list(
        [{"input_ids": d.tokens_L.tolist(), "labels": labels(d)} for d in documents]
    )


def settings(job: Job, folder: str) -> SFTConfig:
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        warmup_steps=job.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=job.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=job.options["autocast"],
        padding_free=job.options["padding_free"],
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        logging_strategy="steps" if job.options["losses"] else "no",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


@torch.no_grad()
def has_isolated_rows(trainer: SFTTrainer, rows: Dataset) -> bool:
    """Return whether a row's logits are bitwise independent of the other row in its forward."""
    collate: Any = trainer.data_collator
    model: Any = trainer.model

    def second_logits(first: list[int]) -> torch.Tensor:
        pair = collate([{"input_ids": first, "labels": first}, rows[1]])
        del pair["labels"]
        return model(**pair, use_cache=False).logits.flatten(0, 1)[-len(rows[1]["input_ids"]) :]

    first = rows[0]["input_ids"]
    return torch.equal(second_logits(first), second_logits(first[::-1]))


def run(job: Job, folder: str) -> Outcome:
    torch.set_num_threads(count_threads())
    torch.set_flush_denormal(True)
    documents = read_documents(job.documents)
    rows, clock = make_dataset(documents), Clock(job, documents)
    base = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(
        base, job.adapter, is_trainable=True, autocast_adapter_dtype=job.options["fp32_adapter"]
    )
    trainer = SFTTrainer(
        model=model,
        args=settings(job, folder),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Timer(clock)],
    )
    is_isolated = not job.options["padding_free"] or has_isolated_rows(trainer, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.make_outcome(losses, is_isolated=is_isolated)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as scratch:
        print_outcome(run(parse_job(sys.argv[1]), scratch))
