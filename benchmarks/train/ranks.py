"""What ranks cost on a CPU: processor time of two processes of one core against one of two threads.

    python -m benchmarks.train.ranks

Trains the same steps of a model of random weights both ways, in turns, and prints the ratio of
processor times: all that the ranks compute twice, and what they say to each other. Time by the
clock would show what else the machine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np

STEPS = 6
WARMUP_STEPS = 2
ROWS = 16
ROUNDS = 2


def measure() -> None:
    """Print the processor seconds of this rank's steps, and their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunesmith.core.ranks import open_ranks
    from tunesmith.core.types import Document, PlanConfig
    from tunesmith.model.adapters import METHODS
    from tunesmith.model.causal_lm import wrap_model
    from tunesmith.train.loop import TrainingLoop

    sys.path.insert(0, "tests/helpers")
    from plan_configs import make_config

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = {
        "lora_r": 16,
        "lora_alpha": 32,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "use_dora": False,
        "seed": 0,
        "lora_target_modules": "all-linear",
    }
    network.requires_grad_(False)
    METHODS["lora"](network, settings)
    model = wrap_model(network, torch.bfloat16, "auto")
    plan: PlanConfig = make_config(pack_length=4096, learning_rate=1e-4, seed=0)

    def make_documents(step: int) -> list[Document]:
        generator = np.random.default_rng(step)
        documents: list[Document] = []
        for row in range(ROWS):
            length = int(generator.integers(100, 500))
            weights_L = np.zeros(length, np.float32)
            weights_L[length * 2 // 3 :] = 1
            tokens_L = generator.integers(0, 8192, length).astype(np.int32)
            documents.append(Document(f"{step}.{row}", tokens_L, weights_L))
        return documents

    with open_ranks() as ranks:
        ranks.send = lambda *_, **__: None  # every rank iterates by itself
        training = TrainingLoop(model, make_documents, plan, steps=STEPS, ranks=ranks)
        for _ in range(WARMUP_STEPS):
            next(training)
        started = time.process_time()
        tokens = sum(getattr(event, "tokens", 0) for event in training)
        seconds = time.process_time() - started
        total = sum(ranks.gather(seconds))
        if ranks.is_main:
            print(json.dumps({"tokens": tokens, "seconds": total}))


def run_processes(num_processes: int) -> float:
    """Return the tokens per second of processor time of all processes."""
    command = [sys.executable, "-m", "benchmarks.train.ranks", "--measure"]
    if num_processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        command = [sys.executable, "-m", *torchrun, "-m", "benchmarks.train.ranks", "--measure"]
    threads = {"OMP_NUM_THREADS": str(2 // num_processes), "OMP_WAIT_POLICY": "passive"}
    output = subprocess.run(
        command, env=os.environ | threads, check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(output.strip().splitlines()[-1])
    return result["tokens"] / result["seconds"]


def main() -> None:
    ratios: list[float] = []
    for _ in range(ROUNDS):
        single = run_processes(1)
        double = run_processes(2)
        ratios.append(double / single)
        print(f"1 process, 2 threads {single:8.0f} tokens per processor second")
        print(f"2 processes, 1 core  {double:8.0f} tokens per processor second")
    print("ratio " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
