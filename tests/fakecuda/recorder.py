"""A GPU that is not there, and a record of what the code asks of it.

Tensors are fake: they have a shape, a dtype and a device, and no values. A case fails on tensors of
different devices in one operation, on results whose shape depends on values, for which a GPU would
have to wait, and on layouts in memory that a kernel does not take. Reads of values are counted, and
get stand-ins that let the code go on: 0.0, 1 or true. Frequent operations go to torch's kernels for
tensors without values directly: FakeTensorMode returns the same in several times the time
(`is_checked` compares)."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GET_DEVICE = torch.ops.prim.device.default
READS = (aten._local_scalar_dense.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
# those that change no memory, beside the views
FREE = {
    *("aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view", "aten::empty"),
    *("aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::is_same_size", "aten::sym_size", "prim::device"),
}

# run directly, as views are
FREQUENT = {
    *("aten::mm", "aten::bmm", "aten::clone", "aten::_unsafe_view"),
    *("aten::empty_like", "aten::zeros_like", "aten::new_empty"),
}
UPDATES = {"aten::addmm_", "aten::add_", "aten::mul_"}  # of their first argument
RANDOM_ORDER = {"aten::put_", "aten::histc", "aten::bincount", "aten::median", "aten::nll_loss2d"}
ROW_CHOICES = {"aten::embedding", "aten::index_select"}
ROW_WRITES = {"aten::index_copy_"}
IN_PLACE = {"tunesmith::mix_rows", "tunesmith::scale_columns", "tunesmith::cross_entropy"}
# rates of an H100 in practice: 66% of its data sheet's bf16 rate, 80% of its bandwidth
H100_FLOPS = 0.66 * 989e12
H100_BANDWIDTH = 0.8 * 3.35e12
KERNEL_SECONDS = 2e-6  # of the shortest one
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
# multiplications and additions of flash attention for each score and value of a head
ATTENTION_FLOPS = {"aten::_flash_attention_forward": 4, "aten::_flash_attention_backward": 10}
ROW_ALIGNMENT = 16  # bytes that flash attention reads at once
FILLS = {"aten::zeros", "aten::ones", "aten::zeros_like", "aten::fill_", "aten::zero_"}


@dataclass
class Record:
    """What a case asked of the device. Bytes are those of storages on it."""

    kernels: Counter[str] = field(default_factory=Counter[str])
    reads: int = 0
    uploads: int = 0  # copies from the host
    waits: int = 0  # uploads for which this process waits until the device has done all before
    moved_bytes: int = 0  # that kernels read and write, each tensor once
    seconds: float = 0.0  # of an H100, by its roofline
    live_bytes: int = 0
    peak_bytes: int = 0
    saved_bytes: int = 0  # set by a case: after the forward of the decoder
    step_kernels: int = 0  # set by a case
    step_bytes: int = 0  # set by a case
    step_seconds: float = 0.0  # set by a case

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())


class Recorder(TorchDispatchMode):
    def __init__(self, *, is_checked: bool = False) -> None:
        super().__init__()
        self.record = Record()
        self.is_checked = is_checked
        self._storages: set[int] = set()
        self._last_read: torch.UntypedStorage | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is GET_DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = list(_iter_tensors((args, kwargs)))
        if func in READS:
            return self._read(func, inputs, args)
        self._refuse_mixture(func, inputs)
        _refuse_layout(func, inputs)
        if torch.are_deterministic_algorithms_enabled():
            _refuse_random_order(func, inputs)
        if func.namespace == "tunesmith":
            out = None
            outputs = inputs  # a kernel of ours fills what it is given
        else:
            out = self._run(func, inputs, args, kwargs)
            outputs = list(_iter_tensors(out))
        on_gpu = [tensor for tensor in outputs if _is_on_gpu(tensor)]
        if func in COPIES and _is_on_gpu(inputs[-1]) != _is_on_gpu(outputs[0]):
            if on_gpu:
                self.record.uploads += 1
                self.record.waits += not _is_non_blocking(func, args, kwargs)
            else:
                self._count_read(inputs[-1])
        elif on_gpu and not func.is_view and func._schema.name not in FREE:
            num_bytes = _count_moved_bytes(func, inputs, outputs)
            self.record.kernels[func._schema.name] += 1
            self.record.moved_bytes += num_bytes
            self.record.seconds += max(
                _count_flops(func, inputs, args) / H100_FLOPS,
                num_bytes / H100_BANDWIDTH,
                KERNEL_SECONDS,
            )
        for tensor in on_gpu:
            self._track(tensor)
        return out

    def _run(self, func: Any, inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        is_frequent = func.is_view or name in FREQUENT or name in UPDATES
        if not is_frequent or "device" in kwargs or not _are_alike(inputs):
            return func(*args, **kwargs)
        if name in UPDATES and not self.is_checked:
            return inputs[0]
        out = _run_directly(func, inputs[0], args, kwargs)
        if self.is_checked and name not in UPDATES:
            expected = list(_iter_tensors(func(*args, **kwargs)))
            for ours, other in zip(_iter_tensors(out), expected, strict=True):
                assert _describe(ours) == _describe(other), func
                if func.is_view:
                    assert ours.untyped_storage()._cdata == other.untyped_storage()._cdata, func
        return out

    def _read(self, func: Any, inputs: list[Tensor], args: Any) -> Any:
        if not _is_on_gpu(inputs[0]):
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
        is_optimizer = func is aten._fused_adamw_.default
        on_gpu = {_is_on_gpu(tensor) for tensor in inputs if is_optimizer or tensor.dim()}
        if len(on_gpu) > 1 and func not in COPIES:
            raise AssertionError(f"{func._schema.name} of tensors on ['cpu', 'cuda']")

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


def _is_on_gpu(tensor: Tensor) -> bool:
    """A fake tensor has its device at hand; its property `device` asks the mode."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "cuda"


