"""Linear layers with a low-rank adapter, and the matrix products behind them.

`project` runs several linears on one input: the input is saved once and its gradient is summed
inside the products. Masters of A and B are fp32, products run in the dtype of the input. Maths
equals PEFT's: W x + b + scale * B A drop(x), and with DoRA (dora.py) each output but the bias times
its gain. Left out: which modules get an adapter (adapters.py), how a frozen weight is kept
(frozen.py). Legend: N rows, I inputs, O outputs, R rank; z = A drop(x) [N, R]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.dora import DoraScale, compute_row_norms, compute_squared_norms
from tunesmith.model.frozen_weight import DenseWeight, FrozenWeight, NF4Weight
from tunesmith.model.kernels import lora
from tunesmith.model.kernels.lora import MIN_ROWS, PackedAdapters


class QuantizedLinear(nn.Module):
    """A frozen linear [O, I] whose weight is kept in 4 bits; products run in `dtype`."""

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.frozen, self.bias = NF4Weight(weight_OI, dtype), bias

    @property
    def weight(self) -> Tensor:
        return self.frozen.weight

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def extra_repr(self) -> str:
        return f"({self.out_features}, {self.in_features}), nf4"


class LoraLinear(nn.Module):
    """A frozen linear [O, I] with trainable A [R, I] and B [O, R], with DoRA magnitudes [O] too.
    `scale` 0 is the base model.

    A ~ U(-1/sqrt(I), 1/sqrt(I)) and B = 0, as PEFT starts them (kaiming_uniform with a = sqrt(5)).
    """

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.frozen: FrozenWeight = (
            base.frozen if isinstance(base, QuantizedLinear) else DenseWeight(base.weight.detach())
        )
        self.bias = base.bias
        weight, in_features, out_features = self.frozen.weight, base.in_features, base.out_features
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        init_RI = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(
            in_features
        )
        self.lora_A = nn.Parameter(init_RI.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.scale, self.dropout = scale, dropout
        self._squares_O = compute_squared_norms(weight) if dora else None
        self._dora_scale: tuple[tuple[object, ...], DoraScale] | None = None
        norms_O = self._compute_norms(weight.dtype)
        self.lora_magnitude_vector = None if norms_O is None else nn.Parameter(norms_O)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    @torch.no_grad()
    def get_dora_scale(self, dtype: torch.dtype) -> DoraScale | None:
        """DoRA's, for products in `dtype`. Made anew when a parameter has changed, by its version:
        who changes one unknown to autograd has to increment that."""
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return None
        key = (dtype, self.scale, *(p._version for p in (self.lora_A, self.lora_B, magnitude)))
        if self._dora_scale is None or self._dora_scale[0] != key:
            norms_O = self._compute_norms(dtype)
            assert norms_O is not None
            self._dora_scale = key, DoraScale(magnitude.detach(), norms_O)
        return self._dora_scale[1]

    @torch.no_grad()
    def _compute_norms(self, dtype: torch.dtype) -> Tensor | None:
        if self._squares_O is None:
            return None
        return compute_row_norms(
            self.frozen, self._squares_O, self.lora_A, self.lora_B, scale=self.scale, dtype=dtype
        )

    def extra_repr(self) -> str:
        shape = self.lora_B.shape[0], self.lora_A.shape[1]
        return f"{shape}, rank={self.lora_A.shape[0]}, scale={self.scale}{', dora' * (self._squares_O is not None)}"


class Fp32MasterLinear(nn.Module):
    """A trainable linear whose fp32 master multiplies in the dtype of its input. The narrow copy is
    remade only when the master has changed, by its version: who changes it unknown to autograd has
    to increment that."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self._cast_cache: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def cast_weight(self, dtype: torch.dtype) -> Tensor:
        version = self.weight._version
        if (
            self._cast_cache is None
            or self._cast_cache[0] != version
            or self._cast_cache[1].dtype != dtype
        ):
            self._cast_cache = (version, self.weight.detach().to(dtype))
        return self._cast_cache[1]


AnyLinear = nn.Linear | LoraLinear | Fp32MasterLinear | QuantizedLinear
OuterGrads = tuple[Tensor | None, Tensor | None]


