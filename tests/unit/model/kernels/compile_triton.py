"""Compile what ops launch for GPUs that are not there, and read what the machine code needs.

    python compile_triton.py FOLDER CAPABILITY...     writes FOLDER/compiled.json

The operations run on CPU tensors with the shapes of an 8B model; each launch is compiled instead,
with its own sizes of blocks, as Triton specializes it on a GPU: pointers and sizes are multiples of
16. Each kernel is compiled once per width and GPU."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tunesmith.model.kernels import triton_ops

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}
BF16 = torch.bfloat16


class Launches:
    """What was launched: kernel, types, constants, numbers of 16, warps."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[ASTSource, int]] = {}

    def record(self, function: Any, *args: Any, **kwargs: Any) -> None:
        del kwargs["grid"], kwargs["warmup"]
        warps = kwargs.pop("num_warps")
        values = dict(zip(function.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for index, name in enumerate(function.arg_names):
            value = values[name]
            if name.isupper() or value is None:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            signature[name] = TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(function, signature, constants, attributes)
        self.sources[f"{function.__name__} {signature} {constants}"] = (source, warps)


def launch_all(width: int, mlp_width: int, head_size: int, vocab_size: int) -> None:
    """Run each operation, forward and backward, on a few rows."""
    x, residual = torch.zeros(2, 16, width, dtype=BF16)
    x.requires_grad_()
    weight = torch.ones(width, dtype=BF16, requires_grad=True)
    y, total = triton_ops.add_rms_norm(x, residual, weight, 1e-6)
    (y + total).sum().backward()
    heads = torch.zeros(16, width // head_size, head_size, dtype=BF16, requires_grad=True)
    triton_ops.rms_norm(heads, torch.ones(head_size, dtype=BF16), 1e-6).sum().backward()
    tables = torch.zeros(2, 16, head_size // 2)
    triton_ops.rotate(heads.detach(), *tables, 1.0)
    gate, up = torch.zeros(2, 16, mlp_width, dtype=BF16)
    for is_gelu in (False, True):
        triton_ops.gated_activation(gate, up, is_gelu)
        triton_ops.gated_activation_backward(gate, up, gate, is_gelu)
    logits = torch.zeros(16, vocab_size, dtype=BF16)
    targets = torch.zeros(16, dtype=torch.int64)
    triton_ops.cross_entropy(logits, targets, torch.ones(16), 1.0, 30.0)
    triton_ops.kl_divergence(logits, logits, targets, 1.0, 30.0)
    triton_ops.mix_rows(heads.detach(), heads.detach(), torch.ones(heads.shape[:2]))
    triton_ops.scale_columns_backward(gate, up, torch.ones(mlp_width))
    triton_ops.scale_columns(gate, torch.ones(mlp_width))


def compile_for(source: ASTSource, warps: int, capability: int) -> dict[str, Any]:
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "kernel": source.fn.__name__,
        "capability": capability,
        "threads": 32 * warps,
        "shared": compiled.metadata.shared,
        **{name: int(number) for name, number in numbers.items()},
    }


def main(folder: Path, capabilities: list[int]) -> None:
    found: dict[str, Any] = {"kernels": []}
    if not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists():
        found = {"problem": "this triton has no ptxas"}
    else:
        launches = Launches()
        JITFunction.run = lambda self, *args, **kwargs: launches.record(self, *args, **kwargs)
        launch_all(width=4096, mlp_width=12288, head_size=128, vocab_size=151936)
        for source, warps in launches.sources.values():
            for capability in capabilities:
                found["kernels"].append(compile_for(source, warps, capability))
    (folder / "compiled.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(capability) for capability in sys.argv[2:]])
