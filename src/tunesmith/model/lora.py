"""Linear layers with a low-rank adapter, and their matrix products.

`project` runs several linears on one input: the input is saved once and its gradient is summed
inside the products. A and B are trained in fp32; products run in the dtype of the input. The maths
equals PEFT's: W x + b + scale * B A drop(x), and with DoRA (dora.py) each output except the bias
times its gain. Left out: which modules get an adapter (adapters.py), how a frozen weight is stored
(frozen_weight.py). Legend: N rows, I inputs, O outputs, R rank; z = A drop(x) [N, R]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.bank_linear import BankLinear, BankLinearGroup
from tunesmith.model.dora import DoraScale, compute_row_norms, compute_squared_norms
from tunesmith.model.frozen_weight import DenseWeight, FrozenWeight, NF4Weight
from tunesmith.model.kernels import lora, ops
from tunesmith.model.kernels.lora import MIN_ROWS, Adapter, PackedAdapters
from tunesmith.model.stacked_adapters import AdapterBuffer, StackedAdapters


class QuantizedLinear(nn.Module):
    """A frozen linear [O, I] with a 4-bit weight; products run in `dtype`."""

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.frozen = NF4Weight(weight_OI, dtype)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.frozen.weight

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def extra_repr(self) -> str:
        return f"({self.out_features}, {self.in_features}), nf4"


class LoraLinear(nn.Module):
    """A frozen linear [O, I] with trainable A [R, I] and B [O, R], with DoRA also magnitudes [O].
    `scale` 0 gives the base model.

    A ~ U(-1/sqrt(I), 1/sqrt(I)) and B = 0, as in PEFT (kaiming_uniform with a = sqrt(5))."""

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
        frozen = DenseWeight(base.weight.detach()) if isinstance(base, nn.Linear) else base.frozen
        self.frozen: FrozenWeight = frozen
        self.bias = base.bias
        self.scale = scale
        self.dropout = dropout
        device = frozen.device
        dtype = torch.promote_types(frozen.dtype, torch.float32)
        shape = (rank, base.in_features)
        uniform_RI = torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1
        init_RI = uniform_RI / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(init_RI.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))
        self._squares_O = compute_squared_norms(frozen.weight) if dora else None
        self._dora_scale: tuple[tuple[object, ...], DoraScale] | None = None
        norms_O = self._compute_norms(frozen.dtype)
        self.lora_magnitude_vector = None if norms_O is None else nn.Parameter(norms_O)
        self.buffer: AdapterBuffer | None = None  # of the network, on a GPU

    def forward(self, x: Tensor) -> Tensor:
        (y,) = project(x, [self])
        # a gain without a bias saves its output, which stock modules may clamp in place
        is_saved = self.lora_magnitude_vector is not None and self.bias is None
        return y.clone() if is_saved else y

    def cast_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B for products in `dtype`."""
        if self.buffer is not None and self.buffer.dtype == dtype:
            return self.buffer.cast(self.lora_A), self.buffer.cast(self.lora_B)
        return self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)

    @torch.no_grad()
    def get_dora_scale(self, dtype: torch.dtype) -> DoraScale | None:
        """Return DoRA's gain for products in `dtype`, None without DoRA.

        It is cached by the versions of the parameters: code that changes a parameter behind
        autograd's back, as through `.data`, has to increment its version."""
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return None
        versions = (self.lora_A._version, self.lora_B._version, magnitude._version)
        key = (dtype, self.scale, *versions)
        if self._dora_scale is None or self._dora_scale[0] != key:
            norms_O = self._compute_norms(dtype)
            assert norms_O is not None
            self._dora_scale = (key, DoraScale(magnitude.detach(), norms_O))
        return self._dora_scale[1]

    @torch.no_grad()
    def _compute_norms(self, dtype: torch.dtype) -> Tensor | None:
        if self._squares_O is None:
            return None
        return compute_row_norms(
            self.frozen, self._squares_O, self.lora_A, self.lora_B, scale=self.scale, dtype=dtype
        )

    def extra_repr(self) -> str:
        shape = (self.lora_B.shape[0], self.lora_A.shape[1])
        text = f"{shape}, rank={self.lora_A.shape[0]}, scale={self.scale}"
        return text if self._squares_O is None else f"{text}, dora"


