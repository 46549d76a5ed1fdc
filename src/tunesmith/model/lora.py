"""Linear layers with a low-rank adapter, and the matrix products behind them.

`project` runs several linears on one input: the input is saved once and its gradient is summed inside the products.
Masters of A and B are fp32, products run in the dtype of the input. Maths equals PEFT's: W x + b + scale * B A drop(x).
Left out: which modules get an adapter (adapters.py), quantised weights.
Legend: N rows, I inputs, O outputs, R rank; z = A drop(x) [N, R].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.frozen import Blocked, Plain


class LoraLinear(nn.Module):
    """A frozen linear [O, I] with trainable A [R, I] and B [O, R]. `scale` 0 is the base model.

    A ~ U(-1/sqrt(I), 1/sqrt(I)) and B = 0, as PEFT starts them (kaiming_uniform with a = sqrt(5)).
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen: Plain | Blocked = Plain(base.weight.detach())
        self.bias = base.bias
        device, inputs, outputs = base.weight.device, base.in_features, base.out_features
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        start = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
        self.lora_A = nn.Parameter(start.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def extra_repr(self) -> str:
        shape = self.lora_B.shape[0], self.lora_A.shape[1]
        return f"{shape}, rank={self.lora_A.shape[0]}, scale={self.scale}"


class MasterLinear(nn.Module):
    """A trainable linear whose fp32 master multiplies in the dtype of its input. The narrow copy is remade only when
    the master has changed, by its version: who changes it unknown to autograd has to increment that."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self._narrow: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]

    def narrow_weight(self, dtype: torch.dtype) -> Tensor:
        version = self.weight._version
        if self._narrow is None or self._narrow[0] != version or self._narrow[1].dtype != dtype:
            self._narrow = (version, self.weight.detach().to(dtype))
        return self._narrow[1]


Linear = nn.Linear | LoraLinear | MasterLinear


class Operand:
    """One linear prepared for products in one dtype: the forward and the three kinds of gradient."""

    def __init__(self, module: Linear, dtype: torch.dtype) -> None:
        adapter = module if isinstance(module, LoraLinear) and module.scale != 0 else None
        self.scale = adapter.scale if adapter else 0.0
        self.dropout = adapter.dropout if adapter and adapter.training else 0.0
        self.parameters: tuple[Tensor | None, ...] = (
            None if isinstance(module, LoraLinear) else module.weight,
            module.bias,
            adapter.lora_A if adapter else None,
            adapter.lora_B if adapter else None,
        )
        if isinstance(module, LoraLinear):
            self.frozen = module.frozen
        else:
            weight = module.narrow_weight(dtype) if isinstance(module, MasterLinear) else module.weight.detach()
            self.frozen = Plain(weight)
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.a = adapter.lora_A.detach().to(dtype) if adapter else None
        self.b = adapter.lora_B.detach().to(dtype) if adapter else None

    def mask(self, x_NI: Tensor) -> Tensor | None:
        """Dropout's keep mask divided by the keep rate, from torch's own generator, which the loop seeds."""
        if not self.dropout:
            return None
        keep = torch.rand_like(x_NI, dtype=torch.float32) >= self.dropout
        return keep.to(x_NI.dtype).div_(1 - self.dropout)

    def forward(self, x_NI: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self.frozen.outputs(x_NI, self.bias)
        if self.a is None or self.b is None:
            return y, None
        z = F.linear(x_NI if mask is None else x_NI * mask, self.a)
        return y.addmm_(z, self.b.t(), alpha=self.scale), z

    def inner_gradient(self, dy: Tensor) -> Tensor | None:
        return None if self.b is None else (dy @ self.b).mul_(self.scale)

    def input_gradient(self, dy: Tensor, dz: Tensor | None, mask: Tensor | None, into: Tensor | None = None) -> Tensor:
        dx = self.frozen.input_gradient(dy, into)
        if dz is None or self.a is None:
            return dx
        return dx.addmm_(dz, self.a) if mask is None else dx.add_((dz @ self.a).mul_(mask))

    def parameter_gradients(
        self, x_NI: Tensor, dy: Tensor, z: Tensor | None, dz: Tensor | None, mask: Tensor | None
    ) -> list[Tensor | None]:
        """Of weight, bias, A and B; None where not trained."""
        weight, bias, a, b = self.parameters
        dweight = (dy.t() @ x_NI).to(weight.dtype) if weight is not None and weight.requires_grad else None
        dbias = dy.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None
        if a is None or b is None or z is None or dz is None:
            return [dweight, dbias, None, None]
        da = (dz.t() @ (x_NI if mask is None else x_NI * mask)).to(a.dtype)
        db = (z.t() @ dy).t().to(b.dtype).mul_(self.scale)
        return [dweight, dbias, da, db]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: Sequence[Operand], *_parameters: Tensor | None) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        masks = [operand.mask(x_NI) for operand in operands]
        outputs, inner = zip(*(o.forward(x_NI, m) for o, m in zip(operands, masks, strict=True)), strict=True)
        ctx.operands, ctx.masks, ctx.shape = operands, masks, x.shape
        ctx.save_for_backward(x_NI, *inner)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *inner = ctx.saved_tensors
        dx, parameter_gradients = None, []
        for operand, mask, z, dy in zip(ctx.operands, ctx.masks, inner, gradients, strict=True):
            dy_NO = dy.reshape(len(x_NI), -1)
            dz = operand.inner_gradient(dy_NO)
            if ctx.needs_input_grad[0]:
                dx = operand.input_gradient(dy_NO, dz, mask, into=dx)
            parameter_gradients += operand.parameter_gradients(x_NI, dy_NO, z, dz, mask)
        return (None if dx is None else dx.view(ctx.shape), None, *parameter_gradients)


def project(x: Tensor, modules: Sequence[Linear]) -> tuple[Tensor, ...]:
    """x [..., I] through each linear -> [..., O] each: one node of the graph, whatever the number of linears."""
    operands = [Operand(module, x.dtype) for module in modules]
    return _Project.apply(x, operands, *(p for operand in operands for p in operand.parameters))
