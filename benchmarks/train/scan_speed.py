"""Compare the C kernels of recurrent mixers with the torch path, on packed layers.

    python -m benchmarks.train.scan_speed

The layers are those of Qwen3.5-0.8B, Qwen3.5-4B and Granite 4 Tiny: 1,024 tokens in six documents,
in bf16; then forward and backward of a network of four layers of Qwen3.5-0.8B, three of them
recurrent, with LoRA and a quarter of the tokens as targets. Both paths run in turns in one process.
Prints milliseconds of CPU time on one thread, the median of the rounds, and their ratio; of the
network also the share of the scan. CPU time suffers less from other work on the machine than the
clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from benchmarks.train.hybrid_speed import write_model
from benchmarks.vs_trl.job import LORA
from torch import Tensor

from tunesmith.core.types import Batch, PackLayout
from tunesmith.model.adapters import add_lora
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.mixers import scan
from tunesmith.model.mixers.scan import ScanInputs, ScanShape

LENGTHS = (300, 220, 180, 150, 110, 64)
ROUNDS = 7
NUM_TAPS = 4
LAYERS = {
    "Qwen3.5-0.8B": ScanShape(16, 1, 128, 128, is_delta_rule=True),
    "Qwen3.5-4B": ScanShape(16, 2, 128, 128, is_delta_rule=True),
    "Granite 4 Tiny": ScanShape(1, 48, 128, 64, is_delta_rule=False),
}


def make_layout() -> PackLayout:
    starts = tuple(sum(LENGTHS[:i]) for i in range(len(LENGTHS)))
    return PackLayout(starts, LENGTHS)


def make_inputs(shape: ScanShape, num_tokens: int) -> ScanInputs:
    channels = 2 * shape.num_groups * shape.key_size + shape.num_heads * shape.value_size
    skip_H = None if shape.is_delta_rule else torch.randn(shape.num_heads)
    return ScanInputs(
        mixed_TC=torch.randn(num_tokens, channels).bfloat16(),
        weight_CK=torch.randn(channels, NUM_TAPS).bfloat16(),
        bias_C=None if shape.is_delta_rule else torch.randn(channels).bfloat16(),
        decay_TH=-0.1 * torch.rand(num_tokens, shape.num_heads),
        beta_TH=torch.rand(num_tokens, shape.num_heads),
        skip_H=skip_H,
    )


def measure_milliseconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def list_passes(
    inputs: ScanInputs, shape: ScanShape, layout: PackLayout, dout_TV: Tensor
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return by pass: the kernels, the torch path."""
    arguments = (inputs, shape, layout)
    return {
        "forward": (
            lambda: scan._run_kernels(*arguments),
            lambda: scan._run_reference(*arguments),
        ),
        "backward": (
            lambda: scan._run_kernels_backward(dout_TV, *arguments, are_weights_trained=False),
            lambda: scan._run_reference_backward(dout_TV, *arguments, are_weights_trained=False),
        ),
    }


def compare(name: str, run_kernels: Callable[[], object], run_torch: Callable[[], object]) -> float:
    """Print a line; returns the milliseconds with the kernels."""
    run_kernels()
    run_torch()
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        ours.append(measure_milliseconds(run_kernels))
        theirs.append(measure_milliseconds(run_torch))
    fast = median(ours)
    slow = median(theirs)
    print(f"| {name} | {slow:.0f} ms | {fast:.0f} ms | {slow / fast:.1f}x |", flush=True)
    return fast


def compare_layers(layout: PackLayout) -> float:
    """Return the milliseconds of the first layer with the kernels."""
    totals: list[float] = []
    for name, shape in LAYERS.items():
        inputs = make_inputs(shape, layout.num_tokens)
        dout_TV = torch.randn(layout.num_tokens, shape.num_heads * shape.value_size).bfloat16()
        passes = list_passes(inputs, shape, layout, dout_TV).items()
        totals.append(sum(compare(f"{name}, {label}", *runs) for label, runs in passes))
    return totals[0]


def make_network(folder: Path) -> PackedCausalLM:
    write_model(folder, layers=4)
    network = load_network(folder, torch.bfloat16)
    add_lora(network, LORA)
    return wrap_model(network, torch.bfloat16, should_block_weights=True)


def make_batch(layout: PackLayout) -> Batch:
    tokens_T = torch.randint(0, 49_152, (layout.num_tokens,))
    positions_S = torch.arange(0, layout.num_tokens, 4)
    return Batch(
        tokens_T=tokens_T,
        positions_T=torch.cat([torch.arange(length) for length in layout.lengths]),
        layout=layout,
        positions_S=positions_S,
        targets_S=tokens_T[positions_S],
        weights_S=torch.ones(len(positions_S)),
        document_S=torch.zeros(len(positions_S), dtype=torch.long),
        ids=("",),
        real_tokens=layout.num_tokens,
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    layout = make_layout()
    print(f"{layout.num_tokens:,} tokens, medians of {ROUNDS} rounds:\n")
    print("| what | torch path | kernels | ratio |\n|---|---|---|---|")
    layer = compare_layers(layout)
    with TemporaryDirectory() as folder:
        model = make_network(Path(folder) / "qwen3.5")
        batch = make_batch(layout)

        def run_step() -> None:
            hidden_SH = model.compute_hidden(batch)
            (hidden_SH @ model.head.weight.t()).float().logsumexp(-1).sum().backward()

        def run_step_in_torch() -> None:
            with patch.object(scan.kernels, "is_supported", return_value=False):
                run_step()

        step = compare("4 layers of Qwen3.5-0.8B, step", run_step, run_step_in_torch)
    print(f"the scan is {3 * layer / step:.0%} of the step with kernels")


if __name__ == "__main__":
    main()