class Fp32MasterLinear(nn.Module):
    """A trainable linear with an fp32 master weight, multiplied in the dtype of its input.

    The cast weight is cached by the master's version, as in LoraLinear.get_dora_scale."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._cast_cache: tuple[int, Tensor] | None = None

    def cast_into(self, cast_weight: Tensor) -> None:
        """Take the cast weight from this tensor, which someone else fills."""
        self._cast_cache = (self.weight._version, cast_weight)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def cast_weight(self, dtype: torch.dtype) -> Tensor:
        version = self.weight._version
        if self._cast_cache is not None:
            cached_version, cast_weight = self._cast_cache
            if cached_version == version and cast_weight.dtype == dtype:
                return cast_weight
        cast_weight = self.weight.detach().to(dtype)
        self._cast_cache = (version, cast_weight)
        return cast_weight


AnyLinear = nn.Linear | LoraLinear | Fp32MasterLinear | QuantizedLinear | BankLinear
OuterGrads = tuple[Tensor | None, Tensor | None]  # of B and of the magnitudes


class PreparedLinear:
    """One linear prepared for products in one dtype, and the products of its adapter in torch."""

    def __init__(self, module: AnyLinear, dtype: torch.dtype) -> None:
        self.frozen: FrozenWeight
        weight = None  # the trainable weight
        if isinstance(module, LoraLinear | QuantizedLinear):
            self.frozen = module.frozen
        else:
            weight = module.weight
            if isinstance(module, Fp32MasterLinear):
                self.frozen = DenseWeight(module.cast_weight(dtype))
            else:
                self.frozen = DenseWeight(weight.detach())
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.scale = 0.0
        self.dropout = 0.0
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.dora_scale: DoraScale | None = None
        self.grad_dtype = dtype  # of the gradients of A and B
        self.parameters: tuple[Tensor | None, ...] = (weight, module.bias, None, None, None)
        if isinstance(module, LoraLinear) and module.scale != 0:
            self.scale = module.scale
            self.dropout = module.dropout if module.training else 0.0
            self.a, self.b = module.cast_factors(dtype)
            self.dora_scale = module.get_dora_scale(dtype)
            self.grad_dtype = module.lora_A.dtype
            adapter = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
            self.parameters = (weight, module.bias, *adapter)

    @property
    def adapter(self) -> Adapter | None:
        """A, B and their scale, None without an adapter."""
        return None if self.a is None or self.b is None else (self.a, self.b, self.scale)

    @property
    def needs_input(self) -> bool:
        """Whether there are gradients of parameters, which are computed from the input."""
        are_trained = (p is not None and p.requires_grad for p in self.parameters)
        return self.adapter is not None or any(are_trained)

    def sample_dropout_mask(self, x_NI: Tensor) -> Tensor | None:
        """Return dropout's mask divided by the keep rate, from torch's default generator, which the
        training loop seeds."""
        if not self.dropout:
            return None
        mask = torch.rand_like(x_NI, dtype=torch.float32) >= self.dropout
        return mask.to(x_NI.dtype).div_(1 - self.dropout)

    def add_output(self, y: Tensor, x_NI: Tensor, mask: Tensor | None) -> Tensor | None:
        """Add scale * B z to y in place, and return z."""
        if self.a is None or self.b is None:
            return None
        z = F.linear(x_NI if mask is None else x_NI * mask, self.a)
        y.addmm_(z, self.b.t(), alpha=self.scale)
        return z

    def outputs_backward(self, dy: Tensor, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return dz and the gradient of B."""
        if z is None or self.b is None:
            return None, None
        dz = (dy @ self.b).mul_(self.scale)
        db = (z.t() @ dy).t().to(self.grad_dtype).mul_(self.scale)
        return dz, db

    def add_input(self, dx: Tensor, dz: Tensor | None, mask: Tensor | None) -> None:
        """Add dz A to dx in place."""
        if dz is None or self.a is None:
            return
        if mask is None:
            dx.addmm_(dz, self.a)
        else:
            dx.add_((dz @ self.a).mul_(mask))

    def inputs_backward(
        self, x_NI: Tensor, dz: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Return the gradient of A."""
        if dz is None:
            return None
        return (dz.t() @ (x_NI if mask is None else x_NI * mask)).to(self.grad_dtype)

    def compute_base_grads(self, x_NI: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, None if not trained."""
        weight, bias = self.parameters[:2]
        dweight = None
        if weight is not None and weight.requires_grad:
            dweight = (dy.t() @ x_NI).to(weight.dtype)
        dbias = None
        if bias is not None and bias.requires_grad:
            dbias = dy.sum(0).to(bias.dtype)
        return dweight, dbias


class LinearGroup:
    """Linears that share one input, prepared for one forward and its backward.

    The backward has three steps, because the MLP recomputes the input of its last linear between
    the second and the third. `inner` and `dz` are passed from step to step: z and dz of each
    linear, or of all together if they are packed; `inner` also has the output of each linear with a
    DoRA gain, before its bias."""

    def __init__(
        self, modules: Sequence[AnyLinear], dtype: torch.dtype, min_rows: int = MIN_ROWS
    ) -> None:
        """Prepare `modules` for products in `dtype`. lora.c runs from `min_rows` rows on."""
        self.linears = [PreparedLinear(module, dtype) for module in modules]
        self.parameters = tuple(p for linear in self.linears for p in linear.parameters)
        self.needs_input = any(linear.needs_input for linear in self.linears)
        self.masks: list[Tensor | None] = []
        self.packed: PackedAdapters | StackedAdapters | None = None
        self.min_rows = min_rows

    def forward(self, x_NI: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the outputs and `inner`. A second call, to recompute, drops the same inputs."""
        if not self.masks:
            self.masks = [linear.sample_dropout_mask(x_NI) for linear in self.linears]
        self.packed = self._pack(x_NI)
        outputs: list[Tensor] = []
        for linear in self.linears:
            # a gain applies before the bias
            bias = None if linear.dora_scale else linear.bias
            outputs.append(linear.frozen.compute_outputs(x_NI, bias))
        inner: list[Tensor | None] = []
        if self.packed:
            z = self.packed.compute_inner(x_NI)
            self.packed.add_outputs(outputs, z)
            inner.append(z)
        else:
            for linear, y, mask in zip(self.linears, outputs, self.masks, strict=True):
                inner.append(linear.add_output(y, x_NI, mask))
        for index, linear in enumerate(self.linears):
            if linear.dora_scale:
                u = linear.dora_scale.forward(outputs[index])
                outputs[index] = u if linear.bias is None else u + linear.bias
                inner.append(u)
        return outputs, inner

    def _pack(self, x_NI: Tensor) -> PackedAdapters | StackedAdapters | None:
        """Return the adapters packed for lora.c, or stacked for a GPU; None if torch has to run
        them one by one."""
        adapters = [linear.adapter for linear in self.linears]
        if not any(adapters) or any(mask is not None for mask in self.masks):
            return None
        if ops.is_gpu(x_NI.device):
            grad_dtype = next(linear.grad_dtype for linear in self.linears if linear.adapter)
            return self.packed or StackedAdapters(adapters, grad_dtype)
        if len(x_NI) < self.min_rows or not lora.is_supported(x_NI, adapters):
            return None
        return self.packed or PackedAdapters(adapters)

    def outputs_backward(
        self, gradients: Sequence[Tensor], inner: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None], list[OuterGrads]]:
        """Return the gradients before the gains, `dz`, and the gradients of B and of the magnitudes
        of each linear, from the gradients of the outputs."""
        num_inner = 1 if self.packed else len(gradients)
        zs = inner[:num_inner]
        dys, dms = self._dora_backward(gradients, inner[num_inner:])
        if self.packed and zs[0] is not None:
            dz, dbs = self.packed.outputs_backward(dys, zs[0])
            return dys, [dz], list(zip(dbs, dms, strict=True))
        dzs: list[Tensor | None] = []
        outer: list[OuterGrads] = []
        for linear, dy, z, dm in zip(self.linears, dys, zs, dms, strict=True):
            dz, db = linear.outputs_backward(dy, z)
            dzs.append(dz)
            outer.append((db, dm))
        return dys, dzs, outer

    def _dora_backward(
        self, gradients: Sequence[Tensor], us: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        dys = list(gradients)
        dms: list[Tensor | None] = [None] * len(gradients)
        remaining_us = iter(us)
        for index, linear in enumerate(self.linears):
            if linear.dora_scale and (u := next(remaining_us)) is not None:
                dys[index], dms[index] = linear.dora_scale.backward(dys[index], u)
        return dys, dms

    def compute_input_grad(
        self, gradients: Sequence[Tensor], dz: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the gradient of the input, summed over the linears."""
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
        x_NI: Tensor | None,
        gradients: Sequence[Tensor],
        dz: Sequence[Tensor | None],
        outer: Sequence[OuterGrads],
    ) -> list[Tensor | None]:
        """Return the gradients of `parameters`, None if not trained. x is None unless
        `needs_input`."""
        if x_NI is None:
            return [None] * len(self.parameters)
        das: list[Tensor | None] = []
        if self.packed and dz[0] is not None:
            das = self.packed.inputs_backward(x_NI, dz[0])
        else:
            for linear, linear_dz, mask in zip(self.linears, dz, self.masks, strict=True):
                das.append(linear.inputs_backward(x_NI, linear_dz, mask))
        grads: list[Tensor | None] = []
        for linear, dy, da, outer_grads in zip(self.linears, gradients, das, outer, strict=True):
            grads += [*linear.compute_base_grads(x_NI, dy), da, *outer_grads]
        return grads


AnyGroup = LinearGroup | BankLinearGroup


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: AnyGroup, *_parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        outputs, inner = group.forward(x_NI)
        ctx.group = group
        ctx.shape = x.shape
        ctx.save_for_backward(x_NI if group.needs_input else None, *inner)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *inner = ctx.saved_tensors
        group: LinearGroup = ctx.group
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        dys, dz, outer = group.outputs_backward(dys, inner)
        dx = group.compute_input_grad(dys, dz).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return (dx, None, *group.compute_parameter_grads(x_NI, dys, dz, outer))


def project(x: Tensor, modules: Sequence[AnyLinear]) -> tuple[Tensor, ...]:
    """Run x [..., I] through each linear; returns one [..., O] each. It is one node of the autograd
    graph for any number of linears."""
    group = prepare_group(modules, x.dtype)
    outputs = _Project.apply(x, group, *group.parameters)
    # views are made outside: autograd refuses in-place changes of a view made in a Function, and
    # stock modules clamp their queries in place
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)


