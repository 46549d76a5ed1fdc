"""Modules that are trained in full beside an adapter, as PEFT's `modules_to_save`.

    train_modules(network, names)     embed_tokens, lm_head, norms, ...

In: a stock network. Out: fp32 master weights in it, and a `TrainedModules` that switches between
them and the base's weights. Left out: which parameters (target_modules.py), files (save.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.lora import Fp32MasterLinear
from tunesmith.model.target_modules import HEAD, find_embedding, select_saved_parameters


class TrainedModules(nn.Module):
    """The master weights of a network by their stock names, and the base's weights.

    `scale` interpolates from the base's (0) to the trained ones (1)."""

    def __init__(self, masters: Mapping[str, nn.Parameter], *, has_tied_head: bool) -> None:
        super().__init__()
        # a plain dict: the parameters belong to their modules
        self.masters = dict(masters)
        self.has_tied_head = has_tied_head
        self._starts: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        self._scale = 1.0
        for name, parameter in masters.items():
            self._starts[name] = parameter.detach().clone()
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(dtype, copy=True)
            parameter.requires_grad_(True)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, factor: float) -> None:
        if factor == self._scale:
            return
        for name, parameter in self.masters.items():
            trained = self._trained.pop(name, parameter.data)
            start = self._starts[name]
            if factor == 1:
                parameter.data = trained
            elif factor == 0:
                parameter.data = start
            else:
                parameter.data = torch.lerp(start.to(trained), trained, factor)
            if factor != 1:
                self._trained[name] = trained
            # values that are cached per version must notice
            torch.autograd.graph.increment_version(parameter)
        self._scale = factor

    def list_stored_parameters(self) -> dict[str, nn.Parameter]:
        """Return name in a file -> parameter; a tied head is stored too, since PEFT unties it."""
        stored = dict(self.masters)
        embedding = find_embedding([*self.masters])
        if self.has_tied_head and embedding:
            stored[f"{HEAD}.weight"] = self.masters[embedding]
        return stored


def train_modules(network: PreTrainedModel, modules: Sequence[str]) -> None:
    """Make the modules that `modules` names trainable in at least fp32."""
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    parameters = dict(network.named_parameters())
    names = select_saved_parameters(list(parameters), modules, is_tied=is_tied)
    masters = {name: parameters[name] for name in names}
    network.trained_modules = TrainedModules(masters, has_tied_head=is_tied)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = network.get_submodule(path)
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, Fp32MasterLinear(module))


def get_trained_modules(network: nn.Module) -> TrainedModules | None:
    """Return the modules of a network that are trained in full beside its adapter."""
    return getattr(network, "trained_modules", None)
