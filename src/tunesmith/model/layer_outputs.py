"""What the blocks of each layer compute: recorded on the stock network, compared on ours.

    record_block_outputs(network, tokens, positions) -> BlockOutputs     before `wrap_model`
    compare_blocks(model, batch, recorded) -> BlockComparison

Two correct computations of a deep network may differ by more than a mistake: each layer amplifies
the rounding of those below, and a router that chooses another expert changes a token at once. So
each block is given what the stock network gave it: after a block or a norm of ours has run, its
output is replaced by the recorded one. A difference of a block is then its own; that of a norm may
also be one of the sum that it reads. Left out: tolerances and errors (train/preflight.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.types import Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.target_modules import PART_BY_MODULE, ROUTER

# children of a layer that are blocks, beside norms; the others are routers and activations
BLOCK_NAMES = {name for name, part in PART_BY_MODULE.items() if part != ROUTER} | {"mixer"}


@dataclass(frozen=True, eq=False)
class BlockOutputs:
    """Outputs [T, H] of the blocks (attention, other mixers, MLPs, experts, norms), by path in the
    decoder; the choices [T, K] of its routers, each row in ascending order; the final hidden states
    [T, H]; and the fp32 logits [P, V] at some positions. On the CPU."""

    outputs: dict[str, Tensor]
    choices: dict[str, Tensor]
    hidden: Tensor
    logits_PV: Tensor
    positions: tuple[int, ...]


@dataclass(frozen=True)
class BlockComparison:
    """The block that differs most, by how much of its norm; the same for the final hidden states,
    computed from the stock's blocks; and how many choices of routers were equal when our network
    ran by itself."""

    worst_path: str
    worst: float
    num_blocks: int
    hidden: float
    num_equal_choices: int
    num_choices: int


@torch.no_grad()
def record_block_outputs(
    network: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int]
) -> BlockOutputs:
    """Run the stock network on one document and record its blocks, and the logits at positions."""
    decoder: Any = network.base_model
    outputs: dict[str, Tensor] = {}
    choices: dict[str, Tensor] = {}
    hidden: list[Tensor] = []

    def store_hidden(_path: str, output: Any) -> None:
        hidden.append(_get_rows(output.last_hidden_state).cpu())

    def store_output(path: str, output: Any) -> None:
        outputs[path] = _get_rows(output).cpu()

    def store_choices(path: str, output: Any) -> None:
        choices[path] = _sort_choices(output)

    input_ids = torch.tensor([list(tokens)], device=network.device)
    with (
        _hooked(find_blocks(decoder), store_output),
        _hooked(find_routers(decoder), store_choices),
        _hooked({"": decoder}, store_hidden),
    ):
        positions_P = torch.tensor(list(positions), device=network.device)
        out: Any = network(input_ids=input_ids, use_cache=False, logits_to_keep=positions_P)
    return BlockOutputs(outputs, choices, hidden[0], out.logits[0].float().cpu(), tuple(positions))


@torch.no_grad()
def compare_blocks(model: PackedCausalLM, batch: Batch, recorded: BlockOutputs) -> BlockComparison:
    """Compare each block of ours on a pack of the one recorded document. `batch.positions_S` must
    be all its tokens."""
    num_equal = 0
    num_choices = 0

    def count_choices(path: str, output: Any) -> None:
        nonlocal num_equal, num_choices
        is_equal = (_sort_choices(output) == recorded.choices[path]).all(-1)
        num_equal += int(is_equal.sum())
        num_choices += len(is_equal)

    with _hooked(find_routers(model.decoder), count_choices):
        model.compute_hidden(batch)
    errors: dict[str, float] = {}

    def replace_output(path: str, output: Any) -> Any:
        stock = recorded.outputs[path].to(model.device)
        errors[path] = _compare(_get_rows(output), stock)
        if isinstance(output, tuple):
            return (stock.view_as(output[0]), *output[1:])
        return stock.view_as(output)

    with _hooked(find_blocks(model.decoder), replace_output):
        hidden = model.compute_hidden(batch)
    if errors.keys() != recorded.outputs.keys():
        missing = sorted(errors.keys() ^ recorded.outputs.keys())
        raise KeyError(f"the blocks of both networks differ: {', '.join(missing)}")
    # NaN is the worst
    worst_path = max(errors, key=lambda path: (errors[path] != errors[path], errors[path]))
    return BlockComparison(
        worst_path=worst_path,
        worst=errors[worst_path],
        num_blocks=len(errors),
        hidden=_compare(_get_rows(hidden), recorded.hidden.to(model.device)),
        num_equal_choices=num_equal,
        num_choices=num_choices,
    )


def find_blocks(decoder: nn.Module) -> dict[str, nn.Module]:
    """Return path -> block."""
    layers: Any = decoder.layers
    blocks: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if name in BLOCK_NAMES or "norm" in name:
                blocks[f"layers.{index}.{name}"] = child
    return blocks


def find_routers(decoder: nn.Module) -> dict[str, nn.Module]:
    """Return path -> router, whose last output are the chosen experts [T, K]."""
    return {p: m for p, m in decoder.named_modules() if type(m).__name__.endswith("Router")}


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], handle: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `handle` with the path and the output of each module, inside the block."""
    hooks: list[Any] = []
    for path, module in modules.items():

        def run(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> Any:
            return handle(path, output)

        hooks.append(module.register_forward_hook(run))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _get_rows(output: Any) -> Tensor:
    """Return the hidden states [T, H] of a block's output."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(-1, hidden.shape[-1])


def _sort_choices(output: Any) -> Tensor:
    return output[-1].sort(-1).values


def _compare(ours: Tensor, stock: Tensor) -> float:
    return float((ours.double() - stock.double()).norm() / stock.double().norm())
