"""Run a Work as TRL or Unsloth does, on the same ids, in batches of rows of equal length, which
have no padding.

    python -m benchmarks.gpu.peer_side trl|unsloth WORK

WORK is a Work as JSON, whose folder holds weights. TRL trains a PEFT model; Unsloth builds its own
and trains it with TRL's trainer. Disabled: evaluation, checkpoints, logging, data preparation."""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.work import ALPHA, RANK, Clock, Result, Work, make_documents, parse_work
from benchmarks.gpu.work import print_result as print_it

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100  # the label of an unsupervised token
MANY_STEPS = 10**6


def load_unsloth(work: Work) -> Any:
    from unsloth import FastLanguageModel  # it patches what is imported after it

    model, _ = FastLanguageModel.from_pretrained(
        work.folder, load_in_4bit=work.method == "qlora", max_seq_length=work.pack_tokens
    )
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS
    )


def load_peft(work: Work) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if work.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        work.folder,
        dtype=torch.bfloat16,
        device_map=work.device,
        quantization_config=quantization,
        attn_implementation="sdpa",
    )
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))


def make_tokenizer() -> Any:
    """Return a tokenizer that the trainer asks for and does not use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_rows(work: Work) -> Any:
    from datasets import Dataset

    rows: list[dict[str, list[int]]] = []
    for document in make_documents(work):
        pairs = zip(document.tokens_L.tolist(), document.weights_L.tolist(), strict=True)
        labels = [token if weight else IGNORED for token, weight in pairs]
        rows.append({"input_ids": document.tokens_L.tolist(), "labels": labels})
    return Dataset.from_list(rows)


def run(name: str, work: Work, folder: str) -> Result:
    model = load_unsloth(work) if name == "unsloth" else load_peft(work)
    import torch
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock(work)

    class Timer(TrainerCallback):
        """Report the trainer's steps to the clock."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            del args, state
            control.should_training_stop |= clock.finish_step()

    rows = make_rows(work)
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        max_steps=MANY_STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=work.device == "cuda",
        # documents in one row are isolated only by flash attention, which sdpa is not
        padding_free=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=work.device == "cpu",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        processing_class=make_tokenizer(),
        callbacks=[Timer()],
    )
    trainer.train()
    tokens = sum(len(row) - 1 for row in rows["input_ids"])
    peak_bytes = torch.cuda.max_memory_reserved() if work.device == "cuda" else 0
    return Result(clock.compute_rate(tokens), peak_bytes=peak_bytes)


def main(name: str, work: Work) -> None:
    with TemporaryDirectory() as folder:
        print_it(run(name, work, folder))


if __name__ == "__main__":
    main(sys.argv[1], parse_work(sys.argv[2]))
