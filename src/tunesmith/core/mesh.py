"""The machine of a plan, and how the GPUs of a cluster share a run.

    Machine      the hardware and software, measured or of a target
    Mesh         which GPUs hold a copy of the weights together, and which share a document
    MeshStep     the predicted time of a step by part, and the tokens per second
    MeshOption   the same recipe on other GPUs or with another method
    MeshPlan     all of them, with the reasons
    DryRun       what a step on several processes was counted to take, beside the prediction

Plain values only. Left out: measuring (hardware.py), deciding (plan/mesh.py) and predicting
(plan/mesh_time.py)."""

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
class MeshChoice:
    """A number of the mesh, and why it is so."""

    name: str
    value: int
    reason: str


@dataclass(frozen=True)
class MeshStep:
    """The predicted time of an optimizer step, in seconds. Pairs are bounds: at the high and at the
    low end of the published shares of the bf16 rate."""

    tokens: int  # of all GPUs
    gpu_tokens: int  # of the GPU that has most
    compute_seconds: tuple[float, float]  # of the GPU that has most
    gather_seconds: float  # of sharded weights
    exchange_seconds: float  # between the GPUs that share a document
    reduce_seconds: float  # sum of the gradients
    seconds: tuple[float, float]
    busy_share: float  # of the step in which the GPUs compute, on average

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Tokens per second of all GPUs: the lower and the upper bound."""
        return self.tokens / self.seconds[1], self.tokens / self.seconds[0]


@dataclass(frozen=True)
class BatchAdvice:
    """The batch that would keep the GPUs busy, and what follows from it."""

    batch_size: int  # rows, or tokens in continued pretraining; 0: no batch of this data does
    learning_rate: float
    steps: int
    busy_share: float
    # where the learning rate comes from; as in plans of runs that do not say it
    rate_reason: str = "grown with the square root of the batch"


@dataclass(frozen=True)
class MeshOption:
    """The same recipe on other GPUs, or with another method."""

    target: str  # 4xh100
    method: str
    gradient_checkpointing: str
    mesh: Mesh
    peak_bytes: int  # of a GPU
    has_enough_memory: bool
    tokens_per_second: tuple[float, float]
    missing: str  # what this version lacks to run it; empty if it runs


@dataclass(frozen=True)
class MeshPlan:
    """The mesh of a plan with its reasons, its time, and what else there is."""

    mesh: Mesh
    choices: tuple[MeshChoice, ...]
    step: MeshStep
    batch: BatchAdvice | None  # None if the batch of the plan keeps the GPUs busy
    missing: str  # what this version lacks to run it; empty if it runs
    command: str  # that starts it; on each node, if there are several
    options: tuple[MeshOption, ...] = ()


@dataclass(frozen=True)
class RankMessages:
    """The messages that a rank sends in a step with one collective operation."""

    operation: str  # allreduce, alltoall_base: the names of torch
    calls: int
    num_bytes: int


@dataclass(frozen=True)
class DryRun:
    """A step of rank 0 of `num_ranks`. Bytes are counted; those that are `planned`, predicted."""

    num_ranks: int
    context: int  # ranks that share each document
    step_tokens: int  # of all ranks
    rank_tokens: int  # of this one, computed
    messages: tuple[RankMessages, ...]
    weight_bytes: int  # before the first step
    peak_bytes: int  # of weights, optimizer and activations together
    planned_rank_tokens: int  # of a step with long rows
    planned_messages: tuple[RankMessages, ...]
    planned_weight_bytes: int
    planned_peak_bytes: int  # without the process, the device's libraries and fragmentation
