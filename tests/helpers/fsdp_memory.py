"""The memory of FSDP2 on one of eight ranks that are not there, by method and kind, as JSON.

Tensors are fake and the process group answers at once, so nothing is computed and nothing is sent.
The network has the linears of a dense model, an adapter beside each, which is not sharded, and
recomputes its layers; it stands for ours, whose frozen weights are no parameters yet."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

NUM_RANKS = 8
NUM_LAYERS = 6
HIDDEN_SIZE = 1024
MLP_SIZE = 4096
NUM_TOKENS = 64
RANK = 16


class AdaptedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, is_trained: bool) -> None:
        super().__init__()
        dtype = torch.float32 if is_trained else torch.bfloat16
        weight = torch.empty(outputs, inputs, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=is_trained)
        self.lora_A = None if is_trained else nn.Parameter(torch.empty(RANK, inputs))
        self.lora_B = None if is_trained else nn.Parameter(torch.empty(outputs, RANK))

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = nn.functional.linear(x_TI, self.weight)
        if self.lora_A is None or self.lora_B is None:
            return y_TO
        return y_TO + x_TI @ self.lora_A.to(x_TI.dtype).T @ self.lora_B.to(x_TI.dtype).T


class RecomputedLayer(nn.Module):
    def __init__(self, *, is_trained: bool) -> None:
        super().__init__()
        shapes = [(HIDDEN_SIZE, HIDDEN_SIZE)] * 4 + [(HIDDEN_SIZE, MLP_SIZE)] * 2
        shapes.append((MLP_SIZE, HIDDEN_SIZE))
        self.linears = nn.ModuleList(
            AdaptedLinear(*shape, is_trained=is_trained) for shape in shapes
        )

    def compute(self, x_TH: Tensor) -> Tensor:
        q, k, v, o, gate, up, down = self.linears
        x_TH = x_TH + o(q(x_TH) * k(x_TH) * v(x_TH))
        return x_TH + down(nn.functional.silu(gate(x_TH)) * up(x_TH))

    def forward(self, x_TH: Tensor) -> Tensor:
        return checkpoint(self.compute, x_TH, use_reentrant=False)


def track_step(*, is_full: bool) -> dict[str, int]:
    """Return the bytes by kind at the peak of the second step, when the optimizer has its state."""
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    with FakeTensorMode():
        network = nn.Sequential(*(RecomputedLayer(is_trained=is_full) for _ in range(NUM_LAYERS)))
        adapters = {value for name, value in network.named_parameters() if "lora_" in name}
        how: dict[str, Any] = {"mesh": mesh, "ignored_params": adapters}
        if is_full:
            dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
            how["mp_policy"] = MixedPrecisionPolicy(**dtypes)
        for layer in (*network, network):
            fully_shard(layer, **how)
        trained = list(network.parameters()) if is_full else list(adapters)
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
        inputs = torch.randn(NUM_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16)
        tracker = FSDPMemTracker(network, optimizer)
        tracker.track_inputs((inputs,))
        with tracker:
            for _ in range(2):
                network(inputs).float().pow(2).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        (kinds,) = tracker.get_tracker_snapshot("peak").values()
    return {str(kind).rpartition(".")[2]: num_bytes for kind, num_bytes in kinds.items()}


if __name__ == "__main__":
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    kinds_by_method = {name: track_step(is_full=name == "full") for name in ("lora", "full")}
    sys.stdout.write(json.dumps(kinds_by_method))
