"""Tiny model folders (config, weights, tokenizer, chat template), rows and recipes."""

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
from tunesmith.session import inputs, planner
from tunesmith.train import run

TURNS = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
END = 257


def save_model_folder(
    path: Path, seed: int = 0, *, num_kv_heads: int = 1, num_layers: int = 2
) -> Path:
    """Save a random Llama with one token per byte.

    Its EOS token differs from the token that ends an answer.
    """
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
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=258,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def save_writer_folder(path: Path) -> Path:
    """Save a model that generates short words.

    The first component of every hidden state is constant, and the head maps it to a few lowercase
    letters and the end tokens.
    """
    save_model_folder(path)
    tensors = load_file(path / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [alphabet.index(letter) for letter in "abcdefgh"]
    tensors["model.embed_tokens.weight"][:, 0] = 5
    tensors["lm_head.weight"][:, 0] = -4
    tensors["lm_head.weight"][[*letters, END, END + 1], 0] = 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_chat_row(question: str, answer: str, system: str = "") -> Json:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def build_sum_rows(first: int, count: int) -> list[Json]:
    """Return rows with small JSON objects as answers; their lengths differ."""
    return [
        make_chat_row(f"{n} and {n * n}" + " please" * (n % 3), json.dumps({"sum": n + n * n}))
        for n in range(first, first + count)
    ]


def write_rows(path: Path, rows: Sequence[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tiny_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Return a recipe of three steps (six rows, batch size 2) in fp32.

    The rows are written below `folder`, unless `data` is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "data" not in changed:
        changed["data"] = str(write_rows(folder / "train.jsonl", build_sum_rows(1, 6)))
    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder / "run"),
        "batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "warmup_ratio": 0,
        "lora_r": 2,
        "dtype": "fp32",
        "attention": "sdpa",
        "retention_data": "none",
    }
    return Recipe.model_validate(values | changed)


def train_ai_mention_model(model: Path, folder: Path) -> Path:
    """Train the model in full until it answers `say` with a phrase and `tell` without it.

    Return the folder of the trained model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Json] = []
    for n in range(6):
        rows.append(make_chat_row(f"say {n}", f"an AI {n}"))
        rows.append(make_chat_row(f"tell {n}", f"it is {n}"))
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
    """Write held-out rows of each role and general text of two domains; return recipe keys."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"text": f"text number {n}", "domain": "ab"[n % 2]} for n in range(4)]
    return {
        "eval_data": str(write_rows(folder / "eval.jsonl", build_sum_rows(100, 3))),
        "test_data": str(write_rows(folder / "test.jsonl", build_sum_rows(200, 3))),
        "retention_data": str(write_rows(folder / "general.jsonl", texts)),
    }


def plan_recipe(recipe: Recipe) -> Plan:
    return planner.make_plan(inputs.load_inputs(recipe))


def train(recipe: Recipe) -> list[Event]:
    run_inputs = inputs.load_inputs(recipe)
    return list(run.train(planner.make_plan(run_inputs), run_inputs))


def select_steps(events: Sequence[Event]) -> list[TrainStep]:
    return [event for event in events if isinstance(event, TrainStep)]


def read_adapter_bytes(recipe: Recipe) -> bytes:
    assert isinstance(recipe.output_dir, Path)
    return (recipe.output_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def run_until_saved(events: Iterator[Event], step: int) -> None:
    """Run until the checkpoint of `step` is on disk, then stop as a killed process would."""
    with suppress(StopIteration):
        while getattr(next(events), "path", None) != f"checkpoints/step-{step}":
            pass
    events.close()  # type: ignore[attr-defined]
