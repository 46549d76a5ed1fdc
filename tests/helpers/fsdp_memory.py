"""The memory of FSDP2 on one of eight ranks that are not there, by kind, as JSON.

Tensors are fake and the process group answers at once, so nothing is computed and nothing is sent.
The network has the linears of a dense model, an adapter beside each, which is not sharded, and
recomputes its layers."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

NUM_RANKS = 8
NUM_LAYERS = 6
HIDDEN_SIZE = 1024
MLP_SIZE = 4096
NUM_TOKENS = 64
RANK = 16


class AdaptedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(torch.empty(RANK, inputs))
        self.lora_B = nn.Parameter(torch.empty(outputs, RANK))

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = nn.functional.linear(x_TI, self.weight)
        return y_TO + x_TI @ self.lora_A.to(x_TI.dtype).T @ self.lora_B.to(x_TI.dtype).T


class RecomputedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = [(HIDDEN_SIZE, HIDDEN_SIZE)] * 4 + [(HIDDEN_SIZE, MLP_SIZE)] * 2
        shapes.append((MLP_SIZE, HIDDEN_SIZE))
        self.linears = nn.ModuleList(AdaptedLinear(*shape) for shape in shapes)

    def compute(self, x_TH: Tensor) -> Tensor:
        q, k, v, o, gate, up, down = self.linears
        x_TH = x_TH + o(q(x_TH) * k(x_TH) * v(x_TH))
        return x_TH + down(nn.functional.silu(gate(x_TH)) * up(x_TH))

    def forward(self, x_TH: Tensor) -> Tensor:
        return checkpoint(self.compute, x_TH, use_reentrant=False)


def track_step() -> dict[str, int]:
    """Return the bytes by kind at the peak of the second step, when the optimizer has its state."""
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    with FakeTensorMode():
        network = nn.Sequential(*(RecomputedLayer() for _ in range(NUM_LAYERS)))
        adapters = {value for name, value in network.named_parameters() if "lora_" in name}
        how: dict[str, Any] = {"mesh": mesh, "ignored_params": adapters}
        for layer in (*network, network):
            fully_shard(layer, **how)
        optimizer = torch.optim.AdamW(list(adapters), lr=1e-3, foreach=False)
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
    sys.stdout.write(json.dumps(track_step()))