def _are_alike(inputs: list[Tensor]) -> bool:
    """Return whether all are fake tensors of one device without known values."""
    for tensor in inputs:
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return False
        if tensor.fake_device != inputs[0].fake_device:  # pyright: ignore[reportAttributeAccessIssue]
            return False
    return bool(inputs)


def _run_directly(func: Any, first: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation of fake tensors of one device returns."""
    with in_kernel_invocation_manager(first.fake_mode):
        out = func(*args, **kwargs)
    if isinstance(out, FakeTensor):  # one of the inputs, changed in place
        return out
    if isinstance(out, Tensor):
        return FakeTensor(first.fake_mode, out, first.fake_device)
    return type(out)(FakeTensor(first.fake_mode, tensor, first.fake_device) for tensor in out)


def _describe(tensor: Tensor) -> tuple[object, ...]:
    """Return what is known of a fake tensor; of dimensions of one element the stride means
    nothing."""
    strides = [n for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return tensor.shape, strides, tensor.storage_offset(), tensor.dtype, tensor.device


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


def _refuse_layout(func: Any, inputs: list[Tensor]) -> None:
    """Our kernels count on contiguous tensors. Flash attention takes 16 bits, offsets in 32, values
    of a head that are neighbors and begin at 16 bytes, and knows no stride of its log-sum-exp."""
    name = func._schema.name
    if func.namespace == "tunesmith":
        assert all(tensor.is_contiguous() for tensor in inputs), f"{name} of a strided tensor"
    if name not in ATTENTION_FLOPS:
        return
    values = [tensor for tensor in inputs if tensor.dim() == 3]
    assert all(tensor.itemsize == 2 for tensor in values), f"{name} of {values[0].dtype}"
    assert all(map(_has_aligned_rows, values)), f"{name} of rows that are not aligned"
    others = [tensor for tensor in inputs if tensor.dim() < 3]
    assert all(tensor.is_contiguous() for tensor in others), f"{name} of a strided tensor"
    num_offsets = sum(tensor.dtype == torch.int32 for tensor in others)
    assert num_offsets == 2, f"{name} of offsets that are not int32"


def _has_aligned_rows(tensor: Tensor) -> bool:
    places = [*tensor.stride()[:-1], tensor.storage_offset()]
    is_aligned = all(place * tensor.itemsize % ROW_ALIGNMENT == 0 for place in places)
    return tensor.stride(-1) == 1 and is_aligned


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
    moved = sum(tensor.nbytes for tensor in tensors.values() if _is_on_gpu(tensor))
    if name in IN_PLACE:
        moved += inputs[0].nbytes
    if func.namespace == "aten" and func._schema.is_mutable:
        moved += sum(tensor.nbytes for tensor in outputs if id(tensor) in set(map(id, inputs)))
    return moved


def _count_flops(func: Any, inputs: list[Tensor], args: Any) -> float:
    """Return the operations of a product of matrices, and of causal attention over documents that
    are all as long as the longest one."""
    name = func._schema.name
    if name in PRODUCTS:
        a, b = inputs[-2:]
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    if name in ATTENTION_FLOPS:
        q = inputs[0]
        longest = next(arg for arg in args if isinstance(arg, int))
        return ATTENTION_FLOPS[name] * q.numel() * longest / 2
    return 0.0


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
def recording(*, is_checked: bool = False) -> Iterator[Record]:
    """Record what runs inside, which must be in a `fake_gpu`."""
    recorder = Recorder(is_checked=is_checked)
    with recorder:
        yield recorder.record


def fake_gpu() -> FakeTensorMode:
    """Return the mode in which tensors are fake, those made of real ones too."""
    return FakeTensorMode(allow_non_fake_inputs=True)
