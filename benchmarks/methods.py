"""What methods and activation policies take: peak memory and speed of steps on one pack of random tokens.

    python -m benchmarks.methods [--model NAME] [--tokens 2048]

Each case runs in a process of its own, one after the other; prints a table with ratios to the first, whose frozen
weights are in the faster layouts as in a run. Peaks are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch

from tunesmith.data.batch import collate
from tunesmith.data.pack import pack_step
from tunesmith.hardware import peak_bytes
from tunesmith.model.adapters import METHODS, trainable
from tunesmith.model.load import adopt, load_network
from tunesmith.model.quantized import load_quantized, quantized_weights
from tunesmith.model.source import resolve
from tunesmith.train.losses import answer_loss
from tunesmith.train.optim import make_optimizer, moments, update
from tunesmith.types import Document

CASES = {
    "lora": {},
    "lora, selective": {"activations": "selective"},
    "lora, recompute": {"activations": "recompute"},
    "qlora": {"method": "qlora"},
    "dora": {"use_dora": True},
    "full": {"method": "full"},
    "full, 8-bit moments": {"method": "full", "optim": "adamw_8bit"},
}
ADAPTER = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "lora_target_modules": "all-linear",
}
STEPS = 4


def case(model: str, tokens: int, settings: dict[str, str | bool]) -> dict[str, float]:
    """One warm step, then the best of a few."""
    method, folder = str(settings.get("method", "lora")), resolve(model)
    network = (load_quantized if method == "qlora" else load_network)(folder, torch.bfloat16)
    METHODS[method](network, ADAPTER | {"seed": 0, "use_dora": settings.get("use_dora", False)})
    adopted = adopt(
        network,
        torch.bfloat16,
        "kernel",
        blocked=method == "lora",
        activations=str(settings.get("activations", "keep")),
    )
    parameters = trainable(network)
    optimizer = make_optimizer(parameters.values(), weight_decay=0, kind=str(settings.get("optim", "adamw")))
    (batch,) = (collate(pack) for pack in pack_step(documents(tokens, network.config.vocab_size), tokens))
    network.train()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        answer_loss(adopted, batch, float(tokens))["answer"].sum.div(tokens).backward()
        update(optimizer, 1e-5)
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    small = list(quantized_weights(network).values())
    return {
        "peak": peak_bytes(),
        "seconds": min(seconds[1:]),
        "moments": sum(t.nbytes for p in parameters.values() for t in moments(optimizer, p).values()),
        "matrices": sum(w.bytes for w in small) / (2 * sum(w.parameters for w in small)) if small else 1.0,
    }


def documents(tokens: int, vocabulary: int) -> list[Document]:
    """Of 256 tokens, the last quarter trained."""
    generator = np.random.default_rng(0)
    weights_L = (np.arange(257) >= 192).astype(np.float32)
    return [
        Document(f"random:{i}", generator.integers(0, vocabulary, 257).astype(np.int32), weights_L)
        for i in range(tokens // 256)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--case")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(case(given.model, given.tokens, CASES[given.case])))
        return
    print(
        "| case | tokens/s | speed | peak GB | peak | moments MB | matrices to 16 bits |\n|---|---|---|---|---|---|---|"
    )
    first: dict[str, float] = {}
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.methods", "--model", given.model, "--tokens", str(given.tokens)]
        done = subprocess.run([*command, "--case", name], capture_output=True, text=True, check=True)
        one = json.loads(done.stdout.splitlines()[-1])
        first = first or one
        print(
            f"| {name} | {given.tokens / one['seconds']:.0f} | {first['seconds'] / one['seconds']:.2f} | "
            f"{one['peak'] / 1e9:.2f} | {one['peak'] / first['peak']:.2f} | {one['moments'] / 1e6:.0f} | "
            f"{one['matrices']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
