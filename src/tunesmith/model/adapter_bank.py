"""Adapters side by side on one base: each row of a forward has its own, or none.

    bank = AdapterBank(model)
    bank.load("json", read_adapter(folder, base))
    with bank.use_rows([("json", 1.0, 3), ("", 1.0, 1)]):      # key, scale, tokens
        model.decode_step(...)

In: a model without an adapter, adapter folders that `read_adapter` has checked. Ranks, scales,
targets, LoRA, rsLoRA and DoRA mix in one forward. Refused by name: adapters with experts, with
rows of new tokens, or with modules trained in full, which change more than linears. Left out: the
products (bank_linear.py), whether an adapter belongs to this base (session/provenance.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.model.adapters import find_linears, find_lora_layers, replace_module
from tunesmith.model.bank_linear import (
    BankLinear,
    Factors,
    RowAdapters,
    ScaledAdapter,
    TorchFactors,
)
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.dora import DoraScale, compute_row_norms, compute_squared_norms
from tunesmith.model.frozen_weight import BlockedWeight
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.model.kernels.lora import pack_factors
from tunesmith.model.layers import PrunedLastLayer
from tunesmith.model.save import LoraTensors, copy_adapter_tensors, parse_loras

MERGE_FIX = "serve a merged model: tunesmith export RUN --to merged"
MAX_SCALES = 8  # scales of an adapter that stay prepared
RowRange = tuple[str, float, int]  # key of an adapter ("": the base), scale, number of tokens


class BankAdapter:
    """One adapter, prepared for the linears of a base."""

    def __init__(
        self,
        loras: Mapping[str, LoraTensors],
        linears: Mapping[str, BankLinear],
        dtype: torch.dtype,
    ) -> None:
        self._linears = linears
        self._dtype = dtype
        # only the gains of DoRA need the tensors again, for another scale
        self._dora_tensors = {p: lora for p, lora in loras.items() if lora.magnitude_O is not None}
        self._factors: dict[str, Factors] = {}
        for path, lora in loras.items():
            self._factors[path] = _prepare_factors(lora, linears[path], dtype)
        self.num_bytes = sum(factors.nbytes for factors in self._factors.values())
        for lora in self._dora_tensors.values():
            self.num_bytes += lora.a_RI.nbytes + lora.b_OR.nbytes
        self._by_scale = {1.0: self._scale_by(1.0)}

    def get_scaled(self, factor: float) -> ScaledAdapter:
        """Return the adapter times `factor`. The last few are cached."""
        scaled = self._by_scale.get(factor)
        if scaled is None:
            scaled = self._scale_by(factor)
            self._by_scale = dict(list(self._by_scale.items())[-MAX_SCALES + 1 :])
            self._by_scale[factor] = scaled
        return scaled

    def _scale_by(self, factor: float) -> ScaledAdapter:
        scaled: list[Factors | None] = []
        for path, linear in self._linears.items():
            factors = self._factors.get(path)
            if factors is not None and factor != 1:
                factors = replace(factors, scale=factors.scale * factor)
                if lora := self._dora_tensors.get(path):
                    gains = _compute_gains(lora.scale_by(factor), linear, self._dtype)
                    factors = replace(factors, gain_O=gains[0], offset_O=gains[1])
            scaled.append(factors)
        return ScaledAdapter(scaled)


class AdapterBank:
    """The adapters of a model, which has no other. Without `use_rows` the model is the base.

    Forwards run on one thread; `load` and `remove` may run on others, and take effect at the next
    `use_rows`."""

    def __init__(self, model: PackedCausalLM) -> None:
        """Replace the decoder's linears in place; they keep their frozen weights, blocked for bf16
        on a CPU."""
        assert model.row_adapters is None, "a model has one bank"
        assert not find_lora_layers(model.network), "the model has an adapter of its own"
        self._model = model
        self._rows = RowAdapters(model.device)
        model.row_adapters = self._rows
        pruned = _find_pruned_paths(model)
        self._linears: dict[str, BankLinear] = {}
        for index, (path, linear) in enumerate(find_linears(model.network).items()):
            is_pruned = path in pruned
            bank_linear = BankLinear(linear, index, self._rows, model.dtype, is_pruned=is_pruned)
            replace_module(model.network, path, bank_linear)
            self._linears[path] = bank_linear
        if any(isinstance(linear.frozen, BlockedWeight) for linear in self._linears.values()):
            # the weight file is mapped: its pages count as ours until no tensor refers to them
            for parameter in model.network.parameters():
                parameter.data = parameter.data.clone()
        self._adapters: dict[str, BankAdapter] = {}
        self._lock = threading.Lock()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def load(self, key: str, folder: AdapterFolder) -> int:
        """Add an adapter under a key, or replace that key's, and return its bytes. Forwards that
        run see the old one to their end.

        Raises InputError for what a bank cannot hold, for a layer that the base lacks or that has
        another shape, for NaN or infinite values, and for weights that have changed since
        `read_adapter`."""
        assert key, "the empty key is the base"
        _refuse_unmixable(folder)
        loras: dict[str, LoraTensors] = {}
        for path, lora in parse_loras(copy_adapter_tensors(folder), folder).items():
            if not isinstance(lora, LoraTensors):
                raise _make_unmixable_error(f"an adapter of experts ({path})", folder)
            if path not in self._linears:
                message = f"the adapter has {path}, which is not a linear layer of the base"
                raise InputError(message, where=str(folder.path), fix="use the adapter's base")
            _check_shapes(lora, self._linears[path], folder, path)
            loras[path] = lora
        adapter = BankAdapter(loras, self._linears, self._model.dtype)
        with self._lock:
            self._adapters = self._adapters | {key: adapter}
        return adapter.num_bytes

    def remove(self, key: str) -> None:
        """Forget an adapter. Raises KeyError for a key that is not there."""
        with self._lock:
            adapters = dict(self._adapters)
            del adapters[key]
            self._adapters = adapters

    @contextmanager
    def use_rows(self, rows: Sequence[RowRange]) -> Iterator[None]:
        """Give the tokens of the forwards inside the block their adapters, in order. Raises
        InputError for a key that is not there."""
        variants: dict[tuple[str, float], int] = {}
        indices: list[int] = []
        lengths: list[int] = []
        for key, scale, num_tokens in rows:
            is_base = not key or not scale
            indices.append(-1 if is_base else variants.setdefault((key, scale), len(variants)))
            lengths.append(num_tokens)
        adapters = [self._get(key).get_scaled(scale) for key, scale in variants]
        adapter_T = torch.tensor(indices).repeat_interleave(torch.tensor(lengths))
        self._rows.assign(adapters, adapter_T)
        try:
            yield
        finally:
            self._rows.clear()

    def _get(self, key: str) -> BankAdapter:
        adapter = self._adapters.get(key)
        if adapter is None:
            loaded = ", ".join(self._adapters) or "none"
            raise InputError(f"no adapter {key} is loaded", fix=f"loaded adapters: {loaded}")
        return adapter


def _refuse_unmixable(folder: AdapterFolder) -> None:
    """Raise InputError for an adapter that changes more than linears: its rows could not share a
    forward with others."""
    if folder.new_token_ids:
        raise _make_unmixable_error(f"rows of {len(folder.new_token_ids)} new tokens", folder)
    if folder.saved_parameters:
        name = folder.saved_parameters[0]
        raise _make_unmixable_error(f"modules trained in full ({name})", folder)


def _check_shapes(lora: LoraTensors, linear: BankLinear, folder: AdapterFolder, path: str) -> None:
    """Raise InputError for tensors that do not fit a linear: they may have come after the headers
    were checked, and the kernel reads as much as the linear needs."""
    rank = folder.rank_pattern.get(path, folder.rank)
    shapes = [tuple(lora.a_RI.shape), tuple(lora.b_OR.shape)]
    expected: list[tuple[int, ...]] = [(rank, linear.in_features), (linear.out_features, rank)]
    if lora.magnitude_O is not None:
        shapes.append(tuple(lora.magnitude_O.shape))
        expected.append((linear.out_features,))
    if shapes != expected:
        message = f"the adapter of {path} has tensors of shapes {shapes}, not {expected}"
        raise InputError(message, where=str(folder.path), fix="load the adapter again")


def _make_unmixable_error(part: str, folder: AdapterFolder) -> InputError:
    message = f"the adapter has {part}, which cannot be served with other adapters"
    return InputError(message, where=str(folder.path), fix=MERGE_FIX)


def _find_pruned_paths(model: PackedCausalLM) -> set[str]:
    """Return the linears of the last layer that run on the kept positions only."""
    paths: set[str] = set()
    for layer_path, layer in model.network.named_modules():
        if isinstance(layer, PrunedLastLayer):
            for path in find_linears(model.network):
                inner = path.removeprefix(f"{layer_path}.")
                if inner != path and (inner == "self_attn.o_proj" or inner.startswith("mlp.")):
                    paths.add(path)
    return paths


@torch.no_grad()
def _prepare_factors(lora: LoraTensors, linear: BankLinear, dtype: torch.dtype) -> Factors:
    device = linear.row_adapters.device
    a_RI = lora.a_RI.to(device, dtype)
    b_OR = lora.b_OR.to(device, dtype)
    gain_O, offset_O = _compute_gains(lora, linear, dtype)
    build_factors = pack_factors if linear.has_kernel else TorchFactors
    return build_factors(a_RI, b_OR, lora.scale, gain_O, offset_O)


@torch.no_grad()
def _compute_gains(
    lora: LoraTensors, linear: BankLinear, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return DoRA's gain g and, for a linear with a bias, b - g * b, in fp32 or wider."""
    if lora.magnitude_O is None:
        return None, None
    device = linear.row_adapters.device
    squares_O = compute_squared_norms(linear.frozen.weight)
    tensors = (lora.a_RI.to(device), lora.b_OR.to(device))
    norms_O = compute_row_norms(linear.frozen, squares_O, *tensors, scale=lora.scale, dtype=dtype)
    gain_O = DoraScale(lora.magnitude_O.to(device), norms_O).scale_O
    if linear.bias is None:
        return gain_O, None
    bias_O = linear.bias.detach().to(gain_O.dtype)
    return gain_O, bias_O - gain_O * bias_O
