"""Measure the matrix-product rate for the shapes of a model, the upper bound of training speed.

python -m benchmarks.vs_trl.gemm MODEL_FOLDER SECONDS      seconds per product
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from benchmarks.vs_trl.job import count_threads

from tunesmith.core.types import Json, ModelSpec
from tunesmith.model.hub.spec import read_spec

M = 2048  # rows of the input: tokens of a pack


def list_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Return the distinct (outputs, inputs) of the model's matrices."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = [
        (q, hidden),
        (kv, hidden),
        (hidden, q),
        (inner, hidden),
        (hidden, inner),
        (spec.vocab_size, hidden),
    ]
    return list(dict.fromkeys(shapes))


def measure_best_seconds(product: Callable[[], object], seconds: float) -> float:
    product()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        product()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return best


def measure_rates(spec: ModelSpec, seconds: float) -> dict[str, float]:
    """Return the best bf16 FLOP/s of forward and input gradient for every shape."""
    rates: dict[str, float] = {}
    for outputs, inputs in list_shapes(spec):
        weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(M, inputs).bfloat16()
        dy = torch.randn(M, outputs).bfloat16()
        products = {
            "forward": partial(torch.nn.functional.linear, x, weight),
            "input gradient": partial(torch.matmul, dy, weight),
        }
        for name, product in products.items():
            work = 2 * M * outputs * inputs
            rates[f"{inputs} -> {outputs}, {name}"] = work / measure_best_seconds(product, seconds)
    return rates


def measure(model: str, seconds: float) -> Json:
    torch.set_num_threads(count_threads())
    rates = measure_rates(read_spec(Path(model)), seconds)
    return {"median": median(rates.values()), "rates": rates, "m": M}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
