"""Compile what ops launch for GPUs that are not there, and read what the machine code needs.

    python compile_triton.py FOLDER SHAPES CAPABILITY...     writes FOLDER/compiled.json

The operations run on CPU tensors with the shapes of an 8B model, or of odd ones; each launch is
compiled instead, with its own sizes of blocks, as Triton specializes it on a GPU: for pointers and
sizes that are multiples of 16, and for sizes of 1, which become constants. Each kernel is compiled
once per width and GPU."""

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
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}
# name: sizes of launch_all
SHAPES: dict[str, list[dict[str, Any]]] = {
    "8B": [
        {
            "width": 4096,
            "mlp_width": 12288,
            "head_size": 128,
            "vocab_size": 151936,
            "dtype": torch.bfloat16,
            "rows": 16,
        }
    ],
    # one head of no power of two, one row, a vocabulary that is no multiple of a block
    "odd": [
        {
            "width": 70,
            "mlp_width": 90,
            "head_size": 70,
            "vocab_size": 5001,
            "dtype": dtype,
            "rows": 1,
        }
        for dtype in (torch.float32, torch.float16)
    ],
}


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
            is_one = isinstance(value, int) and value == 1
            if name.isupper() or value is None or is_one:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            signature[name] = TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(function, signature, constants, attributes)
        self.sources[f"{function.__name__} {signature} {constants}"] = (source, warps)


def launch_all(
    *,
    width: int,
    mlp_width: int,
    head_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    rows: int,
) -> None:
    """Run each operation, forward and backward, on a few rows."""
    x, residual = torch.zeros(2, rows, width, dtype=dtype)
    x.requires_grad_()
    weight = torch.ones(width, dtype=dtype, requires_grad=True)
    y, total = triton_ops.add_rms_norm(x, residual, weight, 1e-6)
    (y + total).sum().backward()
    heads = torch.zeros(rows, width // head_size, head_size, dtype=dtype, requires_grad=True)
    triton_ops.rms_norm(heads, torch.ones(head_size, dtype=dtype), 1e-6).sum().backward()
    tables = torch.zeros(2, rows, head_size // 2)
    triton_ops.rotate(heads.detach(), *tables, 1.0)
    gate, up = torch.zeros(2, rows, mlp_width, dtype=dtype)
    for is_gelu in (False, True):
        triton_ops.gated_activation(gate, up, is_gelu)
        triton_ops.gated_activation_backward(gate, up, gate, is_gelu)
    logits = torch.zeros(rows, vocab_size, dtype=dtype)
    targets = torch.zeros(rows, dtype=torch.int64)
    triton_ops.cross_entropy(logits, targets, torch.ones(rows), 1.0, 30.0)
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


def main(folder: Path, shapes: str, capabilities: list[int]) -> None:
    found: dict[str, Any] = {"kernels": []}
    if not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists():
        found = {"problem": "this triton has no ptxas"}
    else:
        launches = Launches()
        JITFunction.run = lambda self, *args, **kwargs: launches.record(self, *args, **kwargs)
        for sizes in SHAPES[shapes]:
            launch_all(**sizes)
        for source, warps in launches.sources.values():
            for capability in capabilities:
                found["kernels"].append(compile_for(source, warps, capability))
    (folder / "compiled.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(capability) for capability in sys.argv[3:]])
