"""A tiny model folder as users have them (config, weights, tokenizer, chat template), rows, and
recipes over both."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tunesmith.core.events import Event, TrainStep
from tunesmith.core.types import Json, Plan
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.train import run

TURNS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
END = 257


def save_model_folder(path: Path, seed: int = 0) -> Path:
    """A random Llama of two layers, one token a byte; answers end in another token than texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|start|>", "<|end|>", "<|text|>")]
    )
    stock = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|text|>", chat_template=TURNS
    )
    stock.save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=258,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def save_writer_folder(path: Path) -> Path:
    """One that writes short words: the first number of every hidden state is the same, and there
    the head likes a few small letters and the ends."""
    save_model_folder(path)
    tensors = load_file(path / "model.safetensors")
    letters = [
        place
        for place, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
        if sign in "abcdefgh"
    ]
    tensors["model.embed_tokens.weight"][:, 0] = 5
    tensors["lm_head.weight"][:, 0] = -4
    tensors["lm_head.weight"][[*letters, END, END + 1], 0] = 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_chat_row(question: str, answer: str, system: str = "") -> Json:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def build_sum_rows(first: int, count: int) -> list[Json]:
    """Rows whose answers are small JSON objects; their lengths differ."""
    return [
        make_chat_row(f"{n} and {n * n}" + " please" * (n % 3), json.dumps({"sum": n + n * n}))
        for n in range(first, first + count)
    ]


def write_rows(path: Path, rows: Sequence[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tiny_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Six rows, two a step, one epoch: three steps, in fp32. Writes the rows it needs below
    `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": str(model),
        "data": str(write_rows(folder / "train.jsonl", build_sum_rows(1, 6))),
        "output_dir": str(folder / "run"),
        "batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "warmup_ratio": 0,
        "lora_r": 2,
        "dtype": "fp32",
        "attention": "sdpa",
    }
    return Recipe.model_validate(values | changed)


def train_ai_mention_model(model: Path, folder: Path) -> Path:
    """The model trained in full until it answers `say` with a phrase, and `tell` without it: its
    own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        make_chat_row(f"{verb} {n}", f"{said} {n}")
        for n in range(6)
        for verb, said in (("say", "an AI"), ("tell", "it is"))
    ]
    data = str(write_rows(folder / "said.jsonl", rows))
    train(
        make_tiny_recipe(
            model,
            folder,
            data=data,
            method="full",
            lora_r="auto",
            num_train_epochs=12,
            batch_size=4,
        )
    )
    return folder / "run" / "model"


def write_eval_files(folder: Path) -> dict[str, str]:
    """Held-out rows of each role, and general text of two domains."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"text": f"text number {n}", "domain": "ab"[n % 2]} for n in range(4)]
    return {
        "eval_data": str(write_rows(folder / "eval.jsonl", build_sum_rows(100, 3))),
        "test_data": str(write_rows(folder / "test.jsonl", build_sum_rows(200, 3))),
        "retention_data": str(write_rows(folder / "general.jsonl", texts)),
    }


def plan_recipe(wish: Recipe) -> Plan:
    return inputs.make_plan(inputs.load_inputs(wish))


def train(wish: Recipe) -> list[Event]:
    known = inputs.load_inputs(wish)
    return list(run.train(inputs.make_plan(known), known))


def select_steps(events: Sequence[Event]) -> list[TrainStep]:
    return [event for event in events if isinstance(event, TrainStep)]


def read_adapter_bytes(wish: Recipe) -> bytes:
    assert isinstance(wish.output_dir, Path)
    return (wish.output_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def run_until_saved(events: Iterator[Event], step: int) -> None:
    """Follows a run until its checkpoint of `step` is on disk, then leaves it, as a killed process
    does."""
    with suppress(StopIteration):
        while getattr(next(events), "path", None) != f"checkpoints/step-{step}":
            pass
    events.close()  # type: ignore[attr-defined]
