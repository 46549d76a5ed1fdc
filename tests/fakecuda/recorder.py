"""A GPU that is not there, and a record of what the code asks of it.

Tensors are fake: they have a shape, a dtype and a device, and no values. A case fails on tensors of
different devices in one operation and on results whose shape depends on values, for which a GPU
would have to wait. Reads of values are counted, and get stand-ins that let the code go on: 0.0, 1
or true."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
# those that change no memory, beside the views
FREE = {
    *("aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view", "aten::empty"),
    *("aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::is_same_size", "aten::sym_size", "prim::device"),
}

RANDOM_ORDER = {"aten::put_", "aten::histc", "aten::bincount", "aten::median", "aten::nll_loss2d"}
ROW_CHOICES = {"aten::embedding", "aten::index_select"}
ROW_WRITES = {"aten::index_copy_"}
IN_PLACE = {"tunesmith::mix_rows", "tunesmith::scale_columns", "tunesmith::cross_entropy"}
FILLS = {"aten::zeros", "aten::ones", "aten::zeros_like", "aten::fill_", "aten::zero_"}


@dataclass
class Record:
    """What a case asked of the device. Bytes are those of storages on it."""

    kernels: Counter[str] = field(default_factory=Counter[str])
    reads: int = 0
    uploads: int = 0  # copies from the host
    waits: int = 0  # uploads for which this process waits until the device has done all before
    moved_bytes: int = 0  # that kernels read and write, each tensor once
    live_bytes: int = 0
    peak_bytes: int = 0
    saved_bytes: int = 0  # set by a case: after the forward of the decoder
    step_kernels: int = 0  # set by a case
    step_bytes: int = 0  # set by a case

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self._storages: set[int] = set()
        self._last_read: torch.UntypedStorage | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        inputs = list(_iter_tensors((args, kwargs)))
        if func in READS:
            return self._read(func, inputs, args)
        self._refuse_mixture(func, inputs)
        if torch.are_deterministic_algorithms_enabled():
            _refuse_random_order(func, inputs)
        out = func(*args, **(kwargs or {}))
        outputs = list(_iter_tensors(out))
        if func.namespace == "tunesmith":
            outputs = inputs  # a kernel of ours fills what it is given
        on_gpu = [tensor for tensor in outputs if tensor.device.type == "cuda"]
        if func in COPIES and inputs[-1].device.type != outputs[0].device.type:
            if on_gpu:
                self.record.uploads += 1
                self.record.waits += not _is_non_blocking(func, args, kwargs or {})
            else:
                self._count_read(inputs[-1])
        elif on_gpu and not func.is_view and func._schema.name not in FREE:
            self.record.kernels[func._schema.name] += 1
            self.record.moved_bytes += _count_moved_bytes(func, inputs, outputs)
        for tensor in on_gpu:
            self._track(tensor)
        return out

    def _read(self, func: Any, inputs: list[Tensor], args: Any) -> Any:
        if inputs[0].device.type == "cpu":
            try:
                return func(*args)
            except DataDependentOutputException:
                return _stand_in(inputs[0].dtype)
        self._count_read(inputs[0])
        return True if func is aten.equal.default else _stand_in(inputs[0].dtype)

    def _count_read(self, tensor: Tensor) -> None:
        """Count a read. The elements of a fake tensor's list are read one by one; together they are
        one read."""
        storage = tensor.untyped_storage()
        last = self._last_read
        self.record.reads += last is None or storage._cdata != last._cdata
        self._last_read = storage  # while it is there, no other gets its address

    def _refuse_mixture(self, func: Any, inputs: list[Tensor]) -> None:
        """torch takes some mixtures, and waits for the copy of what is on the host."""
        devices = {tensor.device.type for tensor in inputs if tensor.dim()}
        if len(devices) > 1 and func not in COPIES:
            raise AssertionError(f"{func._schema.name} of tensors on {sorted(devices)}")
        if func._schema.name == "aten::_fused_adamw_":
            devices = {tensor.device.type for tensor in inputs}
            assert len(devices) == 1, f"the optimizer's tensors are on {sorted(devices)}"

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        record = self.record
        self._storages.add(key)
        record.live_bytes += size
        record.peak_bytes = max(record.peak_bytes, record.live_bytes)

        def forget() -> None:
            self._storages.discard(key)
            record.live_bytes -= size

        weakref.finalize(storage, forget)


def _is_non_blocking(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy is only queued. On a GPU that also needs pinned memory."""
    if func is aten.copy_.default:
        return len(args) > 2 and args[2]
    return kwargs.get("non_blocking", False)


def _refuse_random_order(func: Any, inputs: list[Tensor]) -> None:
    """torch refuses these on a GPU in its deterministic mode (torch.use_deterministic_algorithms);
    its kernels do it, which nothing here runs."""
    name = func._schema.name
    is_float_sum = name == "aten::cumsum" and inputs[0].is_floating_point()
    if name in RANDOM_ORDER or is_float_sum:
        raise AssertionError(f"{name} has no deterministic algorithm")


def _count_moved_bytes(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes of all tensors of a kernel. Rows that an index chooses count as what comes
    out or goes in, and what is filled is not read."""
    name = func._schema.name
    if name in ROW_CHOICES:
        return 2 * sum(tensor.nbytes for tensor in outputs)
    if name in ROW_WRITES:
        return 2 * inputs[-1].nbytes
    if name in FILLS:
        return sum(tensor.nbytes for tensor in outputs)
    tensors = {id(tensor): tensor for tensor in (*inputs, *outputs)}
    moved = sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type == "cuda")
    if name in IN_PLACE:
        moved += inputs[0].nbytes
    if func.namespace == "aten" and func._schema.is_mutable:
        moved += sum(tensor.nbytes for tensor in outputs if id(tensor) in set(map(id, inputs)))
    return moved


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _iter_tensors(item)
    elif isinstance(value, dict):
        yield from _iter_tensors(list(value.values()))


def _stand_in(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 1


@contextmanager
def recording() -> Iterator[Record]:
    """Record what runs inside, which must be in a `fake_gpu`."""
    recorder = Recorder()
    with recorder:
        yield recorder.record


def fake_gpu() -> FakeTensorMode:
    """Return the mode in which tensors are fake, those made of real ones too."""
    return FakeTensorMode(allow_non_fake_inputs=True)
