"""Packages of kernels that stand in for the real ones: whatever is called in them raises.

    python tests/helpers/fake_kernel_packages.py FAMILY...       the preflight of tiny models

Out: a line for each, if plain transformers calls the kernels and the preflight does not. In a
process of its own, since transformers looks for these packages when it is imported."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("fla", "mamba_ssm", "causal_conv1d")


class Kernel:
    """A function of a package, or a module in it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.path}.{name}")

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise SystemError(self.path)


class Package(ModuleType):
    """A package in which every name is there."""

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.__name__}.{name}")


def main() -> None:
    for name in PACKAGES:
        sys.modules[name] = Package(name)
    for family in sys.argv[1:]:
        check_family(family)


def check_family(family: str) -> None:
    import torch

    from preflight_models import prepare_network
    from tiny_models import make_tiny_network
    from tunesmith.model.causal_lm import compute_stock_logits, load_network
    from tunesmith.train.preflight import run_preflight

    network = make_tiny_network(family)
    try:
        compute_stock_logits(network, range(3, 12), [8])
    except SystemError as error:
        taken = str(error)
    else:
        sys.exit(f"{family}: transformers calls no kernel of another package")
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        loaded = load_network(Path(folder), torch.float32)
    run_preflight(*prepare_network(loaded))
    sys.stdout.write(f"{family}: {taken} is not called\n")


if __name__ == "__main__":
    main()