class PreparedLinear:
    """One linear prepared for products in one dtype, and its adapter's products through torch. z =
    A drop(x)."""

    def __init__(self, module: AnyLinear, dtype: torch.dtype) -> None:
        adapter = module if isinstance(module, LoraLinear) and module.scale != 0 else None
        self.scale = adapter.scale if adapter else 0.0
        self.dropout = adapter.dropout if adapter and adapter.training else 0.0
        self.parameters: tuple[Tensor | None, ...] = (
            None if isinstance(module, LoraLinear | QuantizedLinear) else module.weight,
            module.bias,
            adapter.lora_A if adapter else None,
            adapter.lora_B if adapter else None,
            adapter.lora_magnitude_vector if adapter else None,
        )
        if isinstance(module, LoraLinear | QuantizedLinear):
            self.frozen = module.frozen
        else:
            weight = (
                module.cast_weight(dtype)
                if isinstance(module, Fp32MasterLinear)
                else module.weight.detach()
            )
            self.frozen = DenseWeight(weight)
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.grad_dtype = adapter.lora_A.dtype if adapter else dtype  # of the gradients of A and B
        self.a = adapter.lora_A.detach().to(dtype) if adapter else None
        self.b = adapter.lora_B.detach().to(dtype) if adapter else None
        self.dora_scale = adapter.get_dora_scale(dtype) if adapter else None

    def sample_dropout_mask(self, x_NI: Tensor) -> Tensor | None:
        """Dropout's keep mask divided by the keep rate, from torch's own generator, which the loop
        seeds."""
        if not self.dropout:
            return None
        keep = torch.rand_like(x_NI, dtype=torch.float32) >= self.dropout
        return keep.to(x_NI.dtype).div_(1 - self.dropout)

    def add_output(self, y: Tensor, x_NI: Tensor, mask: Tensor | None) -> Tensor | None:
        """y += scale * B z; returns z."""
        if self.a is None or self.b is None:
            return None
        z = F.linear(x_NI if mask is None else x_NI * mask, self.a)
        y.addmm_(z, self.b.t(), alpha=self.scale)
        return z

    def outputs_backward(self, dy: Tensor, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """dz, and the gradient of B."""
        if z is None or self.b is None:
            return None, None
        return (dy @ self.b).mul_(self.scale), (z.t() @ dy).t().to(self.grad_dtype).mul_(self.scale)

    def add_input(self, dx: Tensor, dz: Tensor | None, mask: Tensor | None) -> None:
        if dz is None or self.a is None:
            return
        if mask is None:
            dx.addmm_(dz, self.a)
        else:
            dx.add_((dz @ self.a).mul_(mask))

    def inputs_backward(
        self, x_NI: Tensor, dz: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """The gradient of A."""
        return (
            None
            if dz is None
            else (dz.t() @ (x_NI if mask is None else x_NI * mask)).to(self.grad_dtype)
        )

    def compute_base_grads(self, x_NI: Tensor, dy: Tensor) -> list[Tensor | None]:
        """Of weight and bias; None where not trained."""
        weight, bias = self.parameters[:2]
        dweight = (
            (dy.t() @ x_NI).to(weight.dtype)
            if weight is not None and weight.requires_grad
            else None
        )
        dbias = dy.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None
        return [dweight, dbias]


class LinearGroup:
    """Linears that share one input, prepared for one forward and its backward.

    The backward has three steps, because the MLP makes the input of its last linear anew between
    the second and the third. `inner` and `dz` are what the earlier steps returned: z and dz of each
    linear, or of all when lora.c ran; in `inner` also the output of each linear with a gain, before
    its bias."""

    def __init__(
        self, modules: Sequence[AnyLinear], dtype: torch.dtype, min_rows: int = MIN_ROWS
    ) -> None:
        """`fewest_rows` of an input for which lora.c runs."""
        self.linears = [PreparedLinear(module, dtype) for module in modules]
        self.parameters = tuple(p for linear in self.linears for p in linear.parameters)
        self.masks: list[Tensor | None] = []
        self.packed: PackedAdapters | None = None
        self.min_rows = min_rows

    def forward(self, x_NI: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs and `inner`. Once more, as in a backward that makes them anew, it drops the
        same."""
        self.masks = self.masks or [linear.sample_dropout_mask(x_NI) for linear in self.linears]
        self.packed = self._pack(x_NI)
        outputs = [
            linear.frozen.compute_outputs(x_NI, None if linear.dora_scale else linear.bias)
            for linear in self.linears
        ]
        inner: list[Tensor | None]
        if self.packed:
            z = self.packed.compute_inner(x_NI)
            self.packed.add_outputs(outputs, z)
            inner = [z]
        else:
            per_linear = zip(self.linears, outputs, self.masks, strict=True)
            inner = [linear.add_output(y, x_NI, mask) for linear, y, mask in per_linear]
        for index, linear in enumerate(self.linears):
            if linear.dora_scale:
                u = linear.dora_scale.forward(outputs[index])
                outputs[index] = u if linear.bias is None else u + linear.bias
                inner.append(u)
        return outputs, inner

    def _pack(self, x_NI: Tensor) -> PackedAdapters | None:
        adapters = [
            None if linear.a is None or linear.b is None else (linear.a, linear.b, linear.scale)
            for linear in self.linears
        ]
        needs_torch = any(mask is not None for mask in self.masks) or len(x_NI) < self.min_rows
        if not any(adapters) or needs_torch or not lora.is_supported(x_NI, adapters):
            return None
        return self.packed or PackedAdapters(adapters)

    def outputs_backward(
        self, gradients: Sequence[Tensor], inner: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None], list[OuterGrads]]:
        """From the gradients of the outputs: those before the gains, `dz`, and the gradients of B
        and the magnitudes of each linear."""
        zs, us = (
            (inner[:1], inner[1:])
            if self.packed
            else (inner[: len(gradients)], inner[len(gradients) :])
        )
        dys, dms = self._dora_backward(gradients, us)
        if self.packed and zs[0] is not None:
            dz, dbs = self.packed.outputs_backward(dys, zs[0])
            return dys, [dz], list(zip(dbs, dms, strict=True))
        per_linear = zip(self.linears, dys, zs, strict=True)
        dzs, dbs = zip(
            *(linear.outputs_backward(dy, z) for linear, dy, z in per_linear), strict=True
        )
        return dys, list(dzs), list(zip(dbs, dms, strict=True))

    def _dora_backward(
        self, gradients: Sequence[Tensor], us: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        dys, remaining_us = list(gradients), iter(us)
        dms: list[Tensor | None] = [None] * len(gradients)
        for index, linear in enumerate(self.linears):
            if linear.dora_scale and (u := next(remaining_us)) is not None:
                dys[index], dms[index] = linear.dora_scale.backward(dys[index], u)
        return dys, dms

    def compute_input_grad(
        self, gradients: Sequence[Tensor], dz: Sequence[Tensor | None]
    ) -> Tensor:
        dx = None
        for linear, dy in zip(self.linears, gradients, strict=True):
            dx = linear.frozen.compute_input_grad(dy, dx)
        assert dx is not None
        if self.packed and dz[0] is not None:
            self.packed.add_inputs(dx, dz[0])
        else:
            for linear, linear_dz, mask in zip(self.linears, dz, self.masks, strict=True):
                linear.add_input(dx, linear_dz, mask)
        return dx

    def compute_parameter_grads(
        self,
        x_NI: Tensor,
        gradients: Sequence[Tensor],
        dz: Sequence[Tensor | None],
        outer: Sequence[OuterGrads],
    ) -> list[Tensor | None]:
        """Of `parameters`; None where not trained."""
        if self.packed and dz[0] is not None:
            das = self.packed.inputs_backward(x_NI, dz[0])
        else:
            per_linear = zip(self.linears, dz, self.masks, strict=True)
            das = [
                linear.inputs_backward(x_NI, linear_dz, mask)
                for linear, linear_dz, mask in per_linear
            ]
        linear_grads = zip(self.linears, gradients, das, outer, strict=True)
        return [
            grad
            for linear, dy, da, pair in linear_grads
            for grad in (*linear.compute_base_grads(x_NI, dy), da, *pair)
        ]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: LinearGroup, *_parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        outputs, inner = group.forward(x_NI)
        ctx.group, ctx.shape = group, x.shape
        ctx.save_for_backward(x_NI, *inner)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *inner = ctx.saved_tensors
        group: LinearGroup = ctx.group
        dys = [dy.reshape(len(x_NI), -1) for dy in gradients]
        dys, dz, outer = group.outputs_backward(dys, inner)
        dx = group.compute_input_grad(dys, dz).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return (dx, None, *group.compute_parameter_grads(x_NI, dys, dz, outer))


def project(x: Tensor, modules: Sequence[AnyLinear]) -> tuple[Tensor, ...]:
    """x [..., I] through each linear -> [..., O] each: one node of the graph, whatever the number
    of linears."""
    group = prepare_group(modules, x.dtype)
    return _Project.apply(x, group, *group.parameters)


# Tensors too, so that nothing else can get their place in memory.
_group_cache: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LinearGroup, list[Tensor]]] = (
    WeakKeyDictionary()
)


def prepare_group(modules: Sequence[AnyLinear], dtype: torch.dtype) -> LinearGroup:
    """While nothing trains, a group is kept for the next product: casting and packing A and B takes
    longer than the products of a few rows. Made anew when a parameter has changed, by its place or
    version: who changes one in place unknown to autograd, as through `.data`, has to increment
    that."""
    first_module = modules[0]
    if torch.is_grad_enabled() or first_module.training or not isinstance(first_module, LoraLinear):
        _group_cache.pop(first_module, None)
        return LinearGroup(modules, dtype)
    tensors = [tensor for module in modules for tensor in _list_tensors(module)]
    key = (
        dtype,
        *map(_identify_linear, modules),
        *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors),
    )
    if first_module not in _group_cache or _group_cache[first_module][0] != key:
        _group_cache[first_module] = (
            key,
            LinearGroup(modules, dtype, min_rows=1),
            [tensor.detach() for tensor in tensors],
        )
    return _group_cache[first_module][1]


def _identify_linear(module: AnyLinear) -> tuple[object, ...]:
    frozen = module.frozen if isinstance(module, LoraLinear | QuantizedLinear) else None
    return id(module), id(frozen), module.scale if isinstance(module, LoraLinear) else 0.0


def _list_tensors(module: AnyLinear) -> list[Tensor]:
    """What a prepared linear depends on beside its frozen weight."""
    tensors: list[Tensor | None] = [module.bias]
    if isinstance(module, LoraLinear):
        tensors += [module.lora_A, module.lora_B, module.lora_magnitude_vector]
    elif not isinstance(module, QuantizedLinear):
        tensors.append(module.weight)
    return [tensor for tensor in tensors if tensor is not None]
