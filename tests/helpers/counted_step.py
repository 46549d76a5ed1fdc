"""Steps of a run on N ranks, in one process and without their memory.

In: a plan and its inputs. Out: what rank 0 sends in a step, and its peak memory, counted and as the
plan predicts it.

The code is that of training. The process group answers at once and sends nothing; tensors are fake:
they have shapes and storages of a size, and no values. Where the code reads a number, it gets a
stand-in, 1. Rank 0 is the one counted, since it has the longest document. Operations are those of
plain torch on a CPU: our kernels, which keep less, need memory that is there. Ranks that hold
weights together are in step, each at the same layer. Left out: time, the memory of the process, of
CUDA and of NCCL, and the words of 8 bytes by which ranks agree."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.mesh import Mesh
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import Plan, PlanValue
from tunesmith.data.packing import count_computed_tokens
from tunesmith.model.frozen_weight import NF4_BLOCK
from tunesmith.model.quantization import roundtrip_nf4
from tunesmith.model.weight_shards import WeightShards, join_ranks
from tunesmith.plan.memory import MASTER_BYTES, count_trained_parameters
from tunesmith.plan.rules import RuleContext
from tunesmith.plan.step_memory import collect_footprint, estimate_step_memory
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import open_truncated_session
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.run import refuse_on_ranks

READ = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class CountedStep:
    """A step of rank 0. Bytes are counted; those that are `planned`, predicted."""

    messages: dict[str, tuple[int, int]]  # torch's name of a collective -> calls, bytes sent
    step_tokens: int  # of all ranks
    rank_tokens: int  # of this one, computed
    weight_bytes: int  # before the first step
    peak_bytes: int  # of weights, optimizer and activations together
    planned_weight_bytes: int
    planned_peak_bytes: int  # without the process, the device's libraries and fragmentation


class PretendedRanks(Ranks):
    """Rank 0 of several, in a process group that answers at once."""

    def __init__(self, world: int) -> None:
        super().__init__(rank=0, world=world)
        self._group = distributed.group.WORLD
        self._backend = "fake"

    def send(self, command: str, **arguments: Any) -> None:
        """Send nothing: nobody receives it."""

    def gather_words(self, word: int, *, size: int) -> list[int]:
        """Say that the others need what this rank does."""
        return [word] * size


@dataclass
class StorageRecord:
    """Bytes of the storages that exist, and what was communicated."""

    live_bytes: int = 0
    peak_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter[str])
    num_bytes: Counter[str] = field(default_factory=Counter[str])


class _StorageCounter(TorchDispatchMode):
    """Count the storages and the collective operations of all that runs inside."""

    def __init__(self, record: StorageRecord) -> None:
        super().__init__()
        self.record = record
        self._storages: dict[int, int] = {}  # bytes
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is READ:
            return _make_stand_in(args[0].dtype)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.measure_again()  # the layers between which weights are gathered
            name = func._schema.name.partition("::")[2].strip("_")
            self.record.calls[name] += 1
            # of a pair of tensors, the second one is sent
            sent = list(_iter_tensors(args[1] if isinstance(args[1], Tensor) else args[0]))
            self.record.num_bytes[name] += sum(tensor.nbytes for tensor in sent)
        for tensor in _iter_tensors(out):
            self._track(tensor)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        record = self.record
        num_bytes = storage.nbytes()
        self._storages[key] = num_bytes
        self._references[key] = weakref.ref(storage)
        record.live_bytes += num_bytes
        record.peak_bytes = max(record.peak_bytes, record.live_bytes)

        def forget() -> None:
            del self._references[key]
            record.live_bytes -= self._storages.pop(key)

        weakref.finalize(storage, forget)

    def measure_again(self) -> None:
        """Count the storages that were emptied or filled."""
        record = self.record
        for key, reference in list(self._references.items()):
            storage: Any = reference()  # which is alive: its end removes the entry
            num_bytes = storage.nbytes()
            record.live_bytes += num_bytes - self._storages[key]
            self._storages[key] = num_bytes
        record.peak_bytes = max(record.peak_bytes, record.live_bytes)


def _make_stand_in(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def count_step(plan: Plan, inputs: RunInputs, num_ranks: int) -> CountedStep:
    """Take steps of a plan as rank 0 of `num_ranks`. Raise InputError for a plan that these ranks
    cannot run."""
    with _pretend_ranks(num_ranks) as ranks:
        refuse_on_ranks(plan, ranks, is_new=True)
        return _count_step(plan, inputs, ranks)


@contextmanager
def _pretend_ranks(num_ranks: int) -> Iterator[Ranks]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield PretendedRanks(num_ranks)
    finally:
        distributed.destroy_process_group()


def _count_step(plan: Plan, inputs: RunInputs, ranks: Ranks) -> CountedStep:
    plain = PlanValue("plain", "rule", "blocked weights are not tensors of a known size")
    sdpa = PlanValue("sdpa", "rule", "the attention of plain torch")
    plan = plan.with_settings(weight_layout=plain, attention=sdpa)
    record = StorageRecord()
    size = plan.config.dp_shard_size
    shards = WeightShards(ranks, size) if size > 1 else None
    if plan.config.method == "qlora":  # whose library keeps tables for the process: real ones
        roundtrip_nf4(torch.zeros(NF4_BLOCK, NF4_BLOCK))
    with FakeTensorMode(allow_non_fake_inputs=True), _StorageCounter(record) as counter:
        with join_ranks(shards):
            session = open_truncated_session(plan, inputs, plan.model.num_layers, shards)
        training = TrainingLoop(
            session.model, session.load_documents, plan.config, steps=plan.steps, ranks=ranks
        )
        counter.measure_again()
        weight_bytes = record.peak_bytes = record.live_bytes  # loading takes other ways
        event = _take_step(training)
        if plan.steps > 1:  # the second one has the optimizer's moments in memory
            record.calls.clear()
            record.num_bytes.clear()
            event = _take_step(training)
        packs, *_ = training.pack_documents(session.load_documents(event.step))
    rank_tokens = math.ceil(
        sum(map(count_computed_tokens, packs)) / plan.config.context_parallel_size
    )
    messages = {name: (calls, record.num_bytes[name]) for name, calls in record.calls.items()}
    context = _build_context(plan, ranks.world)
    planned = estimate_step_memory(context)
    # without what no tensor of a step holds
    tensors = dataclasses.replace(
        planned, process=0, context=0, nccl=0, kernels=0, fragments=0, evaluation=0
    )
    num_trained = count_trained_parameters(context.model, collect_footprint(context))
    trained_bytes = MASTER_BYTES * num_trained
    if plan.config.method == "full":
        trained_bytes //= context.mesh.shard
    return CountedStep(
        messages=messages,
        step_tokens=event.tokens,
        rank_tokens=rank_tokens,
        weight_bytes=weight_bytes,
        peak_bytes=record.peak_bytes,
        planned_weight_bytes=planned.weights + trained_bytes,  # those in fp32, too
        planned_peak_bytes=tensors.peak - tensors.cache,
    )


def _take_step(training: TrainingLoop) -> TrainStep:
    event = next(training)
    if isinstance(event, CheckResult):
        raise InputError(event.evidence, where="--dry-run", fix="report it")
    assert isinstance(event, TrainStep)
    return event


def _build_context(plan: Plan, num_ranks: int) -> RuleContext:
    """Return the settings of a plan, with the mesh of the ranks, as the predictions take them."""
    return RuleContext(
        machine=plan.machine,
        model=plan.model,
        data=plan.data["data"],
        settings=plan.settings,
        max_steps=plan.steps,
        stage=plan.config.stage,
        mesh=Mesh(
            num_gpus=num_ranks,
            shard=plan.config.dp_shard_size,
            context=plan.config.context_parallel_size,
        ),
    )


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _iter_tensors(item)
