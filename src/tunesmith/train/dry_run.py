"""Steps of a run on N ranks, in one process and without their memory: `plan --dry-run N`.

In: a plan and its inputs. Out: what rank 0 sends in a step, its peak memory by count, and what the
plan predicts for both.

The code is that of training. The process group answers at once and sends nothing; tensors are fake:
they have shapes and storages of a size, and no values. Where the code reads a number, it gets a
stand-in, 1. Rank 0 is the one counted, since it has the longest document. Operations are those of
plain torch on a CPU: our kernels, which keep less, need memory that is there. Left out: time, the
memory of the process, of CUDA and of NCCL, and weights that are sharded."""

from __future__ import annotations

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
from tunesmith.core.mesh import DryRun, Mesh, RankMessages
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import Plan, PlanValue
from tunesmith.data.packing import count_computed_tokens
from tunesmith.plan.memory import count_trained_parameters
from tunesmith.plan.mesh_time import (
    GRADIENT_BYTES,
    count_exchanged_bytes,
    count_layer_passes,
)
from tunesmith.plan.rules import RuleContext
from tunesmith.plan.step_memory import collect_footprint, estimate_packs, estimate_step_memory
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import open_truncated_session
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.run import refuse_on_ranks

# of a prediction, which no tensor of a step holds
OTHER_PARTS = ("process", "context", "NCCL", "kernels", "fragments", "KV cache", "evaluation")
READ = torch.ops.aten._local_scalar_dense.default


class PretendedRanks(Ranks):
    """Rank 0 of several, in a process group that answers at once."""

    def __init__(self, world: int) -> None:
        super().__init__(rank=0, world=world)
        self._group = distributed.group.WORLD
        self._backend = "fake"

    def send(self, command: str, **arguments: Any) -> None:
        """Send nothing: nobody receives it."""


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
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is READ:
            return _make_stand_in(args[0].dtype)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2].rstrip("_")
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
        self._storages.add(key)
        record.live_bytes += num_bytes
        record.peak_bytes = max(record.peak_bytes, record.live_bytes)

        def forget() -> None:
            self._storages.discard(key)
            record.live_bytes -= num_bytes

        weakref.finalize(storage, forget)


def _make_stand_in(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def simulate_step(plan: Plan, inputs: RunInputs, num_ranks: int) -> DryRun:
    """Take steps of a plan as rank 0 of `num_ranks`. Raise InputError for a plan that these ranks
    cannot run."""
    with _pretend_ranks(num_ranks) as ranks:
        _refuse_plan(plan, ranks)
        return _count_step(plan, inputs, ranks)


def _refuse_plan(plan: Plan, ranks: Ranks) -> None:
    if plan.mesh is not None and plan.mesh.missing:
        message = f"this plan needs {plan.mesh.missing}, which this version cannot run"
        raise InputError(message, where="--dry-run", fix="use a target on which a step fits")
    if plan.config.shard > 1:
        message = "the dry run does not count sharded weights"
        fix = "leave shard at auto, with a target on which a step fits without it"
        raise InputError(message, where="--dry-run", fix=fix)
    if plan.config.method == "qlora":
        message = "4-bit weights are made by bitsandbytes, which takes no fake tensors"
        raise InputError(message, where="--dry-run", fix="use method: lora")
    refuse_on_ranks(plan, ranks)


@contextmanager
def _pretend_ranks(num_ranks: int) -> Iterator[Ranks]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield PretendedRanks(num_ranks)
    finally:
        distributed.destroy_process_group()


def _count_step(plan: Plan, inputs: RunInputs, ranks: Ranks) -> DryRun:
    plain = PlanValue("plain", "rule", "blocked weights are no tensors of a known size")
    sdpa = PlanValue("sdpa", "rule", "the attention of plain torch")
    plan = plan.with_settings(weight_layout=plain, attention=sdpa)
    record = StorageRecord()
    with FakeTensorMode(allow_non_fake_inputs=True), _StorageCounter(record):
        session = open_truncated_session(plan, inputs, plan.model.num_layers)
        training = TrainingLoop(
            session.model, session.load_documents, plan.config, steps=plan.steps, ranks=ranks
        )
        weight_bytes = record.peak_bytes = record.live_bytes  # loading takes other ways
        event = _take_step(training)
        if plan.steps > 1:  # the second one has the optimizer's moments in memory
            record.calls.clear()
            record.num_bytes.clear()
            event = _take_step(training)
        packs, *_ = training.pack_documents(session.load_documents(event.step))
    rank_tokens = math.ceil(sum(map(count_computed_tokens, packs)) / plan.config.context)
    messages: list[RankMessages] = []
    for name, calls in sorted(record.calls.items()):
        messages.append(RankMessages(name, calls, record.num_bytes[name]))
    context = _build_context(plan, ranks.world)
    planned = estimate_step_memory(context)
    gradients, *exchanges = _predict_messages(context, rank_tokens, len(packs))
    return DryRun(
        num_ranks=ranks.world,
        context=plan.config.context,
        step_tokens=event.tokens,
        rank_tokens=rank_tokens,
        messages=tuple(messages),
        weight_bytes=weight_bytes,
        peak_bytes=record.peak_bytes,
        planned_rank_tokens=estimate_packs(context).step,
        planned_messages=(gradients, *exchanges),
        planned_weight_bytes=planned["weights"] + gradients.num_bytes,  # of fp32, too
        planned_peak_bytes=planned["peak"] - sum(planned.get(name, 0) for name in OTHER_PARTS),
    )


def _take_step(training: TrainingLoop) -> TrainStep:
    event = next(training)
    if isinstance(event, CheckResult):
        raise InputError(event.evidence, where="--dry-run", fix="this is a bug: please report it")
    assert isinstance(event, TrainStep)
    return event


def _build_context(plan: Plan, num_ranks: int) -> RuleContext:
    """Return the settings of a plan, with the mesh of the ranks, as the predictions take them."""
    return RuleContext(
        machine=plan.machine,
        model=plan.model,
        data=plan.data["data"],
        settings=plan.settings,
        has_schema=False,
        max_steps=plan.steps,
        stage=plan.config.stage,
        mesh=Mesh(num_gpus=num_ranks, context=plan.config.context),
    )


def _predict_messages(
    context: RuleContext, rank_tokens: int, num_packs: int
) -> tuple[RankMessages, ...]:
    """Return the messages that plan/mesh_time.py counts the time of."""
    num_trained = count_trained_parameters(context.model, **collect_footprint(context))
    messages = [RankMessages("allreduce", 1, GRADIENT_BYTES * num_trained)]
    if context.mesh.context > 1:
        calls = 2 * num_packs * count_layer_passes(context)
        num_bytes = count_exchanged_bytes(context, rank_tokens)
        messages.append(RankMessages("alltoall_base", calls, num_bytes))
    return tuple(messages)


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _iter_tensors(item)
