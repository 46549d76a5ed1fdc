"""Measure peak memory and speed of training methods and gradient checkpointing.

    python -m benchmarks.train.methods [--model NAME | --shape 1b] [--tokens 2048] [--cases C ...]

Each case runs steps on a pack of random tokens in its own process; the table has ratios to the
first case. Peaks are of the process, loading included. `--shape 1b` is a random Llama with the
shape of Llama-3.2-1B, large enough for differences in memory. The last two cases are PEFT's LoRA on
the transformers network in bf16 or bitsandbytes' NF4, with torch's AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tunesmith.core.hardware import read_peak_bytes
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.quantization import find_quantized_weights, load_quantized
from tunesmith.train.losses import sft_loss
from tunesmith.train.optimizer import (
    OptimizerInBackward,
    get_moments,
    make_optimizer,
    step_optimizer,
)

CASES = {
    "lora": {},
    "lora, selective": {"gradient_checkpointing": "selective"},
    "lora, recompute": {"gradient_checkpointing": "full"},
    "qlora": {"method": "qlora"},
    "dora": {"use_dora": True},
    "full": {"method": "full"},
    "full, step in backward": {"method": "full", "step_in_backward": True},
    "full, 8-bit moments": {"method": "full", "optim": "adamw_8bit"},
    "full, 8-bit moments, step in backward": {
        "method": "full",
        "optim": "adamw_8bit",
        "step_in_backward": True,
    },
    "peft lora": {"peft": True},
    "peft qlora": {"peft": True, "method": "qlora"},
}
ADAPTER = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "lora_target_modules": "all-linear",
}
STEPS = 4
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def measure_peft(folder: Path, tokens: int, *, four_bits: bool) -> dict[str, float]:
    """Run PEFT with default settings: a batch of documents of 256 tokens, without padding."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    more = {"quantization_config": quantization} if four_bits else {}
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    network = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True
    )
    rows = make_documents(tokens, network.config.vocab_size)
    ids_BL = torch.tensor(np.stack([row.tokens_L[:-1] for row in rows]), dtype=torch.long)
    labels_BL = torch.where(
        torch.tensor(np.stack([row.weights_L[:-1] for row in rows])) > 0, ids_BL, -100
    )
    network.train()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        network(input_ids=ids_BL, labels=labels_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    moments_bytes = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    return {
        "peak": read_peak_bytes(),
        "seconds": min(seconds[1:]),
        "moments": moments_bytes,
        "matrices": math.nan,
    }


def measure_case(model: str, tokens: int, settings: dict[str, str | bool]) -> dict[str, float]:
    """Run a case: a warm-up step, then the best of a few."""
    method, folder = str(settings.get("method", "lora")), resolve_model(model)
    if settings.get("peft"):
        return measure_peft(folder, tokens, four_bits=method == "qlora")
    network = (load_quantized if method == "qlora" else load_network)(folder, torch.bfloat16)
    METHODS[method](network, ADAPTER | {"seed": 0, "use_dora": settings.get("use_dora", False)})
    model_wrapper = wrap_model(
        network,
        torch.bfloat16,
        "cpu_kernel",
        should_block_weights=method == "lora",
        gradient_checkpointing=str(settings.get("gradient_checkpointing", "none")),
    )
    parameters = get_trainable_parameters(network)
    optimizer = make_optimizer(
        parameters.values(), weight_decay=0, kind=str(settings.get("optim", "adamw"))
    )
    (batch,) = (
        collate(pack)
        for pack in pack_step(make_documents(tokens, network.config.vocab_size), tokens)
    )
    network.train()
    in_backward = (
        OptimizerInBackward(optimizer, parameters) if settings.get("step_in_backward") else None
    )
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        loss = sft_loss(model_wrapper, batch, float(tokens))["answer"].sum.div(tokens)
        with in_backward.updating(step, 1e-5) if in_backward else nullcontext():
            loss.backward()
        if in_backward is None:
            step_optimizer(optimizer, 1e-5)
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    quantized = list(find_quantized_weights(network).values())
    return {
        "peak": read_peak_bytes(),
        "seconds": min(seconds[1:]),
        "moments": sum(
            t.nbytes for p in parameters.values() for t in get_moments(optimizer, p).values()
        ),
        "matrices": sum(w.nbytes for w in quantized)
        / (2 * sum(w.num_parameters for w in quantized))
        if quantized
        else 1.0,
    }


def make_documents(tokens: int, vocabulary: int) -> list[Document]:
    """Return random documents of 256 tokens; the last quarter is supervised."""
    generator = np.random.default_rng(0)
    weights_L = (np.arange(257) >= 192).astype(np.float32)
    return [
        Document(f"random:{i}", generator.integers(0, vocabulary, 257).astype(np.int32), weights_L)
        for i in range(tokens // 256)
    ]


def write_random_model(folder: Path) -> str:
    """Write random weights with the shape of Llama-3.2-1B, without a tokenizer."""
    config = LlamaConfig(**SHAPE_1B)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=["1b"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure_case(args.model, args.tokens, CASES[args.case])))
        return
    with TemporaryDirectory() as scratch:
        print_comparison(
            write_random_model(Path(scratch)) if args.shape else args.model, args.tokens, args.cases
        )


def print_comparison(model: str, tokens: int, cases: Sequence[str]) -> None:
    print(
        "| case | tokens/s | speed | peak GB | peak | moments MB | matrices to 16 bits |\n"
        "|---|---|---|---|---|---|---|"
    )
    first: dict[str, float] = {}
    for name in cases:
        command = [
            sys.executable,
            "-m",
            "benchmarks.train.methods",
            "--model",
            model,
            "--tokens",
            str(tokens),
        ]
        done = subprocess.run([*command, "--case", name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        first = first or result
        print(
            f"| {name} | {tokens / result['seconds']:.0f} "
            f"| {first['seconds'] / result['seconds']:.2f} "
            f"| {result['peak'] / 1e9:.2f} | {result['peak'] / first['peak']:.2f} "
            f"| {result['moments'] / 1e6:.0f} | {result['matrices']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
