"""Run a Work as tunesmith does: the loop of every run, and the settings that a plan chooses.

    python -m benchmarks.gpu.tunesmith_side WORK

WORK is a Work as JSON. Kernels are those of one step, counted by torch's profiler; the peak is the
memory that torch has reserved, beside what `tunesmith plan` predicts without the CUDA context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.work import (
    ALPHA,
    RANK,
    Clock,
    Result,
    Work,
    make_documents,
    parse_work,
    print_result,
)
from benchmarks.vs_trl.job import LORA
from benchmarks.vs_trl.tunesmith_side import make_loop_config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.hardware import read_peak_bytes, release_memory, set_allocator
from tunesmith.core.types import Document, ModelSpec, PlanConfig
from tunesmith.model.adapters import METHODS, find_linears, replace_module
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.lora import QuantizedLinear
from tunesmith.plan.flops import compute_target_flops, compute_token_flops
from tunesmith.plan.hardware_presets import HARDWARE_PRESETS
from tunesmith.plan.memory import Footprint, estimate_gpu_memory
from tunesmith.train.loop import TrainingLoop

SETTINGS = LORA | {"lora_r": RANK, "lora_alpha": ALPHA}
POLICIES = ("none", "selective", "full")
MANY_STEPS = 10**6


def make_config(work: Work) -> PlanConfig:
    """Return the settings of the work."""
    return make_loop_config(
        method=work.method,
        max_length=work.pack_tokens,
        pack_length=work.pack_tokens,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        attention="auto",
        share_prefixes=False,
        weight_layout="plain",
    )


def make_model(work: Work, policy: str) -> PackedCausalLM:
    with torch.device(work.device):
        config = AutoConfig.from_pretrained(work.folder)
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.eval().requires_grad_(False)
    if work.method == "qlora":
        for path, linear in find_linears(network).items():
            quantized = QuantizedLinear(linear.weight, linear.bias, torch.bfloat16)
            replace_module(network, path, quantized)
    METHODS["lora"](network, SETTINGS)
    return wrap_model(network, torch.bfloat16, gradient_checkpointing=policy)


def predict_bytes(spec: ModelSpec, work: Work, policy: str) -> int:
    parts = estimate_gpu_memory(
        spec,
        Footprint(work.method, "bf16", rank=RANK, gradient_checkpointing=policy),
        pack_tokens=work.pack_tokens,
    )
    return parts.peak - parts.context


def choose_policy(spec: ModelSpec, work: Work) -> tuple[str, int]:
    """Return the first policy that fits, and the bytes that it is predicted to take."""
    free_bytes = torch.cuda.mem_get_info()[0] if work.device == "cuda" else 2**62
    for policy in POLICIES:
        predicted = predict_bytes(spec, work, policy)
        if predicted <= free_bytes:
            break
    return policy, predicted


def compute_step_flops(spec: ModelSpec, method: str, documents: list[Document]) -> float:
    """Return the operations of a step that are needed; recomputed activations are not counted."""
    tokens = sum(len(document) - 1 for document in documents)
    targets = sum(int(document.weights_L.sum()) for document in documents)
    token_flops = compute_token_flops(spec, method, "none", RANK)
    return tokens * token_flops + targets * compute_target_flops(spec, method)


def find_rate(work: Work) -> float:
    """Return the bf16 operations per second of the card's data sheet, 0 if it is none of ours."""
    if work.device != "cuda":
        return 0.0
    name = torch.cuda.get_device_name().replace(" ", "").replace("-", "").lower()
    cards = {key.partition("-")[0]: preset for key, preset in HARDWARE_PRESETS.items()}
    named = [card for card in cards if card in name]
    return cards[max(named, key=len)].flops if named else 0.0  # an L40S is no L4


def count_kernels(loop: TrainingLoop) -> int:
    """Return the kernels of one step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        next(loop)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def run(work: Work) -> Result:
    set_allocator()
    spec = read_spec(Path(work.folder))
    documents = make_documents(work)
    policy, predicted = choose_policy(spec, work)
    model = make_model(work, policy)
    release_memory()  # of weights in 16 bits, before those in 4 bits
    loop = TrainingLoop(model, lambda _step: documents, make_config(work), steps=MANY_STEPS)
    clock = Clock(work)
    while True:
        next(loop)
        if clock.finish_step():
            break
    peak_bytes = read_peak_bytes(work.device)
    tokens = sum(len(document) - 1 for document in documents)
    rate = find_rate(work)
    tokens_per_second = clock.compute_rate(tokens)
    flops = compute_step_flops(spec, work.method, documents) / tokens * tokens_per_second
    return Result(
        tokens_per_second=tokens_per_second,
        kernels=count_kernels(loop) if work.device == "cuda" else 0,
        peak_bytes=peak_bytes,
        predicted_bytes=predicted,
        utilization=flops / rate if rate else 0.0,
    )


if __name__ == "__main__":
    print_result(run(parse_work(sys.argv[1])))
