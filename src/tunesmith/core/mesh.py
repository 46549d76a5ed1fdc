"""The machine of a plan, and how the GPUs of a cluster share a run.

    Machine      the hardware and software, measured or of a target
    Mesh         which GPUs hold a copy of the weights together, and which share a document
    MeshPlan     the mesh of a target, and whether several of its GPUs pay

Plain values only. Left out: measuring (hardware.py) and deciding (plan/mesh.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Machine:
    """The hardware and software of this machine."""

    device: Literal["cpu", "cuda"]
    device_name: str
    cores: int
    memory_bytes: int  # of the GPU, or main memory
    available_bytes: int  # free now
    disk_free_bytes: int
    has_bf16_matmul: bool  # in hardware
    compiler: str | None  # path of a C compiler, for the CPU kernels
    versions: dict[str, str] = field(default_factory=dict[str, str])
    num_gpus: int = 0  # that torch sees; of a target, those of a node
    num_nodes: int = 0  # of a target; 0 for this machine
    has_peer_access: bool = False  # whether the GPU reads from another one's memory
    gpu_software: str = ""  # CUDA 12.8, ROCm 6.4
    compute_capability: str = ""  # of an NVIDIA GPU: 9.0
    has_python_headers: bool = True  # which Triton compiles with
    unused_gpu: str = ""  # why a GPU of this machine is not used

    @property
    def has_flash_attention(self) -> bool:
        """Whether torch's flash attention runs on the GPU; on AMD's that is not known."""
        is_cuda = self.device == "cuda" and not self.gpu_software.startswith("ROCm")
        return is_cuda and self.has_bf16_matmul


@dataclass(frozen=True)
class Mesh:
    """`num_gpus` GPUs in `num_nodes` nodes. `shard` of them hold the weights together once, and
    `context` of them share each document."""

    num_gpus: int = 1  # in all nodes
    num_nodes: int = 1
    shard: int = 1
    context: int = 1

    @property
    def replicate(self) -> int:
        """Copies of the weights."""
        return self.num_gpus // self.shard

    @property
    def document_groups(self) -> int:
        """Groups of GPUs that have documents of their own."""
        return self.num_gpus // self.context

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes


SINGLE_GPU = Mesh()


@dataclass(frozen=True)
class MeshOption:
    """The plan on one GPU of the target, or on all."""

    target: str  # 8xh100
    gradient_checkpointing: str
    peak_bytes: int  # of a GPU
    has_enough_memory: bool
    seconds: tuple[float, ...] = ()  # of training: the lower and the upper bound


@dataclass(frozen=True)
class MeshPlan:
    """The mesh of a target, and one of its GPUs compared with all."""

    mesh: Mesh
    options: tuple[MeshOption, ...] = ()
