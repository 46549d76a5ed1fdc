"""One step over several ranks: gradients and loss are summed, so each rank makes the same update.

Each rank computes the gradients of its documents, already divided by the counts of the whole step.
`sum_step` adds them up in one all-reduce (one per GiB where all weights are trained), together with
the loss, the number of targets, and words that all must know: which rank ran out of memory, who has
caught a signal, which parameters have a gradient at all. Every rank gets the same bits.

In: the gradients of this rank. Out: those of the step, in place. Left out: which documents a rank
computes (data/packing.py), what follows from the words (loop.py)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.core.errors import MachineError
from tunesmith.core.ranks import Ranks
from tunesmith.model.weight_shards import WeightShards

BUCKET_NUMEL = 2**28  # fp32 numbers of one message
FULL = 2.0  # of a rank without memory; not 1, which fake tensors read as everywhere
CHECKSUM_NUMEL = 2**24  # of one sum, which takes 16 bytes for each


@dataclass(frozen=True)
class StepShare:
    """The loss and the targets of a step, of one rank or of all; gradients are in the parameters.

    `loss` is None without a document. `out_of_memory` is the message of a rank whose gradients are
    incomplete."""

    loss: Tensor | None
    num_targets: int
    out_of_memory: str = ""


def sum_step(
    parameters: Mapping[str, nn.Parameter],
    share: StepShare,
    ranks: Ranks,
    shards: WeightShards | None = None,
) -> StepShare:
    """Sum gradients and loss over ranks, and tell each whether one has caught a signal.

    A parameter without a gradient on any rank keeps none, as in one process, where the optimizer
    leaves it alone. With `shards`, parameters are the pieces of this rank, whose gradients are
    those of its group."""
    if shards is None:
        has_gradient = [parameter.grad is not None for parameter in parameters.values()]
    else:
        has_gradient = shards.take_flags(parameters)
    is_full = [0.0] * ranks.world
    is_full[ranks.rank] = FULL if share.out_of_memory else 0.0
    # One upload and one read, each of which waits for the device.
    words = torch.tensor(
        [0.0, share.num_targets, ranks.has_signal, *is_full, *has_gradient],
        dtype=torch.float32,
        device=next(iter(parameters.values())).device,
    )
    if share.loss is not None:
        words[0] = share.loss
    buckets = _split_into_buckets(list(parameters.values()))
    if shards is None:
        first_bucket, *buckets = buckets
        (words,) = _sum_bucket(first_bucket, (words,), ranks.sum_)
        sum_over_copies = ranks.sum_
    else:
        ranks.sum_(words)
        sum_over_copies = functools.partial(ranks.sum_replicas, size=shards.size)
        if ranks.world == shards.size:
            buckets = []
    for bucket in buckets:
        _sum_bucket(bucket, (), sum_over_copies)
    _, num_targets, num_signals, *flags = words.tolist()
    are_full = flags[: ranks.world]
    for parameter, num_gradients in zip(parameters.values(), flags[ranks.world :], strict=True):
        if not num_gradients:
            parameter.grad = None
    ranks.has_signal = num_signals > 0
    message = share.out_of_memory
    if FULL in are_full and not message:
        message = f"rank {are_full.index(FULL)} is out of memory"
    return StepShare(words[0], int(num_targets), message)


def _split_into_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    numel = 0
    for parameter in parameters:
        if buckets[-1] and numel + parameter.numel() > BUCKET_NUMEL:
            buckets.append([])
            numel = 0
        buckets[-1].append(parameter)
        numel += parameter.numel()
    return buckets


def _sum_bucket(
    bucket: Sequence[nn.Parameter], others: Sequence[Tensor], sum_: Callable[[Tensor], None]
) -> tuple[Tensor, ...]:
    """Sum the gradients of some parameters; return the sums of `others`, in the same message."""
    tensors = [_get_gradient(parameter) for parameter in bucket] + list(others)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    sum_(flat)
    sums = flat.split([tensor.numel() for tensor in tensors])
    for parameter, gradient in zip(bucket, sums[: len(bucket)], strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return sums[len(bucket) :]


def _get_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# ---------------------------------------------------------------- the same weights everywhere


def check_replicas(parameters: Mapping[str, nn.Parameter], ranks: Ranks, parts: int = 1) -> None:
    """Raise MachineError if the weights of two ranks differ in any bit; of ranks that each have one
    of several parts, those with the same part."""
    if ranks.world == 1:
        return
    digests = ranks.gather(hash_weights(parameters))
    for rank, digest in enumerate(digests):
        first = rank % parts
        if digest != digests[first]:
            raise MachineError(
                f"the weights of rank {rank} differ from those of rank {first}, which never "
                "happens on machines that compute alike",
                fix="use machines of one kind with equal libraries and threads, and resume from an "
                "earlier checkpoint",
            )


@torch.no_grad()
def hash_weights(parameters: Mapping[str, nn.Parameter]) -> str:
    """Return a digest of all bits: sums of them as integers, times their positions, hashed."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(name.encode())
        bits = parameter.detach().contiguous().view(torch.int32).flatten()
        for part in bits.split(CHECKSUM_NUMEL):
            position = torch.arange(1, len(part) + 1, device=part.device)
            digest.update(f" {int((part * position).sum())}".encode())
    return digest.hexdigest()
