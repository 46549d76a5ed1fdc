"""What the modules of a stock network call where another package takes functions over."""

from __future__ import annotations

import copy
import errno
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.model.hub.text_class import transformers_errors, use_torch_code


def take_over(function: Callable[[Tensor], Tensor]) -> Any:
    """Decorate a function as transformers does where a package has a kernel of the same name."""
    package = ModuleType("kernel_package")
    setattr(package, function.__name__, negate)
    with patch.dict(sys.modules, {package.__name__: package}):
        decorate = use_kernel_func_from_hub_with_fallback(function.__name__, package.__name__)
        return decorate(function)


def negate(x: Tensor) -> Tensor:
    return -x


def make_module(func: Any) -> nn.Module:
    """Make a module of a function, as the package `kernels` does; where it is installed, it did."""
    if isinstance(func, nn.Module):
        return func

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    return Func()


@take_over
def double(x: Tensor) -> Tensor:
    return 2 * x


double_module = make_module(double)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x)


class ModuleDoubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double_module(x)


class Tripling(Doubling):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def test_modules_call_the_torch_code_of_functions_that_are_taken_over() -> None:
    x = torch.ones(2)
    for kind in (Doubling, ModuleDoubling):
        assert torch.equal(kind()(x), -x)
        module = use_torch_code(kind())
        assert torch.equal(module(x), 2 * x)
        assert torch.equal(copy.deepcopy(module)(x), 2 * x)
        assert torch.equal(kind()(x), -x), "the class has changed"


def test_weights_do_not_outlive_their_network() -> None:
    module = use_torch_code(nn.Sequential(Doubling()))
    module[0].weight = nn.Parameter(torch.ones(2))
    weight = weakref.ref(module[0].weight)
    gc.disable()
    try:
        del module
        assert weight() is None
    finally:
        gc.enable()


def test_a_method_that_a_subclass_overrides_stays_overridden() -> None:
    x = torch.ones(2)
    assert torch.equal(use_torch_code(Tripling())(x), 3 * x)


@pytest.mark.parametrize(
    ("error", "kind", "fix"),
    [
        (OSError(errno.EIO, "it broke"), MachineError, "check the disk"),
        (OSError("no valid JSON"), InputError, "download the model again"),
        (TypeError("a text for a number"), InputError, "download the model again"),
    ],
)
def test_a_disk_that_fails_under_transformers_is_no_damaged_model(
    error: Exception, kind: type[TunesmithError], fix: str
) -> None:
    with pytest.raises(kind) as caught, transformers_errors(Path("model")):
        raise error
    assert caught.value.fix.startswith(fix)
    assert caught.value.where == "model"