# first module -> key, group, and the tensors in the key: while they are alive, no other tensor can
# get their address
_group_cache: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LinearGroup, list[Tensor]]] = (
    WeakKeyDictionary()
)


def prepare_group(modules: Sequence[AnyLinear], dtype: torch.dtype) -> AnyGroup:
    """Prepare linears that share one input; a bank holds all linears of a network, or none.

    While nothing trains, a group is cached: casting and packing A and B takes longer than the
    products of a few rows. The key holds the address and version of every tensor, so code that
    changes one behind autograd's back, as through `.data`, has to increment its version."""
    first_module = modules[0]
    if isinstance(first_module, BankLinear):
        return first_module.get_group(modules)
    if torch.is_grad_enabled() or first_module.training or not isinstance(first_module, LoraLinear):
        _group_cache.pop(first_module, None)
        return LinearGroup(modules, dtype)
    key: list[object] = [dtype]
    tensors: list[Tensor] = []
    for module in modules:
        key += _identify_linear(module)
        tensors += _list_tensors(module)
    for tensor in tensors:
        key += [id(tensor), tensor.data_ptr(), tensor._version]
    cached = _group_cache.get(first_module)
    if cached is not None and cached[0] == tuple(key):
        return cached[1]
    group = LinearGroup(modules, dtype, min_rows=1)
    detached = [tensor.detach() for tensor in tensors]
    _group_cache[first_module] = (tuple(key), group, detached)
    return group


def _identify_linear(module: AnyLinear) -> tuple[object, ...]:
    frozen = module.frozen if isinstance(module, LoraLinear | QuantizedLinear) else None
    return id(module), id(frozen), module.scale if isinstance(module, LoraLinear) else 0.0


def _list_tensors(module: AnyLinear) -> list[Tensor]:
    """Return the tensors of a prepared linear, other than its frozen weight."""
    tensors: list[Tensor | None] = [module.bias]
    if isinstance(module, LoraLinear):
        tensors += [module.lora_A, module.lora_B, module.lora_magnitude_vector]
    elif not isinstance(module, QuantizedLinear):
        tensors.append(module.weight)
    return [tensor for tensor in tensors if tensor is not None]
